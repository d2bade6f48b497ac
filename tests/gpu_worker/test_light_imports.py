"""A worker of a plain model imports neither torch's compiler nor accelerate; both can still be imported later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.factories import make_tiny_model

from gpu_worker.light_imports import is_plain
from protocol.runtime.settings import Settings

SCRIPT = """
import sys
from protocol.runtime.settings import Settings
from gpu_worker.light_imports import import_transformers

settings = Settings(model=sys.argv[1], device="cpu", kernels="reference")
import_transformers(settings.model_copy(update={"compile": True}))
assert "transformers" not in sys.modules, "a model that is compiled needs all of it"
import_transformers(settings)

from gpu_worker.build import load_engine

engine, served = load_engine(settings, lambda digest: None)
for name in ("torch._dynamo", "torch.distributed.tensor", "accelerate", "sympy"):
    assert name not in sys.modules, name
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gpu_worker.quantised.modules import parameters_on_meta

sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "head_dim"), 8)
sizes |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
for kind in ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "smollm3"):
    config = AutoConfig.for_model(kind, pad_token_id=None, **sizes)
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config)
    assert all(parameter.is_meta for parameter in model.parameters()), kind
assert "torch._dynamo" not in sys.modules
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
"""


def test_a_worker_imports_no_compiler_but_one_can_come(tmp_path: Path) -> None:
    environment = {**os.environ, "LORAFLEET_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(make_tiny_model(tmp_path / "model"))]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert "imported whole" not in run.stderr


def test_a_model_that_a_library_quantised_is_not_plain(tmp_path: Path) -> None:
    def plain(config: object) -> bool:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return is_plain(Settings(model=str(tmp_path)))

    assert plain({"model_type": "llama"})
    assert not plain({"model_type": "llama", "quantization_config": {"quant_method": "mxfp4"}})
    assert not plain({"model_type": "gemma3", "text_config": {"quantization_config": {}}})
    assert not plain([])
    (tmp_path / "config.json").unlink()
    assert not is_plain(Settings(model=str(tmp_path)))

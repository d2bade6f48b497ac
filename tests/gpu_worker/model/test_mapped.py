"""A model with mapped weights equals the one that transformers reads; models that cannot be mapped use transformers."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.factories import make_tiny_model
from helpers.mapped import num_mapped
from oracle.tiny_models import causal_types, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gpu_worker.build import load_engine
from gpu_worker.loading.checkpoint import read_config, read_model
from gpu_worker.loading.mapped import map_model
from gpu_worker.model.logits_check import ask_untouched
from gpu_worker.model.model import fingerprint_of
from protocol.runtime.settings import Settings

MAPPED = {"llama", "gemma3_text", "qwen2", "gpt2", "mamba2"}
LEFT = {"gptj", "mixtral"}
"""Types whose computed tensors transformers rounds in its own way, or whose files have other tensors than the model."""

CANNOT_BE_RUN = {"blt", "gemma4_assistant", "gemma4_unified_assistant"}
CANNOT_BE_MADE = {"emu3", "gemma3n", "mllama", "musicgen", "musicgen_melody"}
TYPES = [
    pytest.param(one, marks=[] if one in MAPPED | LEFT else pytest.mark.models)
    for one in causal_types()
    if one not in CANNOT_BE_MADE
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_mapped_model_is_that_of_transformers(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    tiny_model(model_type).save_pretrained(tmp_path)
    mapped = map_model(tmp_path, read_config(tmp_path), dtype)
    assert mapped is None or model_type not in LEFT
    assert mapped is not None or model_type not in MAPPED
    if mapped is None:
        return
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, config=read_config(tmp_path), dtype=dtype, attn_implementation="eager"
    ).eval()
    assert fingerprint_of(mapped) == fingerprint_of(read)
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(mapped, kind)()), dict(getattr(read, kind)())
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype
            assert torch.equal(tensor, theirs[name]), name
    if model_type not in CANNOT_BE_RUN:
        with torch.inference_mode():
            got, expected = (ask_untouched(model, model.config.get_text_config()).logits for model in (mapped, read))
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_weights_are_the_memory_of_the_file(folder: Path) -> None:
    file, norm = folder / "model.safetensors", "model.norm.weight"
    model = read_model(folder, torch.device("cpu"), torch.float32)
    assert num_mapped(file, model.get_parameter(norm).data_ptr()) == 1
    assert read_model(folder, torch.device("cpu"), torch.bfloat16).get_parameter(norm).dtype == torch.bfloat16


def test_a_weight_that_is_dropped_is_unmapped(folder: Path) -> None:
    file = folder / "model.safetensors"
    model: Any = map_model(folder, read_config(folder), torch.float32)
    before, address = num_mapped(file), model.lm_head.weight.data_ptr()
    model.lm_head = torch.nn.Identity()
    gc.collect()
    assert num_mapped(file, address) == 0
    assert num_mapped(file) == before - 1


def test_a_worker_keeps_no_weight_mapped_that_it_has_packed(tmp_path: Path) -> None:
    file = make_tiny_model(tmp_path) / "model.safetensors"
    settings = Settings(model=str(tmp_path), device="cpu", dtype="float32", kernels="reference")
    engine, _ = load_engine(settings, lambda _: pytest.fail("no adapter is asked for"))
    before = num_mapped(file)
    del engine
    gc.collect()
    assert num_mapped(file) == 0
    assert 0 < before < len(load_file(file))


def test_a_head_that_is_tied_shares_the_embedding(tmp_path: Path) -> None:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    model: Any = map_model(tmp_path, read_config(tmp_path), torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_in_several_files_are_mapped(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert map_model(tmp_path, read_config(tmp_path), torch.float32) is not None


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.weight"] = tensors.pop("model.norm.weight")


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "one is missing": lambda tensors: tensors.pop("model.norm.weight"),
    "one has another shape": lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}),
    "one has another name": rename,
    "there is one more": lambda tensors: tensors.update({"more": torch.ones(3)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_tensors_are_left_to_transformers(folder: Path, change: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    CHANGES[change](tensors)
    save_file(tensors, file, {"format": "pt"})
    assert map_model(folder, read_config(folder), torch.float32) is None


def test_missing_files_are_left_to_transformers(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert map_model(folder, read_config(folder), torch.float32) is None

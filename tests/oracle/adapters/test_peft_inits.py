"""Inits that take a part out of the base: refused by name unless PEFT converted the adapter for the whole base."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import examples
from oracle.adapters.peft_kinds import (
    LLAMA,
    MAX_DIFFERENCE,
    Kind,
    asked_prompts,
    check_exact,
    difference,
    engine_logits,
    make_adapter,
    make_base,
    make_engine,
    measure,
    model_logits,
    read_files,
)
from oracle.peft_oracle import TINY_VOCAB, greedy_request, oracle_settings, refusal
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import PreTrainedModel

from gpu_worker.build import build_engine
from gpu_worker.model.prepare import prepare_model
from peft_adapters.format import CONFIG_FILE

PROMPT = asked_prompts(Kind(LLAMA))[1]
IDS = torch.arange(TINY_VOCAB)[None]


def start(init: str, model: PreTrainedModel, **fields: Any) -> PeftModel:
    """Start training in PEFT: the base loses the part that initializes the adapter."""
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": init} | fields
    config = LoraConfig(task_type="CAUSAL_LM", **fields)
    if init == "corda":
        pytest.importorskip("attr", reason="PEFT's CorDA imports attrs")
        from peft.tuners.lora.corda import preprocess_corda

        config.corda_config = CordaConfig(corda_method="kpm")
        preprocess_corda(model, config, run_model=lambda: model(input_ids=IDS))
    elif init == "lora_ga":
        config.lora_ga_config = LoraGAConfig()
        preprocess_loraga(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())
    return get_peft_model(model, config).eval()


def config_of(peft: PeftModel) -> Any:
    """Return a model's `LoraConfig`; untyped, because the type of `init_lora_weights` lacks some of PEFT's inits."""
    return peft.peft_config["default"]


def train_and_save(peft: PeftModel, init: str, root: Path) -> None:
    """Save as PEFT's guides say: `raw` for the reduced base, `converted` for the unchanged one."""
    config = config_of(peft)
    config.init_lora_weights = True
    peft.save_pretrained(str(root / "start"))
    config.init_lora_weights = init
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(str(root / "raw"))
    peft.save_pretrained(str(root / "converted"), path_initial_model_for_weight_conversion=str(root / "start"))


INITS: dict[str, dict[str, Any]] = {
    "pissa": {}, "pissa_niter_4": {"use_rslora": True}, "olora": {}, "corda": {}, "lora_ga": {},
}  # fmt: skip


@pytest.mark.parametrize("init", examples.some(INITS, "pissa_niter_4", "corda"))
def test_a_converted_save_is_served_and_an_unconverted_one_refused(init: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        peft = start(init, make_base(LLAMA), **INITS[init])
        train_and_save(peft, init, tmp_path)
    error = refusal(make_engine(LLAMA, {"raw": tmp_path / "raw"}), greedy_request("raw", "raw", PROMPT, 2))
    assert error.status == 422
    assert f"init_lora_weights {init} changes the base weights" in error.message
    check_exact(Kind(LLAMA), tmp_path / "converted", peft)  # what was trained
    assert measure(Kind(LLAMA), tmp_path / "converted").difference <= MAX_DIFFERENCE, "not what PEFT loads"


def test_as_saved_it_is_served_on_the_base_that_was_saved_with_it(tmp_path: Path) -> None:
    """The guides' other way: the reduced base is saved too, and the adapter is plain LoRA on it."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        peft = start("pissa", make_base(LLAMA))
        config_of(peft).init_lora_weights = True
        peft.save_pretrained(str(tmp_path))
        base = copy.deepcopy(peft).unload()
    model = prepare_model(base, frozenset(), None)
    engine, _ = build_engine(model, oracle_settings(), lambda _: read_files(tmp_path), None)
    ids, logits = engine_logits(engine, [greedy_request("a", "a", PROMPT, 5)])["a"]
    assert difference(logits, model_logits(peft, PROMPT, ids)) <= MAX_DIFFERENCE
    assert difference(logits, model_logits(make_base(LLAMA), PROMPT, ids)) <= MAX_DIFFERENCE, "nothing was trained"


def test_loftq_is_refused_by_name(tmp_path: Path) -> None:
    """PEFT makes it only on a GPU; here a plain adapter's config is edited to say so."""
    make_adapter(Kind(LLAMA), tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    config |= {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    assert "loftq" in refusal(make_engine(LLAMA, {"a": tmp_path}), greedy_request("a", "a", PROMPT, 2)).message

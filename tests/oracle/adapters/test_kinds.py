"""Every adapter kind besides LoRA gives PEFT's logits, in one batch with others, and scaled if PEFT can scale it.

`test_kind_forms.py` tests their other forms and other bases.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import examples
from oracle.adapters.kind_cases import CASES
from oracle.adapters.peft_kinds import (
    LLAMA,
    MAX_DIFFERENCE,
    Kind,
    asked_prompts,
    base_for,
    check_exact,
    engine_logits,
    load,
    make_adapter,
    make_base,
    make_engine,
    model_logits,
)
from oracle.peft_oracle import ask, greedy_request, warm
from torch import nn

from gpu_worker.engine.engine import Engine
from protocol.wire.errors import BadRequest

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # from PEFT's SHiRA

UNSCALED = ("ia3", "road", "beft", "oft", "ln_tuning", "trainable_tokens")
"""Kinds that add nothing to weights, so that they have no scale."""


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    make_adapter(CASES[name], tmp_path)
    check_exact(CASES[name], tmp_path, max_step_tokens=16, max_num_seqs=8)


def on_llama(tmp_path: Path) -> dict[str, Path]:
    """Return folders with an adapter of each kind for the same base."""
    folders = {name: tmp_path / name for name, kind in CASES.items() if kind.base == LLAMA}
    for name, folder in folders.items():
        make_adapter(CASES[name], folder)
    return folders


def test_all_kinds_in_one_batch_are_what_each_is_alone(tmp_path: Path) -> None:
    folders = on_llama(tmp_path)
    make_adapter(Kind(LLAMA), tmp_path / "lora")
    folders["lora"] = tmp_path / "lora"
    assert len(folders) > 10
    prompt = asked_prompts(Kind(LLAMA))[1]

    def engine() -> Engine:
        return make_engine(LLAMA, folders, max_num_seqs=32, max_step_tokens=2048)

    together = engine()
    warm(together, folders)
    requests = [greedy_request(name, name, prompt, 6) for name in folders]
    mixed = engine_logits(together, [*requests, greedy_request("base", "", prompt, 6)])
    alone = engine()
    for name in (*folders, "base"):
        single = engine_logits(alone, [greedy_request(name, "" if name == "base" else name, prompt, 6)])
        assert mixed[name][0] == single[name][0], name
        assert (mixed[name][1] - single[name][1]).abs().max() <= MAX_DIFFERENCE, name
    assert len({tuple(ids) for ids, _ in mixed.values()}) > 10, "adapters must change the answer"


SCALED = ("loha", "lokr", "vera", "miss", "delora", "hra", "deft", "shira")


@pytest.mark.parametrize("name", examples.some(SCALED, "loha", "vera", "hra", "shira"))
def test_a_scale_multiplies_what_is_added_to_weights(name: str, tmp_path: Path) -> None:
    """The oracle is the base with PEFT's merged weights moved halfway back to its own."""
    kind = CASES[name]
    make_adapter(kind, tmp_path)
    merged = load(kind, tmp_path).merge_and_unload()
    half = make_base(kind.base)
    theirs = dict(merged.named_modules())
    with torch.no_grad():
        for module_name, module in half.named_modules():
            if isinstance(module, nn.Linear):
                module.weight += 0.5 * (theirs[module_name].get_parameter("weight") - module.weight)
    engine = make_engine(kind.base, {"tuned": tmp_path})
    prompt = asked_prompts(kind)[1]
    ids, logits = engine_logits(engine, [greedy_request("r", "tuned", prompt, 4, lora_scale=0.5)])["r"]
    assert (logits - model_logits(half, prompt, ids)).abs().max() <= MAX_DIFFERENCE
    assert (logits - model_logits(base_for(kind), prompt, ids)).abs().max() > 10 * MAX_DIFFERENCE


@pytest.mark.parametrize("name", UNSCALED)
def test_what_has_no_scale_is_refused_where_one_is_asked_for(name: str, tmp_path: Path) -> None:
    kind = CASES[name]
    make_adapter(kind, tmp_path)
    engine = make_engine(kind.base, {"tuned": tmp_path})
    prompt = asked_prompts(kind)[0]
    asked = ask(engine, [greedy_request("r", "tuned", prompt, 2, lora_scale=0.5)])
    error = asked.finish["r"].error
    assert isinstance(error, BadRequest)
    assert "lora_scale 0.5" in error.message
    assert name.upper() in error.message
    assert not ask(engine, [greedy_request("again", "tuned", prompt, 2)]).finish["again"].error

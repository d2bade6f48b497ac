"""Folders of heads that are not what they should be are refused at the start, and say why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle.peft_oracle import Oracle
from oracle.test_draft_head import DRAFTED, TAPS, WIDTH, Tensors, deep_llama, random_tensors, saved
from oracle.tiny_models import tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpu_worker.drafting.load import load_draft_model
from gpu_worker.model.prepare import prepare_model
from protocol.wire.errors import BadRequest


@pytest.fixture(scope="module")
def deep() -> Oracle:
    return Oracle(deep_llama(), {}, scale=0.1)


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda made: {name: tensor for name, tensor in made.items() if name not in names}


def but(**tensors: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda made: made | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "config", "wanted"),
    [
        (without("fc.weight", "norm.weight"), {}, "its weights lack fc.weight, norm.weight"),
        (without("d2t"), {}, "its weights lack d2t"),
        (but(medusa__weight=torch.ones(2)), {}, "its weights have medusa.weight, which no head has that is served"),
        (but(fc__weight=torch.ones(WIDTH, 3 * 48)), {}, r"fc.weight has the shape \[64, 144\], with .* \[64, 192\]"),
        (but(d2t=torch.full((DRAFTED,), 99)), {}, "d2t names tokens outside the base's 0 … 198"),
        (but(d2t=torch.zeros(DRAFTED, dtype=torch.int64)), {}, "d2t and t2d name different tokens"),
        (None, {"vocab_size": 320}, "for a vocabulary of 320 tokens, the base has 199"),
        (None, {"num_hidden_layers": 2}, "num_hidden_layers is 2 in its config; served is 1"),
        (None, {"hidden_act": "gelu"}, "hidden_act is gelu in its config; served is silu"),
        (None, {"norm_before_residual": True}, "norm_before_residual is True in its config; served is False"),
        (None, {"eagle_config": {"use_aux_hidden_state": False}}, "the base's last hidden states alone"),
        (None, {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}, r"layers \[1, 2, 3\] .* those before 2, 4, 5"),
        (None, {"architectures": ["LlamaForCausalLMEagle"]}, "it is a head of the kind LlamaForCausalLMEagle"),
        (None, {"architectures": ["MedusaModel"]}, "it is a head of the kind MedusaModel"),
        (None, {"eagle_config": "x"}, "it cannot be read: 'str' object has no attribute 'get'"),
        (None, {"eagle_aux_hidden_state_layer_ids": 3}, "it cannot be read: 'int' object is not iterable"),
        (None, {"rope_scaling": {"rope_type": "none", "factor": 2.0}}, "it cannot be read: 'none'"),
        (None, {"num_attention_heads": 0}, "is not a valid llama config: .*modulo by zero"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    deep: Oracle, tmp_path: Path, change: Callable[[Tensors], Tensors] | None, config: dict[str, Any], wanted: str
) -> None:
    made = random_tensors()
    head = saved(tmp_path, made if change is None else change(made), **config)
    base = prepare_model(copy.deepcopy(deep.untouched), frozenset(), None)
    with pytest.raises(BadRequest, match=f"draft_model is {head}: .*{wanted}"):
        load_draft_model(head, None, base, None)


def test_an_index_that_is_none_is_refused(deep: Oracle, tmp_path: Path) -> None:
    head = saved(tmp_path, random_tensors())
    base = prepare_model(copy.deepcopy(deep.untouched), frozenset(), None)
    for index in ("[]", '{"weight_map": [1]}', '{"weight_map": {"fc.weight": 3}}'):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(BadRequest, match=f"draft_model is {head}: "):
            load_draft_model(head, None, base, None)


def test_a_bases_own_heads_are_refused_by_name(deep: Oracle, tmp_path: Path) -> None:
    deep.untouched.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name, wanted in (
        ("mtp.fc.weight", "the base's own head is of the type llama; served are qwen3_5_text"),
        (
            "model.layers.8.eh_proj.weight",
            r"own head for further tokens \(model.layers.8.eh_proj.weight\) is not served",
        ),
    ):
        save_file(tensors | {name: torch.ones(2)}, file, {"format": "pt"})
        base = prepare_model(type(deep.untouched).from_pretrained(tmp_path), frozenset(), None)
        with pytest.raises(BadRequest, match=wanted):
            load_draft_model(str(tmp_path), None, base, None)


def test_layers_are_named_by_inputs_or_outputs(deep: Oracle, tmp_path: Path) -> None:
    base = prepare_model(copy.deepcopy(deep.untouched), frozenset(), None)
    for named in (
        {"eagle_aux_hidden_state_layer_ids": [*TAPS]},
        {"eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in TAPS]}},
    ):
        assert load_draft_model(saved(tmp_path, random_tensors(), **named), None, base, None)


def test_bases_whose_layers_cannot_be_read_are_refused(tiny: Oracle, tmp_path: Path) -> None:
    head = saved(tmp_path, random_tensors())
    small = prepare_model(copy.deepcopy(tiny.untouched), frozenset(), None)
    with pytest.raises(BadRequest, match="which reads three layers of 7; the base has 2"):
        load_draft_model(head, None, small, None)
    other = prepare_model(tiny_model("gemma2"), frozenset(), None)
    with pytest.raises(BadRequest, match="those of gemma2 are not"):
        load_draft_model(head, None, other, None)

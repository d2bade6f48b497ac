"""An adapter with more tokens than the head widens a step's logits; those of the other requests are unchanged."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from gpu_worker.layers.apply_extras import ExtraRows, apply_linear
from gpu_worker.layers.extras import Dora, Extras, LinearExtras, LinearTransform, LowRank, Places, Tokens

VOCABULARY, HIDDEN, ADDED = 8, 4, 2

TWO = torch.full((VOCABULARY,), 2.0)
ROTATION = torch.eye(2).flip(0).repeat(VOCABULARY // 2, 1, 1)

PARTS: dict[str, dict[str, Any]] = {
    "inputs": {"inputs": LinearTransform(scale=torch.full((HIDDEN,), 2.0))},
    "factors of outputs": {"outputs": LinearTransform(scale=TWO)},
    "pairs of outputs": {"outputs": LinearTransform(scale=TWO, across=TWO, group=4)},
    "blocks of outputs": {"outputs": LinearTransform(blocks=ROTATION)},
    "places": {"places": Places(torch.tensor([[0, 7], [1, 3]]), torch.ones(2))},
    "weight": {"weight": torch.ones(VOCABULARY, HIDDEN)},
    "bias": {"bias": TWO},
    "lora": {"lora": LowRank(torch.ones(1, HIDDEN), torch.ones(1, VOCABULARY), 1.0)},
    "lora_bias": {"lora_bias": TWO},
    "dora": {"dora": Dora(TWO, TWO, torch.ones(3, VOCABULARY))},
    "tokens": {"tokens": Tokens(torch.tensor([3]), torch.ones(1, HIDDEN))},
}
"""Everything that an adapter can change in a head, one at a time."""


def group(row: int, **parts: Any) -> ExtraRows:
    rows = torch.tensor([row])
    return ExtraRows(Extras({0: LinearExtras(**parts)}), rows, rows, 1.0)


def test_every_part_of_an_adapter_is_tried() -> None:
    assert {name for parts in PARTS.values() for name in parts} == {field.name for field in fields(LinearExtras)}


@pytest.mark.parametrize("name", PARTS)
def test_the_order_of_a_step_changes_no_answer(name: str) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, HIDDEN), torch.randn(VOCABULARY, HIDDEN), torch.randn(VOCABULARY)
    wide = group(0, weight=torch.randn(VOCABULARY + ADDED, HIDDEN), bias=torch.randn(VOCABULARY + ADDED))
    other = group(1, **PARTS[name])

    def logits(*groups: ExtraRows) -> torch.Tensor:
        out = torch.nn.functional.linear(x, weight, bias)
        return apply_linear(list(groups), 0, out, x, bias)

    alone, both = logits(other), [logits(wide, other), logits(other, wide)]
    for found in both:
        assert found.shape == (2, VOCABULARY + ADDED)
        assert torch.equal(found[1, :VOCABULARY], alone[1])
        assert not found[1, VOCABULARY:].any()
        assert torch.equal(found[0], logits(wide)[0])
    if name != "inputs":  # `transformed_inputs` applies inputs before
        assert not torch.equal(alone[1], logits()[1])

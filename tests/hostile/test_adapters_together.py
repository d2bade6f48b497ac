"""Adapters with extras are applied together: each answer equals its adapter's alone, in bounded memory per step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu_worker.layers.apply_extras import ExtraRows, apply_linear, transformed_inputs
from gpu_worker.layers.extras import Dora, Extras, LinearExtras, LinearTransform, LowRank, Tokens

ROWS, WIDTH, WIDER = 64, 32, 40


def numbers(*sizes: int) -> Tensor:
    return torch.rand(*sizes) + 0.5


def dora(width: int) -> Dora:
    return Dora(numbers(width), numbers(width), numbers(3, width))


def pairs(size: int) -> LinearTransform:
    return LinearTransform(numbers(WIDTH), numbers(WIDTH), size)


def blocks(size: int) -> LinearTransform:
    return LinearTransform(blocks=numbers(WIDTH // size, size, size))


def adapters(dtype: torch.dtype) -> list[LinearExtras]:
    """Return adapters of a layer, each with several changes of it."""

    def own(*sizes: int) -> Tensor:
        return numbers(*sizes).to(dtype)

    def lora(width: int) -> LowRank:
        return LowRank(own(2, WIDTH), own(2, width), 0.5)

    def tokens(last: int) -> Tokens:
        return Tokens(torch.tensor([3, last]), own(2, WIDTH), LowRank(own(1, WIDTH), own(1, 2), 0.5))

    return [
        LinearExtras(dora=dora(WIDTH)),
        LinearExtras(dora=dora(WIDTH), bias=own(WIDTH)),
        LinearExtras(dora=dora(WIDER), weight=own(WIDER, WIDTH), bias=own(WIDER), lora=lora(WIDER)),
        LinearExtras(dora=dora(WIDTH), tokens=tokens(WIDER + 3)),
        LinearExtras(dora=dora(WIDTH), weight=own(WIDTH, WIDTH), lora=lora(WIDTH), tokens=tokens(5)),
        LinearExtras(inputs=pairs(2), outputs=pairs(4), dora=dora(WIDTH)),
        LinearExtras(inputs=pairs(4), outputs=pairs(4), lora_bias=numbers(WIDTH)),
        LinearExtras(inputs=pairs(4), outputs=pairs(2)),
        LinearExtras(inputs=blocks(4), outputs=blocks(8)),
        LinearExtras(inputs=blocks(8), outputs=LinearTransform(numbers(WIDTH))),
        LinearExtras(inputs=LinearTransform(numbers(WIDTH)), outputs=LinearTransform(numbers(WIDTH))),
    ]


def step(parts: list[LinearExtras]) -> list[ExtraRows]:
    """Return a step whose rows alternate between adapters; for some, LoRA is active only on their last rows."""
    groups: list[ExtraRows] = []
    for i, part in enumerate(parts):
        rows = torch.arange(i, ROWS, len(parts))
        groups.append(ExtraRows(Extras({0: part}), rows, rows[i % 2 :], (1.0, 0.5, 2.0)[i % 3]))
    return groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_each_answer_is_that_of_its_adapter_alone(dtype: torch.dtype, *, has_bias: bool) -> None:
    torch.manual_seed(0)
    groups = step(adapters(dtype))
    x, before = torch.randn(ROWS, WIDTH, dtype=dtype), torch.randn(ROWS, WIDTH, dtype=dtype)
    bias = torch.randn(WIDTH, dtype=dtype) if has_bias else None

    def inputs(own: list[ExtraRows]) -> Tensor:
        found = transformed_inputs(own, 0, x)
        return x if found is None else x.index_copy(0, *found)

    together, changed = apply_linear(groups, 0, before.clone(), x, bias), inputs(groups)
    for group in groups:
        alone = apply_linear([group], 0, before.clone(), x, bias)
        width = alone.shape[1]
        assert torch.equal(together[group.rows, :width], alone[group.rows])
        assert not together[group.rows, width:].any()
        assert (alone[group.rows, :WIDTH] != before[group.rows]).any(dim=1).all()
        assert torch.equal(changed[group.rows], inputs([group])[group.rows])
        assert torch.equal(changed[group.rows], x[group.rows]) == (group.extras.linear[0].inputs is None)


class LiveBytes(TorchDispatchMode):
    """Tracks the live bytes of tensors created by operations, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._tensors: dict[int, int] = {}  # memory address -> number of tensors that use it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                memory = leaf.untyped_storage()
                if memory.data_ptr() not in given or memory.data_ptr() in self._tensors:
                    self._add(leaf, memory.data_ptr(), memory.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _add(self, tensor: Tensor, address: int, num_bytes: int) -> None:
        if address not in self._tensors:
            self._tensors[address] = 0
            self.now += num_bytes
        self._tensors[address] += 1
        weakref.finalize(tensor, self._remove, address, num_bytes)

    def _remove(self, address: int, num_bytes: int) -> None:
        self._tensors[address] -= 1
        if not self._tensors[address]:
            del self._tensors[address]
            self.now -= num_bytes


@pytest.mark.parametrize("num", [1, 16])
@pytest.mark.parametrize(
    ("change", "most", "has_bias"),
    [
        (lambda: {"dora": dora(WIDTH)}, 3, False),
        (lambda: {"dora": dora(WIDTH)}, 3, True),
        (lambda: {"outputs": pairs(4)}, 5, False),
        (lambda: {"inputs": pairs(4)}, 5, False),
    ],
    ids=["dora", "dora and bias", "pairs of outputs", "pairs of inputs"],
)
def test_memory_is_bounded_by_the_rows_of_a_step(
    change: Callable[[], dict[str, Any]], most: int, num: int, *, has_bias: bool
) -> None:
    """most: maximum number of fp32 numbers per number that adapters change."""
    groups = step([LinearExtras(**change()) for _ in range(num)])
    x, out = (torch.randn(ROWS, WIDTH, dtype=torch.bfloat16) for _ in range(2))
    bias = torch.randn(WIDTH, dtype=torch.bfloat16) if has_bias else None
    with LiveBytes() as live:
        changed = transformed_inputs(groups, 0, x)
        apply_linear(groups, 0, out, x, bias)
    assert live.most >= ROWS * WIDTH * 4
    assert live.most <= ROWS * WIDTH * 4 * (most + 0.3)  # plus row numbers, and factors for other scales
    assert (changed is not None) == ("inputs" in change())

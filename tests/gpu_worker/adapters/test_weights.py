"""The pool's tensors: how a budget is split, and in which order a stream copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from adapter_loading import SITES, make_adapter
from torch import Tensor

from gpu_worker.adapters.extras import Extras, LinearExtras
from gpu_worker.adapters.weights import PoolWeights, split_budget
from protocol.wire.errors import BadRequest


def test_a_budget_is_split_by_pages() -> None:
    assert split_budget([100, 300, 0], 4000) == [10, 10, 0]
    assert split_budget([100, 300, 1000], 21_000) == [47, 47, 2]
    assert split_budget([100, 0, 0], 1050) == [10, 0, 0]
    with pytest.raises(BadRequest, match="adapter_pool_bytes"):
        split_budget([100, 300, 0], 399)


class RecordedStream:
    """A `CopyStream` that copies at once and records what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.rows: Tensor | None = None  # looked at whenever steps are waited for
        self.rows_at_wait: list[float] = []

    def allocate_like(self, tensor: Tensor) -> Tensor:
        self.calls.append("allocate")
        return torch.full_like(tensor, -1.0)

    def wait_for_steps(self) -> None:
        self.calls.append("wait")
        assert self.rows is not None
        self.rows_at_wait.append(self.rows.abs().sum().item())

    @contextmanager
    def use(self) -> Iterator[None]:
        self.calls.append("use")
        yield

    def synchronize(self) -> None:
        self.calls.append("synchronize")


def test_a_copy_allocates_then_waits_for_steps_then_writes() -> None:
    """Memory that was freed on the default stream may be read there by what was launched before it was allocated."""
    stream: Any = RecordedStream()
    weights = PoolWeights(SITES, [], 100_000, "cpu", 1 << 20, stream)
    extras = Extras(linear={0: LinearExtras(bias=torch.ones(6), lora_bias=torch.ones(6))})
    adapter = replace(make_adapter("a", 8), extras=extras)
    stream.rows = weights.lora_sites[0].a_rows
    copied = weights.copy(adapter, [[0], [], [], [0]])
    assert stream.calls == ["allocate", "allocate", "wait", "use", "synchronize"]
    assert stream.rows_at_wait == [0.0], "rows are written before steps have ended that may read their pages"
    assert torch.equal(stream.rows[:8], adapter.rows[0][1])
    assert torch.equal(copied.linear[0].bias, torch.ones(6))
    assert copied.linear[0].bias is not extras.linear[0].bias

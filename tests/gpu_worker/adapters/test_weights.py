"""The pool's tensors: how a budget is split, and in which order a stream copies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.adapter_loading import SITES, RecordedStream, make_adapter

from gpu_worker.adapters.extras import Extras, LinearExtras
from gpu_worker.adapters.weights import PoolWeights, split_budget
from protocol.wire.errors import BadRequest


def test_a_budget_is_split_by_pages() -> None:
    assert split_budget([100, 300, 0], 4000) == [10, 10, 0]
    assert split_budget([100, 300, 1000], 21_000) == [47, 47, 2]
    assert split_budget([100, 0, 0], 1050) == [10, 0, 0]
    with pytest.raises(BadRequest, match="adapter_pool_bytes"):
        split_budget([100, 300, 0], 399)


def test_a_copy_allocates_then_waits_for_steps_then_writes() -> None:
    """Memory that was freed on the default stream may be read there by what was launched before it was allocated."""
    rows_at_wait: list[float] = []
    stream = RecordedStream(lambda: rows_at_wait.append(weights.lora_sites[0].a_rows.abs().sum().item()))
    weights = PoolWeights(SITES, [], 100_000, "cpu", 1 << 20, stream)
    extras = Extras(linear={0: LinearExtras(bias=torch.ones(6), lora_bias=torch.ones(6))})
    adapter = replace(make_adapter("a", 8), extras=extras)
    copied = weights.copy(adapter, [[0], [], [], [0]])
    assert stream.calls == ["allocate", "allocate", "wait", "use", "synchronize"]
    assert rows_at_wait == [0.0], "rows are written before steps have ended that may read their pages"
    assert torch.equal(weights.lora_sites[0].a_rows[:8], adapter.rows[0][1])
    bias = copied.linear[0].bias
    assert bias is not None
    assert torch.equal(bias, torch.ones(6))
    assert bias is not extras.linear[0].bias

"""The pool's tensors: how a byte budget is split, and in which order a stream copies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.adapter_loading import SITES, RecordedStream, make_adapter, rows_of

from gpu_worker.adapters.copy_stream import CopyBuffer
from gpu_worker.adapters.packing.packer import row_sites
from gpu_worker.adapters.weights import PoolWeights, page_runs, split_budget
from gpu_worker.layers.extras import Extras, LinearExtras
from lora_kernels.ops import PAGE_ROWS
from protocol.wire.errors import BadRequest


def test_a_budget_is_split_by_pages() -> None:
    assert split_budget([100, 300, 0], 4000) == [10, 10, 0]
    assert split_budget([100, 300, 1000], 21_000) == [47, 47, 2]
    assert split_budget([100, 0, 0], 1050) == [10, 0, 0]
    with pytest.raises(BadRequest, match="adapter_pool_bytes"):
        split_budget([100, 300, 0], 399)


def test_neighbouring_pages_are_one_run() -> None:
    assert page_runs([]) == []
    assert page_runs([4, 5, 6, 1, 2, 9]) == [(0, 4, 3), (3, 1, 2), (5, 9, 1)]
    assert page_runs([3, 2, 1]) == [(0, 3, 1), (1, 2, 1), (2, 1, 1)]


@pytest.mark.parametrize("pages", [[0, 1, 2], [2, 0, 1], [2, 1, 0]], ids=str)
def test_rows_lie_in_the_pages_that_the_pool_gave(pages: list[int]) -> None:
    weights = PoolWeights(SITES, [], 100_000, "cpu")
    adapter = make_adapter("a", 40)
    adapter.rows.buffer.view(torch.float32).uniform_()
    weights.copy(adapter, [pages, pages, pages, []])
    for index, a, b, _ in rows_of(adapter, row_sites(SITES)):
        site = weights.lora_sites[index]
        where = torch.cat([torch.arange(page * PAGE_ROWS, (page + 1) * PAGE_ROWS) for page in pages])[:40]
        assert torch.equal(site.a_rows[where], a)
        assert torch.equal(site.b_rows[where], b)
        assert not site.a_rows.sum(-1)[48:].any()


@pytest.mark.parametrize("num_bytes", [256, 1000, 1 << 20])
def test_copies_through_a_small_piece_of_memory_are_whole(num_bytes: int) -> None:
    num_waits = 0
    launched: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Late(torch.Tensor):
        """A device tensor whose copies happen only when they are waited for."""

        def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> Late:  # type: ignore[override]
            assert non_blocking
            launched.append((self.as_subclass(torch.Tensor), source))
            return self

    def wait() -> None:
        nonlocal num_waits
        num_waits += 1
        for target, source in launched:
            target.copy_(source)
        launched.clear()

    buffer = CopyBuffer(torch.zeros(num_bytes, dtype=torch.uint8), wait)
    sources = [torch.rand(7, 33), torch.rand(40).bfloat16(), torch.zeros(0), torch.rand(3, 5, 2), torch.ones(1)]
    targets = [torch.zeros_like(source) for source in sources]
    for target, source in zip(targets, sources, strict=True):
        changed = source.clone()
        buffer.copy_(target.as_subclass(Late), changed)
        changed.zero_()
    wait()
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))
    assert (num_waits > 1) == (num_bytes < sum(source.nbytes for source in sources))


def test_a_copy_allocates_then_waits_for_steps_then_writes() -> None:
    """New memory may have been freed on the default stream, where steps launched before may still read it."""
    rows_at_wait: list[float] = []
    stream = RecordedStream(lambda: rows_at_wait.append(weights.lora_sites[0].a_rows.abs().sum().item()))
    weights = PoolWeights(SITES, [], 100_000, "cpu", 1 << 20, stream)
    extras = Extras(linear={0: LinearExtras(bias=torch.ones(6), lora_bias=torch.ones(6))})
    adapter = replace(make_adapter("a", 8), extras=extras)
    copied = weights.copy(adapter, [[0], [], [], [0]])
    assert stream.calls == ["allocate", "allocate", "wait", "use", "synchronize"]
    assert rows_at_wait == [0.0], "rows are written before steps have ended that may read their pages"
    assert torch.equal(weights.lora_sites[0].a_rows[:8], rows_of(adapter, row_sites(SITES))[0][1])
    bias = copied.linear[0].bias
    assert bias is not None
    assert torch.equal(bias, torch.ones(6))
    assert bias is not extras.linear[0].bias

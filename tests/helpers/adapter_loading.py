"""Tiny adapters, and an adapter cache over a pool of a few pages for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from gpu_worker.adapters.cache import AdapterCache
from gpu_worker.adapters.copy_stream import CopyStream
from gpu_worker.adapters.merges import MergeWatch
from gpu_worker.adapters.packing.packer import HostAdapter, LinearRows, row_sites
from gpu_worker.adapters.packing.rows import RowSite
from gpu_worker.adapters.weights import PoolWeights
from gpu_worker.layers.lora import SiteInfo
from lora_kernels.ops import PAGE_ROWS
from protocol.wire.errors import NotFound

SITES = [
    SiteInfo("model.layers.0.attn.q", 0, 0, 4, 6, "linear", torch.float32),
    SiteInfo("model.layers.0.mlp.up", 1, 1, 4, 8, "linear", torch.float32),
    SiteInfo("lm_head", 2, 2, 4, 10, "linear", torch.float32),
]
PAGE_BYTES = [PAGE_ROWS * 4 * 10, PAGE_ROWS * 4 * 12, PAGE_ROWS * 4 * 14]
ATTENTION = 1 << 0
MLP = 1 << 1


def make_adapter(digest: str, rank: int, where: int = ATTENTION) -> HostAdapter:
    """Return an adapter of one rank on the page groups in `where`; all its numbers are a hash of its name."""
    value = float(sum(digest.encode()))
    rows: dict[int, list[Tensor]] = {}
    ranks = np.zeros(len(SITES), np.int32)
    for site in SITES:
        if where & 1 << site.group:
            ranks[site.index] = rank
            a, b = torch.full((rank, site.in_features), value), torch.full((rank, site.out_features), -value)
            rows[site.index] = [a, b]
    pages = tuple(-(-rank // PAGE_ROWS) if where & 1 << group else 0 for group in range(4))
    linear = LinearRows.of(row_sites(SITES), ranks, rows)
    return HostAdapter(digest, ranks, np.full(len(SITES), 0.5, np.float32), linear, pages, linear.buffer.nbytes)


def rows_of(adapter: HostAdapter, sites: Sequence[RowSite]) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """Return an adapter's rows; see `LinearRows.parts`."""
    return adapter.rows.parts(sites, adapter.ranks)


class RecordedStream(CopyStream):
    """A stream that copies immediately and records its calls."""

    def __init__(self, on_wait: Callable[[], object]) -> None:
        self.calls: list[str] = []
        self._on_wait = on_wait  # called whenever the stream waits for steps

    def allocate_like(self, tensor: Tensor) -> Tensor:
        self.calls.append("allocate")
        return torch.full_like(tensor, -1.0)

    def wait_for_steps(self) -> None:
        self.calls.append("wait")
        self._on_wait()

    @contextmanager
    def use(self) -> Iterator[None]:
        self.calls.append("use")
        yield

    def copy_(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def synchronize(self) -> None:
        self.calls.append("synchronize")


class Loading:
    """A cache over a pool of a few pages, with an event for the loaders' progress."""

    def __init__(
        self,
        num_pages: int,
        adapters: list[HostAdapter],
        host_bytes: int = 1 << 20,
        merge_timeout_s: float = 60.0,
        stream: CopyStream | None = None,
    ) -> None:
        budget = num_pages * (PAGE_BYTES[0] + PAGE_BYTES[1]) + PAGE_BYTES[2]
        self.weights = PoolWeights(SITES, [], budget, "cpu", stream=stream)
        self.known = {adapter.digest: adapter for adapter in adapters}
        self.reads: list[str] = []
        self.on_read: Callable[[], object] = lambda: None  # called in the reading thread
        self.store_answers = threading.Event()
        self.store_answers.set()
        self.changed = threading.Event()
        self.evicted: list[str] = []
        self.merging: list[str] = []  # merges that have started
        self.merges_go_on = threading.Event()
        self.merges_go_on.set()
        self.cache = AdapterCache(
            self.weights, self._read, host_bytes, merge=self._merge, merge_timeout_s=merge_timeout_s
        )
        self.cache.on_loaded = self.changed.set
        self.cache.on_evicted = self.evicted.append

    def _read(self, digest: str) -> HostAdapter:
        self.reads.append(digest)
        self.on_read()
        assert self.store_answers.wait(timeout=60)
        if digest not in self.known:
            raise NotFound(f"no adapter store has the adapter {digest}")
        return self.known[digest]

    def _merge(self, digest: str, watch: MergeWatch) -> HostAdapter:
        self.merging.append(digest)
        self.changed.set()
        while not self.merges_go_on.wait(timeout=0.001):
            watch.check()
        watch.check()
        return self.known[digest]

    def settle(self, *wanted: str, until: Callable[[], bool], tenant_of: Callable[[str], str] = lambda _: "") -> None:
        """Request adapters as an engine does at every step, until `until` returns true."""
        while True:
            self.changed.clear()
            self.cache.poll()
            self.cache.load(wanted, tenant_of)
            if until():
                return
            assert self.changed.wait(timeout=60)

    def load(self, *wanted: str, until: str) -> None:
        """Request adapters until `until` is resident."""
        while until not in self.cache.resident:
            self.changed.clear()
            assert not self.cache.poll()
            assert not self.cache.load(wanted)
            if until not in self.cache.resident and self.cache.loading:
                assert self.changed.wait(timeout=60)

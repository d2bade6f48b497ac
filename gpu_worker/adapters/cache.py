"""Moves a worker's adapters from the store to host memory and into the pool. Steps see only loaded ones.

Everything here runs in the engine's thread, except the jobs that it starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable

import numpy as np

from gpu_worker.adapters.events import AdapterEvents, LoadTimes
from gpu_worker.adapters.failures import LoadFailures
from gpu_worker.adapters.host import HostTier
from gpu_worker.adapters.jobs import JobEnd, LoadJobs
from gpu_worker.adapters.merges import MergeWatch
from gpu_worker.adapters.packing.packer import HostAdapter
from gpu_worker.adapters.starvation import Starvation
from gpu_worker.adapters.weights import PoolWeights
from gpu_worker.layers.extras import Extras
from peft_adapters.recipe import is_merge
from protocol.wire.errors import AdapterRefused, LorafleetError, Unavailable
from protocol.wire.messages import AdapterEvent
from protocol.wire.tokens import TokenTable

Merge = Callable[[str, MergeWatch], HostAdapter]
"""Fetches, merges and packs the adapters of a merge, by its digest, as long as the watch allows."""

COPY_S = 1e-3
"""Typical seconds of a copy from the host into the pool."""

STAGING_S = 0.1
"""Assumed seconds to bring an adapter to the host, until measured."""


class AdapterCache:
    """The adapters of one worker, in host memory and in the pool. Implements the batcher's `AdapterSlots`."""

    def __init__(
        self,
        weights: PoolWeights,
        read: Callable[[str], HostAdapter],
        host_bytes: int,
        merge: Merge | None = None,
        merge_timeout_s: float = 60.0,
    ) -> None:
        """read: fetches and packs an adapter by digest; runs in a job's thread and may raise LorafleetError.

        host_bytes: budget of host memory. merge: like `read`, for merges; None if there are none. merge_timeout_s:
        maximum seconds of a merge.
        """
        self.weights = weights
        self.pool = weights.new_pool()
        self.pool.cost = self._reload_s
        self.host = HostTier(host_bytes)
        self.slot_ranks = np.zeros(weights.num_slots, np.int64)  # largest rank of the adapter in each slot
        self.extras: dict[str, Extras] = {}  # by digest, extras of resident adapters, on the device
        self.invocations: dict[str, tuple[int, ...]] = {}  # by digest, invocation tokens of resident aLoRA adapters
        self.tokens: dict[str, TokenTable] = {}  # by digest, token tables of resident adapters that bring a tokenizer
        self.on_evicted: Callable[[str], object] | None = None  # called when an adapter leaves the pool
        self.num_loads = 0  # loads into the pool
        self.num_fetches = 0  # fetches to the host
        self.events = AdapterEvents()
        self.load_times = LoadTimes()
        self._read = read
        self._failures = LoadFailures()
        self._merge = merge
        self._jobs = LoadJobs(merge_timeout_s)
        self._starvation = Starvation()
        self._wanted: set[str] = set()  # digests wanted in the last `load`
        self._tenant_of: Callable[[str], str] = lambda _: ""
        self._prefetches: set[str] = set()
        self._staging_s: dict[str, float] = {}  # measured, by digest

    @property
    def on_loaded(self) -> Callable[[], object] | None:
        """Callback, called from a job's thread when `poll` has new results."""
        return self._jobs.on_end

    @on_loaded.setter
    def on_loaded(self, call: Callable[[], object] | None) -> None:
        self._jobs.on_end = call

    def close(self) -> None:
        """Start no more jobs. Does not wait for running ones."""
        self._jobs.close()

    def extend_memory(self) -> bool:
        """Have memory provided for a few more pages of the pool, if they are wanted; return whether it was."""
        # Experts' pages and extras, the pool's last groups, get theirs when they are written.
        pairs = zip(self.weights.ahead, self.pool.num_ever_used, strict=False)
        return any(ahead.extend(num_used) for ahead, num_used in pairs)

    # ------------------------------------------------------------ the batcher's gate

    def acquire(self, digest: str) -> int | None:
        """Add a reference to an adapter and return its slot; None if no new request may use it now."""
        return None if self._starvation.is_draining(digest) else self.pool.acquire(digest)

    def release(self, digest: str) -> None:
        """Drop a reference."""
        self.pool.release(digest)

    def rank(self, digest: str) -> int:
        """Return the largest rank of an adapter, 0 if it is not in the pool."""
        resident = self.pool.residents.get(digest)
        return int(self.slot_ranks[resident.slot]) if resident is not None and resident.visible else 0

    # ------------------------------------------------------------ what is where

    @property
    def loading(self) -> list[str]:
        """Digests that have a running job."""
        return list(self._jobs)

    @property
    def resident(self) -> list[str]:
        """Digests in the pool that steps may use."""
        return [digest for digest, resident in self.pool.residents.items() if resident.visible]

    def is_resident(self, digest: str) -> bool:
        """Return whether steps may use an adapter."""
        resident = self.pool.residents.get(digest)
        return resident is not None and resident.visible

    def tier(self, digest: str) -> str:
        """Return where an adapter is: "resident", "loading", "host" or "store"."""
        if self.is_resident(digest):
            return "resident"
        if digest in self._jobs:
            return "loading"
        return "host" if digest in self.host else "store"

    # ------------------------------------------------------------ loading

    def prefetch(self, digest: str) -> None:
        """Bring an adapter to the host and, if that evicts no other, into the pool.

        A merge is only computed for a waiting request, never ahead of time.
        """
        if digest not in self.pool.residents and (not is_merge(digest) or digest in self.host):
            self._prefetches.add(digest)
            self._advance(digest, self.pool.residents, may_starve=False)

    def load(self, wanted: Iterable[str], tenant_of: Callable[[str], str] = lambda _: "") -> dict[str, LorafleetError]:
        """Start the next loads for waiting requests. Return the adapters that cannot be loaded, with the errors.

        wanted: digests, most urgent first; an adapter evicts none that is more urgent. tenant_of: returns the tenant
        for whom a merge is computed, "" for none.
        """
        self._tenant_of = tenant_of
        failed: dict[str, LorafleetError] = {}
        ahead: dict[str, None] = {}
        for digest in wanted:
            if digest in ahead:
                continue
            if digest not in self.pool.residents:
                error = self._advance(digest, ahead, may_starve=True)
                if error is not None:
                    failed[digest] = error
            ahead[digest] = None
        self._wanted = set(ahead)
        self._jobs.keep_merges(self._wanted)
        self._starvation.keep(self._wanted)
        return failed

    def _advance(self, digest: str, keep: Container[str], *, may_starve: bool) -> LorafleetError | None:
        """Start an adapter's next job on its way to the pool, if possible. Return the error if it can never be loaded.

        keep: adapters that may not be evicted for it. may_starve: whether a lack of space counts toward starvation.
        """
        if digest in self._jobs:
            return None
        adapter = self.host.get(digest)
        if adapter is None:
            if error := self._failures.error(digest, time.monotonic()):
                return error
            if is_merge(digest) and (merge := self._merge) is not None:
                self._jobs.merge(digest, self._tenant_of(digest), lambda watch: merge(digest, watch))
            else:
                self._jobs.start(digest, lambda: (self._read(digest), None), copies=False)
            return None
        if error := self._why_never(adapter):
            return error
        evicted = self.pool.reserve(digest, adapter.num_pages, keep)
        if evicted is None:
            if may_starve:
                self._starvation.note(digest, lambda: self.pool.blockers(adapter.num_pages, keep))
            return None
        for other, num_bytes in evicted.items():
            self._left_pool(other)
            self.events.record(AdapterEvent(kind="evicted", digest=other, pool_bytes=num_bytes))
        self._starvation.end(digest)
        pages = self.pool.residents[digest].pages
        self._jobs.start(digest, lambda: (adapter, self.weights.copy(adapter, pages)), copies=True)
        return None

    def _why_never(self, adapter: HostAdapter) -> LorafleetError | None:
        """Return the error if an adapter cannot fit the pool even after evictions; None if it can."""
        needed, total = self.pool.bytes_of(adapter.num_pages), self.pool.total_bytes
        if not self.pool.can_ever_hold(adapter.num_pages):
            return AdapterRefused([f"it needs {needed} bytes of the adapter pool, which has {total}"])
        if not self.pool.can_hold_beside_pins(adapter.num_pages):
            return Unavailable(f"it needs {needed} bytes of the adapter pool's {total}, and pinned adapters leave less")
        return None

    def _reload_s(self, digest: str) -> float:
        """Return the estimated seconds to reload an evicted adapter into the pool."""
        return COPY_S if digest in self.host else COPY_S + self._staging_s.get(digest, STAGING_S)

    # ------------------------------------------------------------ orders about single adapters

    def set_pinned(self, digest: str, pinned: bool) -> None:
        """Set whether an adapter must stay in the pool once it is there.

        Clears failures, so that it is tried at once.
        """
        self._failures.forget(digest)
        self.pool.set_pinned(digest, pinned)

    def set_queued(self, digests: Iterable[str]) -> None:
        """Set the adapters that requests in the fleet's queue need: they are evicted last."""
        self.pool.queued = frozenset(digests)

    def drop(self, digest: str) -> tuple[int, int] | None:
        """Remove an adapter from pool and host. Return the bytes freed in each; None if it is in use or loading."""
        resident = self.pool.residents.get(digest)
        if digest in self._jobs or (resident is not None and resident.refs):
            return None
        self._prefetches.discard(digest)
        if resident is not None:
            self.pool.remove(digest)
            self._left_pool(digest)
        return resident.num_bytes if resident is not None else 0, self.host.drop(digest)

    def _left_pool(self, digest: str) -> None:
        """Drop the data that is stored for an adapter only while it is in the pool."""
        self.extras.pop(digest, None)
        self.invocations.pop(digest, None)
        self.tokens.pop(digest, None)
        if self.on_evicted is not None:
            self.on_evicted(digest)

    # ------------------------------------------------------------ ends of jobs

    def poll(self) -> dict[str, LorafleetError]:
        """Process the jobs that have ended. Return the adapters that failed, with the errors."""
        failed: dict[str, LorafleetError] = {}
        for end in self._jobs.take_ended():
            if end.adapter is None:
                if end.error is None:  # canceled; `load` restarts it if a request wants it by now
                    continue
                failed[end.digest] = end.error
                self._take_failure(end, end.error)
            elif end.copied:
                self._take_copy(end, end.adapter)
            elif error := self._take_staged(end, end.adapter):
                failed[end.digest] = error
        return failed

    def _take_failure(self, end: JobEnd, error: LorafleetError) -> None:
        self._failures.note(end.digest, error, time.monotonic())
        self.events.record(AdapterEvent(kind="failed", digest=end.digest))
        self._prefetches.discard(end.digest)
        if end.copied:
            self.pool.remove(end.digest)

    def _take_copy(self, end: JobEnd, adapter: HostAdapter) -> None:
        """Make an adapter that was copied into the pool available to steps."""
        resident = self.pool.residents[end.digest]
        if end.extras:
            self.extras[end.digest] = end.extras
        if adapter.invocation:
            self.invocations[end.digest] = adapter.invocation
        if adapter.tokens is not None:
            self.tokens[end.digest] = adapter.tokens
        self.weights.publish(resident.slot, adapter, resident.pages)
        self.slot_ranks[resident.slot] = adapter.ranks.max()
        self.pool.publish(end.digest)
        self.num_loads += 1
        self.load_times.note("host", end.seconds)
        ms, num_bytes = 1000 * end.seconds, resident.num_bytes
        self.events.record(AdapterEvent(kind="resident", digest=end.digest, ms=ms, pool_bytes=num_bytes))

    def _take_staged(self, end: JobEnd, adapter: HostAdapter) -> LorafleetError | None:
        """Store an adapter in host memory and, if it was prefetched, start its copy into the pool.

        Return the error if no pool state could ever hold it: it is not kept, and the next request must not fetch it
        again.
        """
        self.num_fetches += 1
        self.load_times.note("store", end.seconds)
        error = self._why_never(adapter)
        if isinstance(error, AdapterRefused):
            self._take_failure(end, error)
            return error
        self._failures.forget(end.digest)
        self._staging_s[end.digest] = end.seconds
        dropped = self.host.put(adapter, self._wanted)
        ms, num_bytes = 1000 * end.seconds, adapter.num_bytes
        self.events.record(AdapterEvent(kind="staged", digest=end.digest, ms=ms, host_bytes=num_bytes))
        for other, freed in dropped.items():
            self.events.record(AdapterEvent(kind="evicted", digest=other, host_bytes=freed))
        if end.digest in self._prefetches:
            self._prefetches.discard(end.digest)
            self._advance(end.digest, self.pool.residents, may_starve=False)
        return None

"""Adapters on their way: store → host memory → pool. Loading happens in threads; a step only sees what has arrived.

Everything here but `_run_job` and what it calls runs in the engine's thread.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from gpu_worker.adapters.extras import Extras
from gpu_worker.adapters.failures import Failures
from gpu_worker.adapters.news import News
from gpu_worker.adapters.packing import HostAdapter
from gpu_worker.adapters.priority import step_back
from gpu_worker.adapters.weights import PoolWeights
from protocol.wire.errors import AdapterRefused, Internal, LorafleetError, Unavailable
from protocol.wire.messages import AdapterEvent

logger = logging.getLogger(__name__)

NUM_STAGERS = 16
"""Adapters on their way to the host at once. Copies into the pool have their own thread: no slow store stops them."""

MAX_STARVED_LOADS = 64
"""Times an adapter may find no room before those in its way get no new requests until it has been loaded."""


class HostTier:
    """Packed adapters in host memory, least recently used first, within a budget of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._adapters: OrderedDict[str, HostAdapter] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def get(self, digest: str) -> HostAdapter | None:
        adapter = self._adapters.get(digest)
        if adapter is not None:
            self._adapters.move_to_end(digest)
        return adapter

    def put(self, adapter: HostAdapter, keep: Container[str]) -> dict[str, int]:
        """Keep an adapter and drop the least recently used ones for it, but none in `keep`, even over the budget.

        Returns the bytes of each that was dropped.
        """
        self.drop(adapter.digest)
        self._adapters[adapter.digest] = adapter
        self.num_bytes += adapter.num_bytes
        dropped: dict[str, int] = {}
        for digest in list(self._adapters):
            if self.num_bytes <= self.max_bytes:
                break
            if digest != adapter.digest and digest not in keep:
                dropped[digest] = self.drop(digest)
        return dropped

    def drop(self, digest: str) -> int:
        """Forget an adapter; returns the bytes freed."""
        adapter = self._adapters.pop(digest, None)
        if adapter is None:
            return 0
        self.num_bytes -= adapter.num_bytes
        return adapter.num_bytes


@dataclass(frozen=True, slots=True)
class _Done:
    """The end of a loader job."""

    digest: str
    adapter: HostAdapter | None  # None: it failed
    error: LorafleetError | None
    copied: bool  # into the pool, not only to the host
    seconds: float
    extras: Extras | None = None  # on the device, of one that was copied


Job = Callable[[], tuple[HostAdapter, Extras | None]]
"""What a loader thread does: an adapter, and its extras on the device if it was copied there."""


class AdapterCache:
    """The adapters of one worker in all tiers. Implements the batcher's `AdapterGate`."""

    def __init__(self, weights: PoolWeights, read: Callable[[str], HostAdapter], host_bytes: int) -> None:
        """`read` fetches and packs an adapter by digest; it runs in a loader thread and may raise LorafleetError."""
        self.weights = weights
        self.pool = weights.new_pool()
        self.pool.cost = self._reload_s
        self.host = HostTier(host_bytes)
        self.slot_ranks = np.zeros(weights.num_slots, np.int64)  # largest rank of the adapter in each slot
        self.extras: dict[str, Extras] = {}  # of the adapters in the pool that have any, on the device
        self.invocations: dict[str, tuple[int, ...]] = {}  # of the activated LoRA in the pool
        self.tokenizers: dict[str, Tokenizer] = {}  # of the adapters in the pool that bring their own
        self.on_loaded: Callable[[], object] = _ignore  # called from a loader thread when `poll` has news
        self.on_evicted: Callable[[str], object] = _ignore  # called when an adapter leaves the pool
        self.num_loads = 0  # into the pool
        self.num_fetches = 0  # to the host
        self.news = News()
        self._read = read
        self._failures = Failures()
        self._jobs: dict[str, bool] = {}  # digest -> its job copies into the pool
        self._done: queue.SimpleQueue[_Done] = queue.SimpleQueue()
        self._wanted: set[str] = set()  # of the last `load`
        self._prefetches: set[str] = set()
        self._seconds: dict[str, float] = {}  # measured: staging of an adapter
        self._starved: dict[str, int] = {}  # digest -> loads that found no room
        self._draining: set[str] = set()  # in the way of a starved one: no new requests
        self._stagers = ThreadPoolExecutor(NUM_STAGERS, thread_name_prefix="stager", initializer=step_back)
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="copier", initializer=step_back)

    def close(self) -> None:
        """Start nothing more; does not wait for what runs."""
        self._stagers.shutdown(wait=False, cancel_futures=True)
        self._copier.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------ the batcher's gate

    def acquire(self, digest: str) -> int | None:
        return None if digest in self._draining else self.pool.acquire(digest)

    def release(self, digest: str) -> None:
        self.pool.release(digest)

    # ------------------------------------------------------------ loading

    @property
    def loading(self) -> list[str]:
        return list(self._jobs)

    @property
    def resident(self) -> list[str]:
        return [digest for digest, resident in self.pool.residents.items() if resident.visible]

    def is_resident(self, digest: str) -> bool:
        resident = self.pool.residents.get(digest)
        return resident is not None and resident.visible

    def prefetch(self, digest: str) -> None:
        """Bring an adapter to the host and, if there is room without sending another away, into the pool."""
        if digest not in self.pool.residents:
            self._prefetches.add(digest)
            self._advance(digest, self.pool.residents)

    def load(self, wanted: Iterable[str]) -> dict[str, LorafleetError]:
        """Start what waiting requests need next. Returns the adapters that cannot be loaded.

        wanted: digests, most urgent first. An adapter never pushes out one that is wanted more.
        """
        failed: dict[str, LorafleetError] = {}
        ahead: dict[str, None] = {}
        for digest in wanted:
            if digest in ahead:
                continue
            if digest not in self.pool.residents:
                error = self._advance(digest, ahead)
                if error is not None:
                    failed[digest] = error
            ahead[digest] = None
        self._wanted = set(ahead)
        for digest in self._starved.keys() - self._wanted:
            self._end_starving(digest)
        return failed

    def _advance(self, digest: str, keep: Container[str]) -> LorafleetError | None:
        """Start an adapter's next step towards the pool, if one can be started."""
        if digest in self._jobs:
            return None
        adapter = self.host.get(digest)
        if adapter is None:
            if error := self._failures.error(digest, time.monotonic()):
                return error
            self._start(digest, copies=False, job=lambda: (self._read(digest), None))
            return None
        if error := self._why_never(adapter):
            return error
        evicted = self.pool.reserve(digest, adapter.num_pages, keep)
        if evicted is None:
            if keep is not self.pool.residents:
                self._starve(digest, adapter, keep)
            return None
        for other, num_bytes in evicted.items():
            self._forget(other)
            self.news.tell(AdapterEvent(kind="evicted", digest=other, pool_bytes=num_bytes))
        self._end_starving(digest)
        pages = self.pool.residents[digest].pages
        self._start(digest, copies=True, job=lambda: (adapter, self.weights.copy(adapter, pages)))
        return None

    def _why_never(self, adapter: HostAdapter) -> LorafleetError | None:
        """Return why no adapter leaving would make room."""
        needed, total = self.pool.bytes_of(adapter.num_pages), self.pool.total_bytes
        if not self.pool.can_ever_hold(adapter.num_pages):
            return AdapterRefused([f"it needs {needed} bytes of the adapter pool, whose groups share {total}"])
        if not self.pool.can_hold_beside_pins(adapter.num_pages):
            return Unavailable(f"it needs {needed} bytes of the adapter pool's {total}, and pinned adapters leave less")
        return None

    def _forget(self, digest: str) -> None:
        """Drop what goes with a place in the pool."""
        self.extras.pop(digest, None)
        self.invocations.pop(digest, None)
        self.tokenizers.pop(digest, None)
        self.on_evicted(digest)

    def set_pinned(self, digest: str, pinned: bool) -> None:
        """Say whether an adapter, once in the pool, may leave it. Who pins one wants it tried now."""
        self._failures.forget(digest)
        self.pool.set_pinned(digest, pinned)

    def set_queued(self, digests: Iterable[str]) -> None:
        """Say which adapters the fleet's queue holds requests for: of those in the pool they leave last."""
        self.pool.queued = frozenset(digests)

    def drop(self, digest: str) -> tuple[int, int] | None:
        """Send an adapter away from pool and host; returns the bytes freed in each. None while it is used or comes."""
        resident = self.pool.residents.get(digest)
        if digest in self._jobs or (resident is not None and resident.refs):
            return None
        self._prefetches.discard(digest)
        if resident is not None:
            self.pool.remove(digest)
            self._forget(digest)
        return resident.num_bytes if resident is not None else 0, self.host.drop(digest)

    def _start(self, digest: str, *, copies: bool, job: Job) -> None:
        self._jobs[digest] = copies
        (self._copier if copies else self._stagers).submit(self._run_job, digest, copies, job)

    def _starve(self, digest: str, adapter: HostAdapter, keep: Container[str]) -> None:
        self._starved[digest] = self._starved.get(digest, 0) + 1
        if self._starved[digest] > MAX_STARVED_LOADS and not self._draining:
            self._draining = set(self.pool.blockers(adapter.num_pages, keep))

    def _end_starving(self, digest: str) -> None:
        if self._starved.pop(digest, None) is not None and not self._starved:
            self._draining = set()

    def poll(self) -> dict[str, LorafleetError]:
        """Take in what the loaders have finished. Returns the adapters that failed."""
        failed: dict[str, LorafleetError] = {}
        while not self._done.empty():
            done = self._done.get()
            del self._jobs[done.digest]
            if done.adapter is None:
                assert done.error is not None
                failed[done.digest] = done.error
                self._failures.note(done.digest, done.error, time.monotonic())
                self.news.tell(AdapterEvent(kind="failed", digest=done.digest))
                self._prefetches.discard(done.digest)
                if done.copied:
                    self.pool.remove(done.digest)
            elif done.copied:
                resident = self.pool.residents[done.digest]
                if done.extras:
                    self.extras[done.digest] = done.extras
                if done.adapter.invocation:
                    self.invocations[done.digest] = done.adapter.invocation
                if done.adapter.tokenizer is not None:
                    self.tokenizers[done.digest] = done.adapter.tokenizer
                self.weights.publish(resident.slot, done.adapter, resident.pages)
                self.slot_ranks[resident.slot] = done.adapter.ranks.max()
                self.pool.publish(done.digest)
                self.num_loads += 1
                ms = 1000 * done.seconds
                self.news.tell(AdapterEvent(kind="resident", digest=done.digest, ms=ms, pool_bytes=resident.num_bytes))
            else:
                self.num_fetches += 1
                self._failures.forget(done.digest)
                self._seconds[done.digest] = done.seconds
                dropped = self.host.put(done.adapter, self._wanted)
                ms, num_bytes = 1000 * done.seconds, done.adapter.num_bytes
                self.news.tell(AdapterEvent(kind="staged", digest=done.digest, ms=ms, host_bytes=num_bytes))
                for other, freed in dropped.items():
                    self.news.tell(AdapterEvent(kind="evicted", digest=other, host_bytes=freed))
                if done.digest in self._prefetches:
                    self._prefetches.discard(done.digest)
                    self._advance(done.digest, self.pool.residents)
        return failed

    def _reload_s(self, digest: str) -> float:
        """Return the seconds it would take to bring an adapter back from where it would fall to."""
        copy_s = 1e-3
        return copy_s if digest in self.host else copy_s + self._seconds.get(digest, 0.1)

    # ------------------------------------------------------------ in the loaders' threads

    def _run_job(self, digest: str, copies: bool, job: Job) -> None:
        started = time.perf_counter()
        adapter: HostAdapter | None = None
        extras: Extras | None = None
        error: LorafleetError | None = None
        try:
            adapter, extras = job()
        except LorafleetError as known:
            error = known
        except Exception:  # a loader's edge: the adapter's requests must hear of it
            logger.exception("loading adapter %.12s failed", digest)
            error = Internal(f"loading adapter {digest:.12} failed")
        self._done.put(_Done(digest, adapter, error, copies, time.perf_counter() - started, extras))
        self.on_loaded()


def _ignore(*_: object) -> None:
    """Nobody wants to know."""

"""Threads that bring adapters to the host and copy them into the pool, while the engine's thread computes steps.

Merges have threads of their own (`merges.py`).
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from gpu_worker.adapters.merges import GivenUp, MergeJob, Merges
from gpu_worker.adapters.packing.packer import HostAdapter
from gpu_worker.adapters.priority import lower_priority
from gpu_worker.layers.extras import Extras
from protocol.wire.errors import Internal, LorafleetError

logger = logging.getLogger(__name__)

NUM_STAGERS = 16
"""Adapters on their way to the host at once. Copies into the pool have a thread of their own, which no store delays."""

Job = Callable[[], tuple[HostAdapter, Extras | None]]
"""What a thread does. Returns the adapter and, if it was copied into the pool, its extras on the device."""


@dataclass(frozen=True, slots=True)
class JobEnd:
    """How a job ended."""

    digest: str
    adapter: HostAdapter | None  # None: it failed, or was given up
    error: LorafleetError | None  # None, without an adapter: it was given up
    copied: bool  # whether it copied, or tried to copy, into the pool, not to the host
    seconds: float
    extras: Extras | None = None  # extras of a copied adapter, on the device


class LoadJobs:
    """At most one job for each adapter. All methods but those of the threads are for the engine's thread."""

    def __init__(self, merge_timeout_s: float = 60.0) -> None:
        """merge_timeout_s: the longest that a merge may take."""
        self.on_end: Callable[[], object] | None = None  # called from a job's thread once `take_ended` gives its end
        self._running: dict[str, bool] = {}  # digest -> whether the job copies; merges are in `_merges`
        self._merges = Merges(merge_timeout_s)
        self._ended: queue.SimpleQueue[JobEnd] = queue.SimpleQueue()
        self._stagers = ThreadPoolExecutor(NUM_STAGERS, thread_name_prefix="stager", initializer=lower_priority)
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="copier", initializer=lower_priority)

    def __contains__(self, digest: str) -> bool:
        return digest in self._running or digest in self._merges

    def __iter__(self) -> Iterator[str]:
        yield from self._running
        yield from self._merges

    def start(self, digest: str, job: Job, *, copies: bool) -> None:
        """Run a job in a thread. copies: into the pool, not to the host."""
        self._running[digest] = copies
        (self._copier if copies else self._stagers).submit(self._run, digest, copies, job)

    def merge(self, digest: str, tenant: str, job: MergeJob) -> None:
        """Merge adapters, one after another of each tenant, when a thread for merges is free."""
        self._merges.start(digest, tenant, job, lambda digest, work: self._run(digest, False, lambda: (work(), None)))

    def keep_merges(self, wanted: Container[str]) -> None:
        """Give up the merges that are not wanted."""
        self._merges.keep(wanted)

    def take_ended(self) -> Iterator[JobEnd]:
        """Yield the jobs that have ended since the last call. Each adapter may have another job then."""
        while not self._ended.empty():
            end = self._ended.get()
            if end.digest in self._merges:
                self._merges.end(end.digest)
            else:
                del self._running[end.digest]
            yield end

    def close(self) -> None:
        """Start nothing more. Does not wait for the jobs that run."""
        self._merges.close()
        self._stagers.shutdown(wait=False, cancel_futures=True)
        self._copier.shutdown(wait=False, cancel_futures=True)

    def _run(self, digest: str, copies: bool, job: Job) -> None:
        started = time.perf_counter()
        adapter: HostAdapter | None = None
        extras: Extras | None = None
        error: LorafleetError | None = None
        try:
            adapter, extras = job()
        except LorafleetError as known:
            error = known
        except GivenUp:
            logger.info("merge %.40s is cancelled: no request waits for it", digest)
        except BaseException:  # a thread's edge, also for panics of libraries in Rust: the requests must hear of it
            logger.exception("loading adapter %.12s failed", digest)
            error = Internal(f"loading adapter {digest:.12} failed")
        self._ended.put(JobEnd(digest, adapter, error, copies, time.perf_counter() - started, extras))
        if self.on_end is not None:
            self.on_end()

"""Threads that bring adapters to the host and copy them into the pool while the engine's thread computes steps.

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
"""Maximum concurrent loads to the host. Copies into the pool have a thread of their own, which no store delays."""

Job = Callable[[], tuple[HostAdapter, Extras | None]]
"""The work of a thread. Returns the adapter and, if it was copied into the pool, its extras on the device."""


@dataclass(frozen=True, slots=True)
class JobEnd:
    """The result of a job."""

    digest: str
    adapter: HostAdapter | None  # None: it failed or was canceled
    error: LorafleetError | None  # None, without an adapter: it was canceled
    copied: bool  # whether it copied, or tried to copy, into the pool, rather than to the host
    seconds: float
    extras: Extras | None = None  # extras of a copied adapter, on the device


class LoadJobs:
    """At most one job per adapter. All methods except those of the threads are for the engine's thread."""

    def __init__(self, merge_timeout_s: float = 60.0) -> None:
        """merge_timeout_s: maximum seconds of a merge."""
        self.on_end: Callable[[], object] | None = None  # called from a job's thread once `take_ended` can give its end
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
        """Run a job in a thread. copies: whether it copies into the pool, rather than to the host."""
        self._running[digest] = copies
        (self._copier if copies else self._stagers).submit(self._run, digest, copies, job)

    def merge(self, digest: str, tenant: str, job: MergeJob) -> None:
        """Run a merge when a merge thread is free; the merges of one tenant run one after another."""
        self._merges.start(digest, tenant, job, lambda digest, work: self._run(digest, False, lambda: (work(), None)))

    def keep_merges(self, wanted: Container[str]) -> None:
        """Cancel the merges that are not wanted."""
        self._merges.keep(wanted)

    def take_ended(self) -> Iterator[JobEnd]:
        """Yield the jobs that have ended since the last call. Their adapters may be given another job."""
        while not self._ended.empty():
            end = self._ended.get()
            if end.digest in self._merges:
                self._merges.end(end.digest)
            else:
                del self._running[end.digest]
            yield end

    def close(self) -> None:
        """Start no more jobs. Does not wait for running ones."""
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
        except BaseException:  # a thread's top level, also for panics in Rust: the requests must get the error
            logger.exception("loading adapter %.12s failed", digest)
            error = Internal(f"loading adapter {digest:.12} failed")
        self._ended.put(JobEnd(digest, adapter, error, copies, time.perf_counter() - started, extras))
        if self.on_end is not None:
            self.on_end()

"""Merges of adapters, in threads of their own, so that fetches do not wait for them.

A merge may keep all cores busy for minutes. So few run at once, one per tenant. A merge that no request waits for is
canceled, and one that takes too long is refused.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from gpu_worker.adapters.packing.packer import HostAdapter
from gpu_worker.adapters.priority import lower_priority
from protocol.wire.errors import AdapterRefused

NUM_MERGERS = 2
"""Maximum concurrent merges."""

NUM_PER_TENANT = 1
"""Maximum concurrent merges of one tenant; unlimited without tenants."""


class GivenUp(Exception):
    """A merge was canceled, because no request waits for it."""


class MergeWatch:
    """The cancellation token of a running merge. `check` is for its thread, `give_up` for any thread."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._given_up = threading.Event()
        self._began_s = time.monotonic()

    @property
    def left_s(self) -> float:
        """Seconds that remain for the merge."""
        return self._began_s + self.timeout_s - time.monotonic()

    def give_up(self) -> None:
        """Make the next `check` end the merge."""
        self._given_up.set()

    def check(self, needed_s: float = 0.0) -> None:
        """Raise GivenUp if no request waits for the merge, AdapterRefused if less than `needed_s` remains."""
        if self._given_up.is_set():
            raise GivenUp
        if needed_s > self.left_s:
            raise AdapterRefused(
                [
                    f"merging takes this worker more than {self.timeout_s:g} s (merge_timeout_s): take fewer or smaller"
                    " adapters, or merge_strategy linear, cat or svd, which need no whole matrices"
                ]
            )


MergeJob = Callable[[MergeWatch], HostAdapter]
"""Merges adapters. Calls `MergeWatch.check` regularly."""


@dataclass(slots=True)
class _Merge:
    digest: str
    tenant: str
    job: MergeJob
    run: Callable[[str, Callable[[], HostAdapter]], None]
    watch: MergeWatch | None = None  # None: it waits for a thread


@dataclass(slots=True)
class Merges:
    """The waiting and running merges of one worker. For the engine's thread only."""

    timeout_s: float
    _merges: dict[str, _Merge] = field(default_factory=dict[str, _Merge])  # by digest, in order of arrival
    _pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(NUM_MERGERS, "merger", initializer=lower_priority)
    )

    def __contains__(self, digest: str) -> bool:
        return digest in self._merges

    def __iter__(self) -> Iterator[str]:
        return iter(self._merges)

    def start(
        self, digest: str, tenant: str, job: MergeJob, run: Callable[[str, Callable[[], HostAdapter]], None]
    ) -> None:
        """Run a merge once a thread is free and its tenant's earlier merges have ended.

        run: called in the merge's thread with the digest and the function that computes the merge; that function raises
        the errors of `MergeWatch.check`.
        """
        self._merges[digest] = _Merge(digest, tenant, job, run)
        self._fill()

    def end(self, digest: str) -> None:
        """Forget a merge whose thread has finished."""
        del self._merges[digest]
        self._fill()

    def keep(self, wanted: Container[str]) -> None:
        """Cancel the merges that are not wanted: waiting ones at once, running ones at their next check."""
        for merge in [merge for digest, merge in self._merges.items() if digest not in wanted]:
            if merge.watch is None:
                del self._merges[merge.digest]
            else:
                merge.watch.give_up()

    def close(self) -> None:
        """Start no more merges, and cancel those that run."""
        self.keep(())
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _fill(self) -> None:
        """Start merges while threads are free, oldest first, skipping tenants that have a running one."""
        running = [merge for merge in self._merges.values() if merge.watch is not None]
        for merge in list(self._merges.values()):
            if len(running) >= NUM_MERGERS:
                return
            held = sum(other.tenant == merge.tenant for other in running)
            if merge.watch is None and (not merge.tenant or held < NUM_PER_TENANT):
                running.append(merge)
                merge.watch = watch = MergeWatch(self.timeout_s)
                self._pool.submit(merge.run, merge.digest, lambda merge=merge, watch=watch: merge.job(watch))

"""The common part of all engines: loading adapters, pending outputs, measuring steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import copy
from typing import Any

from gpu_worker.adapters.cache import AdapterCache
from gpu_worker.adapters.residency import Residency
from gpu_worker.engine.step_model import StepMeter
from gpu_worker.engine.timelines import Timelines
from gpu_worker.host_memory import give_back_freed, let_go_of_libraries
from gpu_worker.planning.request import EngineRequest, TokenOutput
from protocol.wire import messages as m
from protocol.wire.errors import LorafleetError


class BaseEngine(ABC):
    """Requests in, one `step` at a time, outputs out. Used by one thread, but for what `wake_with` says."""

    def __init__(self, adapters: AdapterCache) -> None:
        self.adapters = adapters
        self.residency = Residency(adapters)
        self.meter = StepMeter()
        self.counters = self.meter.counters
        self.timelines = Timelines()
        self.can_step = False  # whether the next step may do something without a new request or adapter
        self._outputs: list[TokenOutput] = []  # emitted at the end of the next step
        adapters.on_evicted = self._on_evicted

    @property
    def has_work(self) -> bool:
        """Whether any request is held or any output is pending."""
        return bool(self._held() or self._outputs)

    @abstractmethod
    def add(self, request: EngineRequest) -> None:
        """Take a request. Its errors are emitted by the next step.

        A newer epoch of a request replaces an older one; one that was delivered twice is ignored.
        """

    @abstractmethod
    def step(self) -> list[TokenOutput]:
        """Compute one batch. Returns the outputs of requests that got a token or ended."""

    @abstractmethod
    def stats(self) -> m.WorkerBeat:
        """Return the engine's figures as they are now: a heartbeat without what only the service knows."""

    def finish_start(self) -> None:
        """Make what the fleet need not wait for, and give back the memory that starting took. May be called again."""
        give_back_freed()
        let_go_of_libraries()

    def cancel(self, rid: str) -> None:
        """Forget a request; no more output is emitted for it."""
        self._outputs = [output for output in self._outputs if output.rid != rid]
        self._drop(rid)
        self.timelines.forget(rid)

    def hand_over(self) -> list[str]:
        """Forget all requests; returns their ids."""
        rids = list(self._held())
        for rid in rids:
            self._drop(rid)
        self.timelines.clear()
        self._outputs = []
        return rids

    def prefetch(self, digest: str) -> None:
        """Bring an adapter towards the pool, for a request that will come."""
        self.adapters.prefetch(digest)

    def wake_with(self, wake: Callable[[], object]) -> None:
        """Set `wake`, called from any thread when new input lets a step proceed."""
        self.adapters.on_loaded = wake

    def close(self) -> None:
        """Start nothing more in other threads."""
        self.adapters.close()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page and reference of the adapter pool is accounted for."""
        self.adapters.pool.check_integrity()

    # ------------------------------------------------------------ for engines

    @abstractmethod
    def _held(self) -> Collection[str]:
        """Return the ids of all requests, a view."""

    @abstractmethod
    def _drop(self, rid: str) -> None:
        """Forget a request, if it is held, and free its memory."""

    @abstractmethod
    def _waiting(self) -> Iterable[EngineRequest]:
        """Yield the requests that wait to be run."""

    @abstractmethod
    def _fail_waiting(self, rid: str, error: LorafleetError) -> None:
        """End a request that waits with an error."""

    def _note_taken(self, request: EngineRequest) -> None:
        """Start a request's times, and report it to the fleet if it is for an adapter."""
        tier = self.adapters.tier(request.digest) if request.digest else ""
        self.timelines.take(request, tier)
        if request.digest:
            self.adapters.events.record_use(request.digest, resident=tier == "resident")

    def _collect_adapters(self) -> None:
        """Take the adapters that have been loaded since the last step; end the requests for those that cannot be."""
        self._fail_requests_for(self.adapters.poll())
        self.timelines.look(self.adapters.is_resident, self.adapters.host)

    def _request_adapters(self) -> None:
        """Load what waiting requests and pins need. Call it after the batch is chosen: none of its adapters may go."""
        wanted = self._wanted_adapters()
        self._fail_requests_for(self.adapters.load([*wanted, *self.residency.wanted()], self._tenant_of))
        self.residency.settle(wanted)

    def _tenant_of(self, digest: str) -> str:
        """Return the tenant that waits for an adapter first, "" if none does or there are no tenants."""
        return next((request.salt for request in self._waiting() if request.digest == digest), "")

    def _wanted_adapters(self) -> list[str]:
        return [request.digest for request in self._waiting() if request.digest]

    def _fail_requests_for(self, failed: Mapping[str, LorafleetError]) -> None:
        """End the requests that wait for adapters, by digest, that cannot be loaded."""
        if not failed:
            return
        self.residency.note(failed)
        for request in list(self._waiting()):
            if request.digest in failed:
                self._fail_waiting(request.rid, failed[request.digest])

    def _sum_ranks(self, slots: Iterable[int]) -> int:
        """Return the sum of ranks of the distinct adapters in `slots`; -1 is none."""
        held = [slot for slot in set(slots) if slot >= 0]
        return int(self.adapters.slot_ranks[held].sum()) if held else 0

    def _stats(self, **own: Any) -> m.WorkerBeat:
        """Return the figures that all engines have, and an engine's `own`."""
        return m.WorkerBeat(
            wid="",
            name="",
            step_model=self.meter.model,
            counters=copy(self.counters),
            **self.residency.figures(self._wanted_adapters()),
            **own,
        )

    def _put_out(self) -> list[TokenOutput]:
        """Return all outputs that wait."""
        outputs, self._outputs = self._outputs, []
        self.timelines.tell(outputs)
        return outputs

    def _on_evicted(self, digest: str) -> None:
        """Count an adapter that has left the pool."""
        self.counters.num_evictions += 1

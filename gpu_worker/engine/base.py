"""The common base of all engines: loads adapters, keeps pending outputs, measures steps."""

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
    """Takes requests, computes one `step` at a time and emits outputs.

    Used by one thread, except `wake_with`'s callback.
    """

    def __init__(self, adapters: AdapterCache) -> None:
        self.adapters = adapters
        self.residency = Residency(adapters)
        self.meter = StepMeter()
        self.counters = self.meter.counters
        self.timelines = Timelines()
        self.can_step = False  # whether the next step can make progress without a new request or adapter
        self._outputs: list[TokenOutput] = []  # emitted at the end of the next step
        adapters.on_evicted = self._on_evicted

    @property
    def has_work(self) -> bool:
        """Whether any request is held or any output is pending."""
        return bool(self._held() or self._outputs)

    @abstractmethod
    def add(self, request: EngineRequest) -> None:
        """Accept a request. Its errors are emitted by the next step.

        A newer epoch of a request replaces an older one; a duplicate delivery is ignored.
        """

    @abstractmethod
    def step(self) -> list[TokenOutput]:
        """Compute one batch. Return the outputs of requests that received a token or ended."""

    @abstractmethod
    def stats(self) -> m.WorkerBeat:
        """Return the engine's current figures: a heartbeat without the fields that only the service knows."""

    def finish_start(self) -> None:
        """Do the start-up work that the fleet need not wait for, and release memory that start-up took. Idempotent."""
        give_back_freed()
        let_go_of_libraries()

    def extend_memory(self) -> bool:
        """Have a little memory of a cache provided ahead of use, if it is wanted; return whether it was.

        It takes some ms at most. Called while there is no work.
        """
        return self.adapters.extend_memory()

    def cancel(self, rid: str) -> None:
        """Forget a request; no more output is emitted for it."""
        self._outputs = [output for output in self._outputs if output.rid != rid]
        self._drop(rid)
        self.timelines.forget(rid)

    def hand_over(self) -> list[str]:
        """Forget all requests; return their ids."""
        rids = list(self._held())
        for rid in rids:
            self._drop(rid)
        self.timelines.clear()
        self._outputs = []
        return rids

    def prefetch(self, digest: str) -> None:
        """Load an adapter ahead of time, for a request that is about to come."""
        self.adapters.prefetch(digest)

    def wake_with(self, wake: Callable[[], object]) -> None:
        """Set the callback that is called, from any thread, when new input lets a step proceed."""
        self.adapters.on_loaded = wake

    def close(self) -> None:
        """Start no more work in other threads."""
        self.adapters.close()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page and reference of the adapter pool is accounted for."""
        self.adapters.pool.check_integrity()

    # ------------------------------------------------------------ for engines

    @abstractmethod
    def _held(self) -> Collection[str]:
        """Return a view of the ids of all requests."""

    @abstractmethod
    def _drop(self, rid: str) -> None:
        """Forget a request and free its memory; do nothing if it is not held."""

    @abstractmethod
    def _waiting(self) -> Iterable[EngineRequest]:
        """Yield the requests that are not running yet."""

    @abstractmethod
    def _fail_waiting(self, rid: str, error: LorafleetError) -> None:
        """End a waiting request with an error."""

    def _note_taken(self, request: EngineRequest) -> None:
        """Start a request's timeline, and report the use of its adapter, if any, to the fleet."""
        tier = self.adapters.tier(request.digest) if request.digest else ""
        self.timelines.take(request, tier)
        if request.digest:
            self.adapters.events.record_use(request.digest, resident=tier == "resident")

    def _collect_adapters(self) -> None:
        """Take the adapters loaded since the last step, and end the requests whose adapters failed to load."""
        self._fail_requests_for(self.adapters.poll())
        self.timelines.look(self.adapters.is_resident, self.adapters.host)

    def _request_adapters(self) -> None:
        """Load the adapters that waiting requests and pins need.

        Call this after the batch is chosen, so that none of the batch's adapters is evicted.
        """
        wanted = self._wanted_adapters()
        self._fail_requests_for(self.adapters.load([*wanted, *self.residency.wanted()], self._tenant_of))
        self.residency.settle(wanted)

    def _tenant_of(self, digest: str) -> str:
        """Return the tenant of the first request that waits for an adapter, "" without such a request or tenant."""
        return next((request.salt for request in self._waiting() if request.digest == digest), "")

    def _wanted_adapters(self) -> list[str]:
        return [request.digest for request in self._waiting() if request.digest]

    def _fail_requests_for(self, failed: Mapping[str, LorafleetError]) -> None:
        """End the requests that wait for adapters that failed to load. failed: the error by digest."""
        if not failed:
            return
        self.residency.note(failed)
        for request in list(self._waiting()):
            if request.digest in failed:
                self._fail_waiting(request.rid, failed[request.digest])

    def _sum_ranks(self, slots: Iterable[int]) -> int:
        """Return the sum of the ranks of the distinct adapters in `slots`; -1 means no adapter."""
        held = [slot for slot in set(slots) if slot >= 0]
        return int(self.adapters.slot_ranks[held].sum()) if held else 0

    def _stats(self, **own: Any) -> m.WorkerBeat:
        """Return the figures common to all engines together with an engine's `own`."""
        return m.WorkerBeat(
            wid="",
            name="",
            step_model=self.meter.model,
            counters=copy(self.counters),
            **self.residency.figures(self._wanted_adapters()),
            **own,
        )

    def _put_out(self) -> list[TokenOutput]:
        """Return all pending outputs and clear them."""
        outputs, self._outputs = self._outputs, []
        self.timelines.tell(outputs)
        return outputs

    def _on_evicted(self, digest: str) -> None:
        """Count the eviction of an adapter from the pool."""
        self.counters.num_evictions += 1

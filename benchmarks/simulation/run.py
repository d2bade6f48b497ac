"""Runs a trace through a policy and workers in virtual time, and summarizes the result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from heapq import heappop, heappush

import msgspec

from benchmarks.simulation.policies import Dispatcher
from benchmarks.simulation.worker import SimulatedRequest, SimWorker, WorkerModel
from protocol.wire import messages as m
from scheduler.placement import AdapterFacts

BEATS_MS = 500.0
"""Interval in ms at which the scheduler reads heartbeats, and so learns which adapters are resident."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    at_ms: float
    submit: m.RequestHead
    num_output_tokens: int


@dataclass(slots=True)
class SimulationResult:
    """The requests of a run, and its totals. Times are in ms of virtual time."""

    requests: list[SimulatedRequest] = field(default_factory=list[SimulatedRequest])
    end_ms: float = 0.0
    num_loads: int = 0  # adapters copied into pools
    num_fetches: int = 0  # adapters fetched from the store
    num_fetched_before: int = 0  # adapters fetched before a worker began to drain
    busy: float = 0.0  # mean share of the time in which workers computed

    @property
    def output_tokens_per_s(self) -> float:
        """Output tokens of all requests per second of the whole run."""
        return 1000 * sum(request.num_output_tokens for request in self.requests) / max(self.end_ms, 1e-9)

    def first_token_ms(
        self, percentile: float, keep: Callable[[SimulatedRequest], bool] = lambda request: True
    ) -> float:
        """Return a percentile, in [0, 1], of the times to first token in ms of the requests that `keep` accepts."""
        waits = sorted(request.first_ms - request.submitted_ms for request in self.requests if keep(request))
        return waits[min(len(waits) - 1, int(percentile * len(waits)))] if waits else 0.0

    def attained(self, start_ms: float, end_ms: float) -> dict[str, float]:
        """Return each tenant's tokens in `[start_ms, end_ms)`: prompt, counted at the first token, + 2 x output."""
        tokens: dict[str, float] = defaultdict(float)
        for request in self.requests:
            tenant = request.submit.tenant
            if start_ms <= request.first_ms < end_ms:
                tokens[tenant] += request.submit.num_prompt_tokens
            whole_ms = max(request.ended_ms - request.first_ms, 1e-9)
            inside_ms = max(0.0, min(request.ended_ms, end_ms) - max(request.first_ms, start_ms))
            tokens[tenant] += 2 * request.num_output_tokens * min(1.0, inside_ms / whole_ms)
        return tokens


def jain(values: Sequence[float]) -> float:
    """Return Jain's fairness index: 1 if all are equal, 1 / n if one has everything."""
    total = sum(values)
    return total * total / (len(values) * sum(value * value for value in values)) if total else 1.0


class _Event(IntEnum):
    """Kinds of events. Simultaneous events are handled in this order."""

    STEP_END = 0
    LOAD_END = 1
    ARRIVAL = 2
    BEATS = 3
    PLAN = 4


class Simulation:
    """One run of a policy with a number of identical workers."""

    def __init__(
        self, dispatcher: Dispatcher, model: WorkerModel, num_workers: int, facts: Mapping[str, AdapterFacts],
        scale_in: tuple[float, Callable[[float], str]] | None = None,
    ) -> None:  # fmt: skip
        """scale_in: time in ms at which a worker begins to drain, and a function that chooses it, given that time."""
        self._dispatcher = dispatcher
        self._workers = {f"w{i}": SimWorker(f"w{i}", model, facts) for i in range(num_workers)}
        self._events: list[tuple[float, _Event, int, str]] = []
        self._num_events = 0
        self._open: dict[str, SimulatedRequest] = {}
        self._next_plan_ms: float | None = None
        self._result = SimulationResult()
        self._scale_in = scale_in
        self._draining = ""

    def run(self, trace: Sequence[Arrival]) -> SimulationResult:
        """Run a trace, ordered by time, until its last request has ended."""
        result = self._result
        arrivals = iter(trace)
        arrival = next(arrivals, None)
        self._send_beats(0.0)
        self._push(BEATS_MS, _Event.BEATS)
        if arrival is not None:
            self._push(arrival.at_ms, _Event.ARRIVAL)
        while arrival is not None or self._open:
            now_ms, event, _, wid = heappop(self._events)
            result.end_ms = now_ms
            if event is _Event.ARRIVAL:
                assert arrival is not None
                self._arrive(arrival)
                arrival = next(arrivals, None)
                if arrival is not None:
                    self._push(arrival.at_ms, _Event.ARRIVAL)
            elif event is _Event.BEATS:
                self._send_beats(now_ms)
                self._push(now_ms + BEATS_MS, _Event.BEATS)
            elif event is _Event.STEP_END:
                self._end_step(self._workers[wid], now_ms)
            elif event is _Event.LOAD_END:
                self._workers[wid].end_load()
                self._start_work(self._workers[wid], now_ms)
            elif now_ms == self._next_plan_ms:  # otherwise an earlier plan has replaced it
                self._next_plan_ms = None
                self._plan(now_ms)
        result.num_loads = sum(worker.num_loads for worker in self._workers.values())
        result.num_fetches = sum(worker.num_fetches for worker in self._workers.values())
        busy_ms = sum(worker.busy_ms for worker in self._workers.values())
        result.busy = busy_ms / max(result.end_ms, 1e-9) / len(self._workers)
        return result

    def _push(self, at_ms: float, event: _Event, wid: str = "") -> None:
        self._num_events += 1
        heappush(self._events, (at_ms, event, self._num_events, wid))

    def _plan_at(self, at_ms: float) -> None:
        if self._next_plan_ms is None or at_ms < self._next_plan_ms:
            self._next_plan_ms = at_ms
            self._push(at_ms, _Event.PLAN)

    def _arrive(self, arrival: Arrival) -> None:
        request = SimulatedRequest(arrival.submit, arrival.num_output_tokens, submitted_ms=arrival.at_ms)
        self._open[arrival.submit.rid] = request
        self._result.requests.append(request)
        self._dispatcher.submit(arrival.submit, 0)
        self._plan_at(arrival.at_ms)

    def _send_beats(self, now_ms: float) -> None:
        if self._scale_in is not None and now_ms >= self._scale_in[0]:
            self._draining, self._scale_in = self._scale_in[1](now_ms), None
            self._result.num_fetched_before = sum(worker.num_fetches for worker in self._workers.values())
        beats = {wid: worker.beat(now_ms) for wid, worker in self._workers.items()}
        if self._draining:
            beats[self._draining] = msgspec.structs.replace(beats[self._draining], draining=True)
        self._dispatcher.beats(beats, BEATS_MS / 1000)
        self._dispatcher.tick()
        self._plan_at(now_ms)

    def _end_step(self, worker: SimWorker, now_ms: float) -> None:
        ended = worker.end_step(now_ms)
        for request in ended:
            sub = request.submit
            del self._open[sub.rid]
            message = m.Ended(sub.rid, worker.wid, request.epoch, request.num_output_tokens)
            self._dispatcher.ended(message)
        if ended:
            self._plan_at(now_ms)
        self._start_work(worker, now_ms)

    def _start_work(self, worker: SimWorker, now_ms: float) -> None:
        if (at_ms := worker.start_load(now_ms)) is not None:
            self._push(at_ms, _Event.LOAD_END, worker.wid)
        if (at_ms := worker.start_step(now_ms)) is not None:
            self._push(at_ms, _Event.STEP_END, worker.wid)

    def _plan(self, now_ms: float) -> None:
        plan = self._dispatcher.plan(now_ms)
        touched: set[str] = set()
        for wid, batch in plan.batches.items():
            touched.add(wid)
            for item in batch:
                request = self._open[item.rid]
                request.epoch, request.yields = item.epoch + 1, item.yields
                self._workers[wid].take(request)
        for wid, digest in plan.prefetches:
            touched.add(wid)
            self._workers[wid].prefetch(digest)
        for wid in touched:
            self._start_work(self._workers[wid], now_ms)
        if plan.again_ms is not None:
            self._plan_at(max(plan.again_ms, now_ms + 3.0))

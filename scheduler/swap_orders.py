"""The inputs of the swap policy, and the outcomes of its orders. Pure.

This state does not outlive a leader. The next one learns from heartbeats which bases its workers serve, may become and
have been ordered to become, and decides again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from protocol.wire import messages as m
from protocol.wire.keys import BATCH, CLASSES, INTERACTIVE
from scheduler.request import QueuedRequest
from scheduler.swaps import BaseDemand, Seat, Swap, SwapPolicy
from scheduler.workers import UNFITTED_STEP, Worker, Workers

USUAL_START_S = 5.0
"""Seconds assumed for a start before one has been measured."""

USUAL_CAPACITY = 8
"""Capacity assumed for a worker of a base before one has been seen."""

VISIT_S = 0.1
"""Seconds of work assumed for a base that no worker has reported yet, so that it is tried once."""

TOGETHER_MS = 60_000.0
"""Maximum ms to wait for workers that were started together, before others serve their bases."""

FIRST_PAUSE_MS, MAX_PAUSE_MS = 30_000.0, 600_000.0
"""First and maximum ms before a base that has failed to start is tried again; doubles with each consecutive failure."""

MAX_LOST = 3
"""Consecutive orders for a base whose worker ended without a reason, after which the base counts as failed to start."""

OBEY_MS, START_MS = 10_000.0, 600_000.0
"""An order is lost if its worker has not left within the first, or is not back with any base within the second."""

DONE, FAILED, LOST = "done", "failed", "lost"
"""Outcomes of an order: the worker serves the base; the base cannot be served; the worker ended, or did not obey."""


@dataclass(slots=True)
class _Facts:
    """What workers of a base have reported."""

    start_s: float = USUAL_START_S
    model: m.StepModel = UNFITTED_STEP
    capacity: int = USUAL_CAPACITY

    def seconds(self, request: QueuedRequest, mean_output_tokens: float) -> float:
        """Estimate the seconds of one worker with full steps that a request takes."""
        num_steps = min(request.submit.max_new_tokens, mean_output_tokens)
        in_tokens = self.model.b * (request.submit.num_prefill_tokens + num_steps)
        return in_tokens + self.model.a * max(1.0, num_steps) / self.capacity


class Asked:
    """The demand for each base that a worker serves or may become, summed up in pieces."""

    def __init__(self, facts: Mapping[str, _Facts], mean_tokens: float) -> None:
        """facts: of the bases to count. mean_tokens: mean length of an output."""
        self._facts, self._mean_tokens = facts, mean_tokens
        self._demands = {cls: {name: BaseDemand(name, one.start_s) for name, one in facts.items()} for cls in CLASSES}
        # (class, base, tenant) -> seconds of its waiting work, divided by its weight.
        self._waiting = defaultdict[tuple[str, str, str], float](float)
        self._used: dict[str, set[str]] = {}  # tenant -> bases for which it waits or on which it runs
        self._weights: dict[str, float] = {}

    def add(self, requests: Iterable[QueuedRequest]) -> None:
        """Add requests that have not ended."""
        for request in requests:
            base, sub = request.submit.base, request.submit
            if (facts := self._facts.get(base)) is None:
                continue
            self._used.setdefault(sub.tenant, set()).add(base)
            self._weights[sub.tenant] = sub.weight
            if not request.wid:
                seconds = facts.seconds(request, self._mean_tokens)
                self._demands[sub.cls][base].add(seconds, request.since_ms or sub.submitted_ms)
                self._waiting[sub.cls, base, sub.tenant] += seconds / sub.weight

    def demands(self) -> dict[str, BaseDemand]:
        """Return the demand by base. Batch work counts only if no interactive request waits."""
        nothing_waits = all(demand.oldest_ms is None for demand in self._demands[INTERACTIVE].values())
        cls = BATCH if nothing_waits else INTERACTIVE
        waiting: dict[str, list[float]] = {name: [] for name in sorted(self._demands[cls])}
        for tenant, bases in self._used.items():
            for base in bases:
                self._demands[cls][base].shares += self._weights[tenant] / len(bases)
                waiting[base].append(self._waiting.get((cls, base, tenant), 0.0))
        for base, seconds in waiting.items():
            self._demands[cls][base].typical_s = sorted(seconds)[(len(seconds) - 1) // 2] if seconds else 0.0
        return {base: self._demands[cls][base] for base in waiting}


@dataclass(slots=True)
class _Failure:
    """Consecutive failed starts of a base."""

    num: int = 0
    until_ms: float = 0.0  # the base is not tried again before this time

    def again(self, now_ms: float) -> _Failure:
        return _Failure(self.num + 1, now_ms + min(FIRST_PAUSE_MS * 2**self.num, MAX_PAUSE_MS))


@dataclass(slots=True)
class SwapOrders:
    """The orders of one leader. Costs nothing if no worker may become another base. Times are unix ms."""

    workers: Workers
    policy: SwapPolicy
    by_worker: dict[str, Swap] = field(default_factory=dict[str, Swap])
    """Name of a worker -> its pending order."""
    _facts: dict[str, _Facts] = field(default_factory=dict[str, _Facts])
    _failures: dict[str, _Failure] = field(default_factory=dict[str, _Failure])
    _num_lost: Counter[str] = field(default_factory=Counter[str])  # base -> consecutive lost orders
    _known_ms: dict[str, float] = field(default_factory=dict[str, float])  # unreported base -> known since, unix ms
    noted: set[str] = field(default_factory=set[str])
    """Bases for which the queue has a reason why they failed."""

    def settle(self, now_ms: float) -> list[tuple[Swap, str]]:
        """Process the latest heartbeats. Returns the orders that ended, each with DONE, FAILED or LOST."""
        by_name = {worker.beat.name: worker for worker in self.workers.by_id.values()}
        for worker in by_name.values():
            facts = self._facts.setdefault(worker.beat.base, _Facts())
            facts.model, facts.capacity = worker.model, worker.beat.capacity or facts.capacity
            facts.start_s = worker.beat.start_s or facts.start_s
            name, becoming, order = worker.beat.name, worker.beat.becoming, self.by_worker.get(worker.beat.name)
            # A worker obeys the first order that it reads, perhaps an earlier leader's.
            if becoming and (order is None or (order.seat.wid == worker.wid and order.base != becoming)):
                self.by_worker[name] = Swap(self._seat(worker), becoming, "", now_ms)
        found: list[tuple[Swap, str]] = []
        for name, order in list(self.by_worker.items()):
            worker = by_name.get(name)
            if worker is not None and worker.wid != order.seat.wid:
                outcome = DONE if worker.beat.base == order.base else self._failed(order, now_ms)
            elif worker is not None and worker.beat.becoming:
                continue
            elif now_ms - order.at_ms > (START_MS if worker is None else OBEY_MS):
                outcome = LOST
            else:
                continue
            del self.by_worker[name]
            found.append((order, outcome))
        served = {worker.beat.base for worker in by_name.values()}
        failed = self.noted - served  # at a swap, at a first start, or under an earlier leader
        self._failures = {base: self._failures.get(base) or _Failure().again(now_ms) for base in failed}
        for base in served:
            self._num_lost.pop(base, None)
        return found

    def _failed(self, order: Swap, now_ms: float) -> str:
        """Return FAILED if an order's base counts as failed to start, else LOST. Its worker has another base now."""
        self._num_lost[order.base] += 1
        if order.base not in self.noted and self._num_lost[order.base] < MAX_LOST:
            return LOST
        self.noted.add(order.base)
        self._failures[order.base] = self._failures.get(order.base, _Failure()).again(now_ms)
        return FAILED

    def asked(self, mean_output_tokens: float) -> Asked | None:
        """Return an empty `Asked`, to which all open requests must be added; None: no worker may switch."""
        if not any(worker.beat.may_become for worker in self.workers.by_id.values()):
            return None
        names = self.reachable().keys() | {worker.beat.base for worker in self.workers.by_id.values()}
        return Asked({name: self._facts.get(name) or _Facts() for name in names}, mean_output_tokens)

    def decide(self, now_ms: float, asked: Asked) -> list[Swap]:
        """Return the orders to give now. Must be called once a second."""
        demands = self._demands(now_ms, asked)
        free = [one for one in self.workers.available() if one.beat.name not in self.by_worker]
        seats = [self._seat(one) for one in free if one.beat.base in demands]
        swaps = self.policy.decide(now_ms, list(demands.values()), seats, self.by_worker.values())
        for swap in swaps:
            self.by_worker[swap.seat.name] = swap
            self.workers.set_unreachable(swap.seat.wid)  # until its next heartbeat, which says that it leaves
        return swaps

    def _seat(self, worker: Worker) -> Seat:
        beat, may_become = worker.beat, frozenset(worker.beat.may_become) - self.workers.removed
        return Seat(worker.wid, worker.beat.base, float(beat.joined_ms), worker.load, may_become, beat.name)

    def _demands(self, now_ms: float, asked: Asked) -> dict[str, BaseDemand]:
        """Return the demands for the policy: those of requests, and a short visit to bases that are to be tried."""
        beats = [worker.beat for worker in self.workers.by_id.values()]
        are_coming = len({beat.name for beat in beats} | self.by_worker.keys()) < max(
            (beat.started_with for beat in beats), default=0
        )
        demands = asked.demands()
        for name, demand in list(demands.items()):
            if (failure := self._failures.get(name)) is not None:
                if now_ms < failure.until_ms:
                    del demands[name]
                    continue
                since_ms = failure.until_ms
            elif name not in self.workers.bases:
                since_ms = self._known_ms.setdefault(name, now_ms)
                if are_coming and now_ms - since_ms < TOGETHER_MS:
                    continue
            else:
                self._known_ms.pop(name, None)
                continue
            demand.add(VISIT_S, since_ms)
            demand.shares = demand.shares or 1.0
        return demands

    def reachable(self) -> Counter[str]:
        """Return for each base the number of workers that may become it, or that are switching and could have."""
        found: Counter[str] = Counter()
        for worker in self.workers.available():
            if worker.beat.name not in self.by_worker:
                found.update(self._seat(worker).may_become)
        for order in self.by_worker.values():
            found.update((order.seat.may_become | {order.seat.base}) - self.workers.removed)
        return found

    def failed(self) -> set[str]:
        """Return the bases that failed to start and that no worker is becoming now."""
        return self._failures.keys() - {order.base for order in self.by_worker.values()}

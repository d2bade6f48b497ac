"""What the simulator compares: our scheduler, and the simple dispatchers that others use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from protocol.wire import messages as m
from scheduler.core import DispatchPlan, Scheduler, SchedulerConfig
from scheduler.placement import AdapterFacts, Rendezvous
from scheduler.request import QueuedRequest


class Dispatcher(Protocol):
    """The part of `Scheduler` that the simulator drives."""

    def submit(self, sub: m.Submit, epoch: int, attempts: int = 0) -> None: ...

    def ended(self, message: m.Ended) -> None: ...

    def beats(self, beats: Mapping[str, m.WorkerBeat | None], elapsed_s: float) -> list[str]: ...

    def tick(self) -> None: ...

    def plan(self, now_ms: float) -> DispatchPlan: ...


class SimpleDispatcher:
    """Sends each request on at once, in order of arrival, to a worker that `_choose` names."""

    def __init__(self) -> None:
        self._workers: dict[str, m.WorkerBeat] = {}
        self._load: dict[str, int] = {}
        self._new: list[m.Submit] = []

    def submit(self, sub: m.Submit, epoch: int, attempts: int = 0) -> None:
        self._new.append(sub)

    def ended(self, message: m.Ended) -> None:
        self._load[message.wid] -= 1

    def beats(self, beats: Mapping[str, m.WorkerBeat | None], elapsed_s: float) -> list[str]:
        self._workers = {wid: beat for wid, beat in beats.items() if beat is not None}
        for wid in self._workers:
            self._load.setdefault(wid, 0)
        return []

    def tick(self) -> None: ...

    def plan(self, now_ms: float) -> DispatchPlan:
        plan = DispatchPlan()
        for sub in self._new:
            wid = self._choose(sub)
            self._load[wid] += 1
            plan.batches.setdefault(wid, []).append(QueuedRequest(sub, 0))
        self._new.clear()
        return plan

    def _choose(self, sub: m.Submit) -> str:
        raise NotImplementedError


class RoundRobin(SimpleDispatcher):
    """Workers in turn."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = -1

    def _choose(self, sub: m.Submit) -> str:
        self._turn += 1
        return list(self._workers)[self._turn % len(self._workers)]


class LeastLoaded(SimpleDispatcher):
    """The worker with the fewest requests."""

    def _choose(self, sub: m.Submit) -> str:
        return min(self._workers, key=self._load.__getitem__)


class PureAffinity(SimpleDispatcher):
    """Always the same worker for an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self._rendezvous = Rendezvous()

    def _choose(self, sub: m.Submit) -> str:
        self._rendezvous.set_members({wid: (beat.name, beat.capacity) for wid, beat in self._workers.items()})
        return self._rendezvous.order(sub.digest)[0]


POLICIES = ("affinity+fairness", "round-robin", "least-loaded", "pure-affinity")


def make_dispatcher(name: str, policy: SchedulerConfig, facts: Mapping[str, AdapterFacts]) -> Dispatcher:
    """Return the dispatcher of this name. Raises KeyError."""
    if name != POLICIES[0]:
        return {"round-robin": RoundRobin, "least-loaded": LeastLoaded, "pure-affinity": PureAffinity}[name]()
    scheduler = Scheduler(policy)
    for digest, of_adapter in facts.items():
        scheduler.learn(digest, of_adapter)
    return scheduler

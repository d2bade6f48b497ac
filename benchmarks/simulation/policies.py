"""The policies that the simulator compares: this scheduler, and simple dispatchers as in other systems."""

from __future__ import annotations

from collections.abc import Mapping

from protocol.wire import messages as m
from scheduler.config import SchedulerConfig
from scheduler.core import DispatchPlan, Scheduler
from scheduler.placement import AdapterFacts, Rendezvous
from scheduler.request import QueuedRequest


class SimpleDispatcher:
    """Dispatches each request at once, in order of arrival, to the worker that `_choose` returns."""

    def __init__(self) -> None:
        self._workers: dict[str, m.WorkerBeat] = {}
        self._load: dict[str, int] = {}
        self._new: list[m.RequestHead] = []

    def submit(self, sub: m.RequestHead, epoch: int, attempts: int = 0) -> None:
        """Queue a request until the next plan."""
        self._new.append(sub)

    def ended(self, message: m.Ended) -> None:
        """Decrement the number of requests on the request's worker."""
        self._load[message.wid] -= 1

    def beats(self, beats: Mapping[str, m.WorkerBeat | None], elapsed_s: float) -> list[str]:
        """Store the current workers. No simulated worker dies."""
        self._workers = {wid: beat for wid, beat in beats.items() if beat is not None}
        for wid in self._workers:
            self._load.setdefault(wid, 0)
        return []

    def tick(self) -> None:
        """Do nothing: these policies do not adapt."""

    def plan(self, now_ms: float) -> DispatchPlan:
        """Dispatch all queued requests."""
        plan = DispatchPlan()
        for sub in self._new:
            wid = self._choose(sub)
            self._load[wid] += 1
            plan.batches.setdefault(wid, []).append(QueuedRequest(sub, 0))
        self._new.clear()
        return plan

    def _choose(self, sub: m.RequestHead) -> str:
        """Return the id of the worker that gets a request."""
        raise NotImplementedError


class RoundRobin(SimpleDispatcher):
    """Selects workers in turn."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = -1

    def _choose(self, sub: m.RequestHead) -> str:
        self._turn += 1
        return list(self._workers)[self._turn % len(self._workers)]


class LeastLoaded(SimpleDispatcher):
    """Selects the worker with the fewest requests."""

    def _choose(self, sub: m.RequestHead) -> str:
        return min(self._workers, key=self._load.__getitem__)


class PureAffinity(SimpleDispatcher):
    """Selects the first worker of each adapter by rendezvous hashing, whatever its load."""

    def __init__(self) -> None:
        super().__init__()
        self._rendezvous = Rendezvous()

    def _choose(self, sub: m.RequestHead) -> str:
        self._rendezvous.set_members({wid: (beat.name, beat.capacity) for wid, beat in self._workers.items()})
        return self._rendezvous.order(sub.digest)[0]


Dispatcher = Scheduler | SimpleDispatcher
"""The policies that the simulator can run."""

POLICIES = ("affinity+fairness", "round-robin", "least-loaded", "pure-affinity")


def make_dispatcher(name: str, config: SchedulerConfig, facts: Mapping[str, AdapterFacts]) -> Dispatcher:
    """Return the dispatcher of a policy, which knows the adapters `facts`. Raises KeyError for an unknown policy."""
    if name != POLICIES[0]:
        return {"round-robin": RoundRobin, "least-loaded": LeastLoaded, "pure-affinity": PureAffinity}[name]()
    scheduler = Scheduler(config)
    for digest, of_adapter in facts.items():
        scheduler.placement.learn(digest, of_adapter)
    return scheduler

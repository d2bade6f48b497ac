"""Attacks on a fleet with fewer workers than bases: floods that force swaps, bases that never start, invented names.

The worker and its starts are simulated; the scheduler is real.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from helpers import examples

from protocol.wire import messages as m
from scheduler.config import SchedulerConfig
from scheduler.core import Scheduler
from tests.scheduler.fakes import make_submit, order_swaps

START_MS, RESIDENCY_S, WAIT_S = 4000, 5.0, 30.0
TICK_MS = 1000
PLACES = 4
STEP_MS = 250
"""Duration of a request."""


class Fleet:
    """Workers that serve one base at a time, in virtual time."""

    def __init__(
        self, bases: list[str], workers: int, *, broken: frozenset[str] = frozenset(), wait_s: float = WAIT_S
    ) -> None:
        self.bases, self.broken = bases, broken
        self.scheduler = Scheduler(SchedulerConfig(max_swap_wait_s=WAIT_S, min_residency_s=RESIDENCY_S))
        self.scheduler.set_bases(bases)
        self.now_ms = 0
        self.failed: set[str] = set()
        self.joined: dict[str, m.WorkerBeat] = {}
        self.starting: dict[str, tuple[int, str, str]] = {}  # worker -> (when it joins, its base, its previous base)
        self.running: dict[str, tuple[int, str]] = {}  # request -> (time when it ends, worker id)
        self.starts: Counter[str] = Counter()
        self.served_ms: Counter[str] = Counter()
        self.ended_ms: dict[str, int] = {}
        self._num = 0
        for number in range(workers):
            self._join(f"worker-{number}", bases[number % len(bases)])

    def _join(self, name: str, base: str) -> None:
        self._num += 1
        others = [one for one in self.bases if one != base]
        self.joined[name] = m.WorkerBeat(
            wid=f"w{self._num}", name=name, base=base, capacity=PLACES, may_become=others, start_s=START_MS / 1000,
            joined_ms=self.now_ms, sent_ms=self.now_ms + 1,
        )  # fmt: skip

    def submit(self, rid: str, base: str, tenant: str, **more: Any) -> None:
        self.scheduler.submit(make_submit(rid, base=base, tenant=tenant, submitted_ms=self.now_ms, **more), 0)

    def tick(self) -> None:
        """Advance the time by STEP_MS."""
        self.now_ms += STEP_MS
        for name, (at_ms, base, left) in list(self.starting.items()):
            if at_ms <= self.now_ms:
                del self.starting[name]
                if base in self.broken:
                    self.failed.add(base)
                    self.starting[name] = (self.now_ms + START_MS, left, left)
                else:
                    self._join(name, base)
        beats = {beat.wid: msgspec.structs.replace(beat, sent_ms=self.now_ms) for beat in self.joined.values()}
        self.scheduler.set_bases(self.bases, self.failed)
        for wid in self.scheduler.beats(beats, STEP_MS / 1000):
            self.scheduler.remove_worker(wid)
        for rid, (at_ms, wid) in list(self.running.items()):
            if at_ms <= self.now_ms:
                del self.running[rid]
                self.ended_ms[rid] = self.now_ms
                self.served_ms[self.scheduler.workers.by_id[wid].beat.base] += STEP_MS
                self.scheduler.ended(m.Ended(rid, wid, self.scheduler.requests[rid].epoch + 1, 1))
        if self.now_ms % TICK_MS == 0:
            self.scheduler.swaps.settle(self.now_ms)
            for order in order_swaps(self.scheduler, self.now_ms):
                self._leave(order.seat.name, order.base)
            for rid, _ in self.scheduler.hopeless():
                self.scheduler.forget(rid)
                self.ended_ms[rid] = -1
        for wid, batch in self.scheduler.plan(self.now_ms).batches.items():
            for request in batch:
                self.running[request.rid] = (self.now_ms + STEP_MS, wid)

    def _leave(self, name: str, base: str) -> None:
        beat = self.joined.pop(name)
        self.starts[base] += 1
        self.starting[name] = (self.now_ms + START_MS, base, beat.base)
        for rid, (_, wid) in list(self.running.items()):
            if wid == beat.wid:
                del self.running[rid]
                request = self.scheduler.requests[rid]
                self.scheduler.submit(request.submit, request.epoch + 1)
                self.scheduler.requests[rid].since_ms = self.now_ms


def run(fleet: Fleet, minutes: int, *tenants: Callable[[Fleet], None]) -> Fleet:
    """Let tenants send requests for `minutes`."""
    while fleet.now_ms < minutes * 60_000:
        for ask in tenants:
            ask(fleet)
        fleet.tick()
    return fleet


class Flood:
    """Keeps `num` requests of a tenant open at each of its bases."""

    def __init__(self, tenant: str, bases: list[str], num: int = 40) -> None:
        self.tenant, self.bases, self.num = tenant, bases, num
        self._asked: Counter[str] = Counter()
        self._open: dict[str, list[str]] = {base: [] for base in bases}

    def __call__(self, fleet: Fleet) -> None:
        for base, rids in self._open.items():
            rids[:] = [rid for rid in rids if rid not in fleet.ended_ms]
            while len(rids) < self.num:
                self._asked[base] += 1
                rids.append(f"{self.tenant} {base} {self._asked[base]}")
                fleet.submit(rids[-1], base, self.tenant)


class Victims:
    """One tenant per base, which sends a request every `every_ms`."""

    def __init__(self, bases: list[str], every_ms: int = 20_000) -> None:
        self.bases, self.every_ms = bases, every_ms
        self.asked_ms: dict[str, int] = {}

    def __call__(self, fleet: Fleet) -> None:
        if fleet.now_ms % self.every_ms == 0:
            for base in self.bases:
                rid = f"victim of {base} {fleet.now_ms}"
                self.asked_ms[rid] = fleet.now_ms
                fleet.submit(rid, base, f"victim of {base}")

    def longest_ms(self, fleet: Fleet) -> int:
        """Return the longest wait, including requests that still wait."""
        return max(fleet.ended_ms.get(rid, fleet.now_ms) - ms for rid, ms in self.asked_ms.items())


BOUND_MS = 1000 * WAIT_S + START_MS + 2 * TICK_MS + 2 * STEP_MS


@pytest.mark.parametrize("flooded", examples.some([["a"], ["b"], ["a", "b", "c"]], ["a"]))
def test_floods_keep_no_other_base_waiting_beyond_the_bound(flooded: list[str]) -> None:
    victims, flood = Victims(["a", "b", "c"]), Flood("flood", flooded)
    fleet = run(Fleet(["a", "b", "c"], 1), 8, victims, flood)
    assert len(victims.asked_ms) > 60
    assert victims.longest_ms(fleet) <= BOUND_MS
    assert fleet.served_ms[flooded[0]] > 0
    assert fleet.starts.total() > 10, "the flood has forced swaps"


def test_a_tenant_that_asks_for_base_after_base_gets_its_share() -> None:
    """Each of its bases costs a start in each round of turns, but its turns are no longer than its share."""
    ping, steady = Flood("ping", ["a", "b"], 1), Flood("steady", ["c"], 2 * PLACES)
    fleet = run(Fleet(["a", "b", "c"], 1), 15, ping, steady)
    assert fleet.served_ms["c"] > 2 * (fleet.served_ms["a"] + fleet.served_ms["b"])
    assert fleet.served_ms["c"] > 0.2 * 15 * 60_000 * PLACES
    assert min(fleet.served_ms["a"], fleet.served_ms["b"]) > 0


def test_a_base_that_never_starts_costs_a_few_starts_whoever_asks_for_it() -> None:
    victims, flood = Victims(["a"], every_ms=1000), Flood("flood", ["broken"])
    bases = ["a", "b", "broken"]
    fleet = run(Fleet(bases, 1, broken=frozenset({"broken"})), 20, victims, flood)
    assert 2 <= fleet.starts["broken"] <= 7  # after 30 s, 1, 2, 4, 8, 10 minutes
    assert victims.longest_ms(fleet) <= BOUND_MS + START_MS
    assert any(ms < 0 for rid, ms in fleet.ended_ms.items() if "broken" in rid), "its calls end"


def test_names_of_strangers_force_no_swap() -> None:
    victims, flood = Victims(["a"]), Flood("flood", [f"stranger {i}" for i in range(50)], 5)
    fleet = run(Fleet(["a", "b"], 1), 5, victims, flood)
    assert not fleet.starts
    assert "stranger 1" not in fleet.scheduler.swaps.reachable()
    assert victims.longest_ms(fleet) <= 2 * STEP_MS

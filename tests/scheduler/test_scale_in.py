"""Which worker is removed first at a scale-in."""

from __future__ import annotations

import pytest

from benchmarks.simulation.scale_in import fetched
from protocol.wire import messages as m
from scheduler.config import SchedulerConfig
from scheduler.core import Scheduler
from scheduler.placement import AdapterFacts, Bandwidths
from scheduler.scale_in import HALF_LIFE_MS, MAX_ADAPTERS, Popularity, costs_ms, least_valuable
from scheduler.workers import Worker

BANDWIDTHS = Bandwidths(host=1e6, remote=1e5, host_ms=0.0, remote_ms=0.0)
FACTS = AdapterFacts(16, 1_000_000)  # 1 ms from host, 10 ms more from the store


def make(name: str, resident: str = "", host: str = "", num_tokens: int = 0) -> Worker:
    worker = Worker(m.WorkerBeat(wid=f"id-{name}", name=name, capacity=8))
    worker.resident, worker.host, worker.num_tokens = frozenset(resident), frozenset(host), num_tokens
    worker.model = m.StepModel(a=0.02, b=0.001)
    return worker


def costs(*workers: Worker, wanted: dict[str, float] | None = None) -> dict[str, float]:
    num = wanted or {}
    found = costs_ms(workers, lambda digest: num.get(digest, 1.0), lambda _: FACTS, BANDWIDTHS)
    return {wid.removeprefix("id-"): round(cost, 6) for wid, cost in found.items()}


def test_the_only_copy_of_an_adapter_is_worth_fetching_it() -> None:
    assert costs(make("a", resident="x"), make("b")) == {"a": 10.0, "b": 0.0}


def test_a_copy_that_another_worker_has_is_worth_nothing() -> None:
    assert costs(make("a", resident="x"), make("b", resident="x")) == {"a": 0.0, "b": 0.0}


def test_a_nearer_copy_is_worth_the_difference() -> None:
    assert costs(make("a", resident="x"), make("b", host="x")) == {"a": 1.0, "b": 0.0}
    assert costs(make("a", host="x"), make("b")) == {"a": 9.0, "b": 0.0}


def test_a_copy_is_worth_as_much_as_it_is_wanted() -> None:
    found = costs(make("a", resident="xy"), make("b", resident="z"), wanted={"x": 0.5, "y": 0.25, "z": 3.0})
    assert found == {"a": 7.5, "b": 30.0}


def test_tokens_that_others_compute_again_count() -> None:
    assert costs(make("a", num_tokens=500), make("b", num_tokens=20)) == {"a": 500.0, "b": 20.0}


def test_the_worker_with_the_least_cost_goes_and_of_equals_the_last() -> None:
    def first(*workers: Worker) -> str:
        return least_valuable(workers, lambda _: 1.0, lambda _: FACTS, BANDWIDTHS)

    assert first() == ""
    assert first(make("a", resident="x")) == "a"
    assert first(make("a"), make("b", resident="x"), make("c", resident="yz")) == "a"
    assert first(make("w-2"), make("w-3"), make("w-1")) == "w-3"


def test_older_requests_count_less() -> None:
    found = Popularity()
    assert found.of("x", 0) == 0.0
    found.note("x", 0)
    found.note("x", 0)
    assert found.of("x", HALF_LIFE_MS) == pytest.approx(1.0)
    found.note("x", HALF_LIFE_MS)
    assert found.of("x", HALF_LIFE_MS) == pytest.approx(2.0)
    assert found.of("x", 0) == pytest.approx(2.0), "time that goes back changes nothing"


def test_what_is_remembered_of_adapters_is_bounded() -> None:
    found = Popularity()
    for number in range(MAX_ADAPTERS + 10):
        found.note(f"a{number}", 0)
    assert (found.of("a9", 0), found.of("a10", 0)) == (0.0, 1.0)


def test_a_draining_worker_is_not_named() -> None:
    scheduler = Scheduler(SchedulerConfig())
    beats = {name: m.WorkerBeat(wid=name, name=name, capacity=8, draining=name == "b") for name in ("a", "b")}
    scheduler.beats(beats, 0.5)
    assert scheduler.drain_next(0.0) == "a"


@pytest.mark.thorough
def test_in_simulation_fewer_adapters_are_fetched_again() -> None:
    """During a load a worker is removed: the one that the scheduler names, or the one with the highest cost."""

    def named(costs: dict[str, float]) -> str:
        return min(costs, key=costs.__getitem__)

    def best(costs: dict[str, float]) -> str:
        return max(costs, key=costs.__getitem__)

    assert fetched(60, 1.2, 0, named) < fetched(60, 1.2, 0, best)

"""Swap orders to workers: when they are given, how they end, and which calls wait in the meantime."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.waiting import wait_until

from protocol.metrics.series import SWAPS
from protocol.queue.bus import Bus, now_ms
from protocol.wire import messages as m
from protocol.wire.error_codec import error_from
from scheduler.config import SchedulerConfig
from scheduler.core import Scheduler
from scheduler.swap_orders import DONE, FAILED, FIRST_PAUSE_MS, LOST, MAX_LOST, OBEY_MS, START_MS, TOGETHER_MS
from tests.scheduler.fakes import FakeWorker, becomes, holds, make_submit, order_swaps, running_scheduler, state, submit
from tests.scheduler.test_late_bases import served

FLEET = ["a", "b", "c"]


def beat(base: str, wid: str = "", *, name: str = "w", fleet: list[str] = FLEET, **more: Any) -> m.WorkerBeat:
    facts: dict[str, Any] = {"may_become": [one for one in fleet if one != base], "joined_ms": 0, "sent_ms": 1} | more
    return m.WorkerBeat(wid=wid or f"{name} as {base}", name=name, base=base, capacity=4, **facts)


def see(scheduler: Scheduler, *beats: m.WorkerBeat) -> None:
    """Set the registered workers and remove the others, as the session does."""
    for wid in scheduler.beats({one.wid: one for one in beats}, 0.0):
        scheduler.remove_worker(wid)


def scheduler_of(*beats: m.WorkerBeat, known: list[str] = FLEET, **config: Any) -> Scheduler:
    scheduler = Scheduler(SchedulerConfig(**config))
    scheduler.set_bases(known)
    see(scheduler, *beats)
    return scheduler


def ordered(scheduler: Scheduler, at_ms: float) -> dict[str, str]:
    return {order.seat.name: order.base for order in order_swaps(scheduler, at_ms)}


def settled(scheduler: Scheduler, at_ms: float) -> list[tuple[str, str]]:
    return [(order.base, outcome) for order, outcome in scheduler.swaps.settle(at_ms)]


def test_an_idle_worker_becomes_the_base_that_is_asked_for() -> None:
    scheduler = scheduler_of(beat("a"))
    assert ordered(scheduler, 1000.0) == {}
    scheduler.submit(make_submit("r", base="b", submitted_ms=1000), 0)
    assert ordered(scheduler, 1500.0) == {"w": "b"}
    scheduler.submit(make_submit("of a", base="a", submitted_ms=1000), 0)
    assert scheduler.plan(1500.0).batches == {}  # it gets nothing more, although it has not left
    assert ordered(scheduler, 2500.0) == {}
    see(scheduler)
    assert ordered(scheduler, 3500.0) == {}
    see(scheduler, beat("b"))
    assert settled(scheduler, 5000.0) == [("b", DONE)]
    assert [r.rid for r in scheduler.plan(5000.0).batches["w as b"]] == ["r"]


def test_a_worker_that_obeys_another_leader_speaks_against_no_base() -> None:
    """It obeys the first order that it reads, an earlier leader's: the base of the second order did not fail."""
    scheduler = scheduler_of(beat("a"))
    scheduler.submit(make_submit("r", base="b", submitted_ms=0), 0)
    for at_ms in range(0, 100_000 * MAX_LOST, 100_000):
        assert ordered(scheduler, at_ms + 1000.0) == {"w": "b"}
        see(scheduler, beat("a", wid=scheduler.swaps.by_worker["w"].seat.wid, becoming="c", draining=True, sent_ms=2))
        assert settled(scheduler, at_ms + 2000.0) == []
        see(scheduler, beat("c", wid=f"c{at_ms}"))
        assert settled(scheduler, at_ms + 9000.0) == [("c", DONE)]
        see(scheduler, beat("a", wid=f"a{at_ms}"))
    assert scheduler.swaps.failed() == set()


def test_a_base_that_was_never_served_is_served_once() -> None:
    scheduler = scheduler_of(beat("a"), known=["a"])
    scheduler.swaps.settle(0.0)
    (first,) = ordered(scheduler, 0.0).values()
    assert first in ("b", "c")
    see(scheduler, beat(first))
    scheduler.set_bases(["a", first])
    assert settled(scheduler, 8000.0) == [(first, DONE)]
    (second,) = ordered(scheduler, 8000.0).values()
    assert {first, second} == {"b", "c"}
    see(scheduler, beat(second))
    scheduler.set_bases(FLEET)
    assert settled(scheduler, 16_000.0) == [(second, DONE)]
    assert ordered(scheduler, 60_000.0) == {}


def test_a_base_whose_own_worker_is_about_to_come_is_left_to_it() -> None:
    first = beat("a", name="v", fleet=["a", "b"], started_with=2)
    scheduler = scheduler_of(first, known=["a"])
    for at_ms in range(0, int(TOGETHER_MS), 1000):
        assert ordered(scheduler, float(at_ms)) == {}
    see(scheduler, first, beat("b", fleet=["a", "b"], started_with=2))
    scheduler.set_bases(["a", "b"])
    assert ordered(scheduler, TOGETHER_MS) == {}
    scheduler = scheduler_of(first, known=["a"])
    assert ordered(scheduler, 0.0) == {}
    assert ordered(scheduler, TOGETHER_MS) == {"v": "b"}  # its own worker has not come


def test_a_fleet_whose_workers_become_nothing_orders_nothing() -> None:
    """A fleet of one base, of workers of an earlier version, or with `--no-swaps`."""
    scheduler = scheduler_of(beat("a", fleet=[]), known=["a", "b"])
    scheduler.submit(make_submit("r", base="b", submitted_ms=0), 0)
    assert ordered(scheduler, 100_000.0) == {}
    assert scheduler.bases()["b"] == m.BaseLoad(0, 1, 0, 0)


def test_an_order_that_comes_to_nothing_is_given_again() -> None:
    scheduler = scheduler_of(beat("a"))
    scheduler.submit(make_submit("r", base="b", submitted_ms=0), 0)
    assert ordered(scheduler, 0.0) == {"w": "b"}
    assert settled(scheduler, OBEY_MS) == []
    assert settled(scheduler, OBEY_MS + 1) == [("b", LOST)]
    assert ordered(scheduler, 30_000.0) == {}  # no heartbeat has arrived since
    see(scheduler, beat("a", sent_ms=2))
    assert ordered(scheduler, 60_000.0) == {"w": "b"}
    see(scheduler)  # it has left, and does not return
    assert settled(scheduler, 60_000 + START_MS) == []
    assert "b" in scheduler.swaps.reachable()
    assert settled(scheduler, 60_001 + START_MS) == [("b", LOST)]
    assert not scheduler.swaps.reachable()


def test_a_new_leader_learns_from_heartbeats_who_is_leaving() -> None:
    scheduler = scheduler_of(beat("a", becoming="b", draining=True))
    scheduler.submit(make_submit("r", base="b", submitted_ms=0), 0)
    assert ordered(scheduler, 1000.0) == {}
    see(scheduler, beat("a"))  # it had not read the order
    scheduler = scheduler_of(beat("a"))
    scheduler.submit(make_submit("r", base="b", submitted_ms=0), 0)
    assert ordered(scheduler, 1000.0) == {"w": "b"}


def test_a_worker_that_has_not_read_its_order_yet_gets_no_other() -> None:
    scheduler = scheduler_of(beat("a"))
    scheduler.submit(make_submit("r", base="b", submitted_ms=0), 0)
    assert ordered(scheduler, 0.0) == {"w": "b"}
    scheduler.submit(make_submit("other", base="c", submitted_ms=0), 0)
    see(scheduler, beat("a", sent_ms=2))
    assert settled(scheduler, 1000.0) == []
    assert ordered(scheduler, 1000.0) == {}


def test_an_order_of_an_earlier_leader_is_known_and_settled() -> None:
    scheduler = scheduler_of(beat("a", becoming="b", draining=True), beat("a", name="v"))
    assert settled(scheduler, 0.0) == []
    scheduler.submit(make_submit("r", base="b", submitted_ms=0), 0)
    assert ordered(scheduler, 1000.0) == {}, "it is on its way"
    see(scheduler, beat("b"), beat("a", name="v"))
    assert settled(scheduler, 2000.0) == [("b", DONE)]


def test_a_base_that_fails_is_tried_again_ever_later_and_its_calls_end() -> None:
    scheduler = scheduler_of(beat("a"), wait_for_worker_s=1.0)
    calls = [make_submit("call", base="b", submitted_ms=0), make_submit("job", base="b", submitted_ms=0, gateway="")]
    for call in calls:
        scheduler.submit(call, 0)
    assert scheduler.unserved(0.0) == scheduler.unserved(9000.0) == []  # a worker may swap to it
    at_ms, pause_ms = 0.0, FIRST_PAUSE_MS
    for number in range(3):
        assert ordered(scheduler, at_ms) == {"w": "b"}
        assert scheduler.hopeless() == []
        see(scheduler, beat("a", f"w{number}"))
        scheduler.set_bases(FLEET, ["b"])
        assert settled(scheduler, at_ms) == [("b", FAILED)]
        assert scheduler.hopeless() == ([("call", "b")] if number == 0 else [])
        scheduler.forget("call")
        assert ordered(scheduler, at_ms + pause_ms - 1) == {}
        at_ms += pause_ms
        pause_ms *= 2
    assert ordered(scheduler, at_ms) == {"w": "b"}
    see(scheduler, beat("b"))
    scheduler.set_bases(FLEET)
    assert settled(scheduler, at_ms) == [("b", DONE)]
    assert scheduler.swaps.failed() == set()


def test_a_busy_worker_tries_a_failed_base_within_the_wait_bound() -> None:
    scheduler = scheduler_of(beat("a"))
    scheduler.submit(make_submit("r", base="a", submitted_ms=0), 0)
    scheduler.set_bases(FLEET, ["b"])
    assert settled(scheduler, 0.0) == []
    until_ms, bound_ms = FIRST_PAUSE_MS, 1000 * scheduler.config.max_swap_wait_s
    assert ordered(scheduler, until_ms + bound_ms / 2) == {}
    assert ordered(scheduler, until_ms + bound_ms) == {"w": "b"}


def test_calls_of_the_only_base_that_starts_do_not_fail_with_the_other() -> None:
    scheduler = scheduler_of(beat("a", fleet=["a", "b"]), known=["a"])
    scheduler.set_bases(["a"], ["b"])
    assert settled(scheduler, 0.0) == []
    assert scheduler.swaps.failed() == {"b"}
    scheduler.submit(make_submit("waits", base="a", submitted_ms=0), 0)
    assert scheduler.hopeless() == []


def test_a_base_whose_starts_end_without_a_word_has_failed() -> None:
    """For example when the system kills them for their memory. A single killed start does not make a base fail."""
    scheduler = scheduler_of(beat("a"))
    scheduler.submit(make_submit("r", base="b", submitted_ms=0), 0)
    found: list[tuple[str, str]] = []
    for number in range(MAX_LOST):
        assert ordered(scheduler, 60_000.0 * number) == {"w": "b"}
        see(scheduler, beat("a", f"w{number}"))
        found += settled(scheduler, 60_000.0 * number)
    assert found == [("b", LOST)] * (MAX_LOST - 1) + [("b", FAILED)]


def test_the_status_counts_workers_that_may_become_a_base() -> None:
    scheduler = scheduler_of(beat("a"), beat("b", name="v", fleet=["b"]))
    assert scheduler.bases() == {"a": m.BaseLoad(1), "b": m.BaseLoad(1, 0, 0, 1), "c": m.BaseLoad(0, 0, 0, 1)}
    scheduler.submit(make_submit("r", base="c", submitted_ms=0), 0)
    assert ordered(scheduler, 0.0) == {"w": "c"}
    see(scheduler, beat("b", name="v", fleet=["b"]))
    loads = scheduler.bases()
    assert {name: (load.workers, load.may_become) for name, load in loads.items()} == {
        "a": (0, 1), "b": (1, 1), "c": (0, 1),
    }  # fmt: skip


def test_jobs_force_no_swap_while_calls_wait() -> None:
    scheduler = scheduler_of(beat("a"))
    scheduler.submit(make_submit("job", base="c", submitted_ms=0, cls="batch"), 0)
    scheduler.submit(make_submit("call", base="b", submitted_ms=900), 0)
    assert ordered(scheduler, 1000.0) == {"w": "b"}


async def _join(bus: Bus, wid: str, base: str, name: str = "w") -> FakeWorker:
    beat_of = m.WorkerBeat(wid=wid, name=name, capacity=8)
    await bus.members.join(beat_of, served(base), 60_000, fleet=FLEET)
    worker = FakeWorker(bus, wid, name=name, base=base, may_become=[one for one in FLEET if one != base])
    return await worker.join()


async def _ordered(worker: FakeWorker) -> str:
    """Return the base that a worker is ordered to become, once the order has come."""

    async def order() -> str:
        await worker.read()
        await worker.beat()
        return next((order.base for order in worker.orders if order.kind == "serve"), "")

    return await wait_until(order, "it is ordered to become another base")


async def _becomes(bus: Bus, worker: FakeWorker, base: str, wid: str) -> FakeWorker:
    """Obey an order as a worker does, once it has come."""
    assert await _ordered(worker) == base
    await bus.members.leave(worker.wid)
    return await _join(bus, wid, base)


async def test_a_swap_is_ordered_audited_counted_and_told(bus: Bus) -> None:
    worker = await _join(bus, "w1", "a")
    for base in ("b", "c"):
        await bus._redis.hset(bus.keys.bases, base, m.encode(served(base)))
    count = SWAPS.labels("b", DONE)._value
    before = count.get()
    async with running_scheduler(bus):
        await submit(bus, make_submit("r", base="b"))
        worker = await _becomes(bus, worker, "b", "w2")
        await holds(worker, "r")
        ((_, entry),) = await bus.audit.newest(10)
        assert (entry.who, entry.action, entry.target, entry.outcome) == ("scheduler", "worker.swap", "w", "done")
        assert entry.detail == "from=a to=b why=idle"
        assert await worker.write("r", 4, end=True) == []
        await becomes(bus, "r", "completed", worker)
        await wait_until(lambda: count.get() == before + 1, "it is counted")

        async def is_told() -> bool:
            status = await bus.get(bus.keys.status, m.SchedulerStatus)
            return status is not None and not status.becoming

        await wait_until(is_told, "nobody is becoming anything")


@pytest.mark.parametrize("noted", [True, False])
async def test_calls_of_a_base_that_fails_are_told_and_others_go_on(bus: Bus, noted: bool) -> None:
    """Even if its starts end without a message."""
    worker = await _join(bus, "w0", "a")
    for base in ("b", "c"):
        await bus._redis.hset(bus.keys.bases, base, m.encode(served(base)))
    await bus.streams.create(bus.keys.out("g-test"), 300)
    async with running_scheduler(bus):
        await submit(bus, make_submit("r", base="b"), make_submit("job", base="b", gateway=""))
        for number in range(1, 2 if noted else 1 + MAX_LOST):
            old, worker = worker, await _back(bus, worker, f"w{number}", noted=noted)
            assert old.wid != worker.wid
        await becomes(bus, "r", "failed", worker)
        found = error_from(await bus._redis.hget(bus.keys.req("r"), "error"))
        assert found.code == "base_failed"
        assert set((await bus.members.bases())[1]) == {"b"}
        assert await state(bus, "job") == "queued"
        await submit(bus, make_submit("other", base="a"))
        await holds(worker, "other")
        ((_, newest),) = await bus.audit.newest(1)
        assert newest.outcome == "base_failed"


async def _back(bus: Bus, worker: FakeWorker, wid: str, *, noted: bool) -> FakeWorker:
    """Obey an order, and come back with the base that it had."""
    await _ordered(worker)
    await bus.members.leave(worker.wid)
    if noted:
        await bus.members.note_failure("b", "no memory")
    return await _join(bus, wid, "a")


async def test_a_leader_that_comes_after_the_order_goes_on(bus: Bus) -> None:
    """The order was given, and the worker is swapping; or it was lost with the queue's last second of writes."""
    worker = await _join(bus, "w1", "a")
    for base in ("b", "c"):
        await bus._redis.hset(bus.keys.bases, base, m.encode(served(base)))
    await submit(bus, make_submit("r", base="b", submitted_ms=now_ms()))
    async with running_scheduler(bus):
        await _ordered(worker)
    worker.orders.clear()
    async with running_scheduler(bus):
        worker = await _becomes(bus, worker, "b", "w2")
        await holds(worker, "r")


async def test_a_worker_of_a_removed_base_becomes_another_one(bus: Bus) -> None:
    """It may be the only worker of its fleet."""
    worker = await _join(bus, "w1", "b")
    for base in ("a", "c"):  # otherwise it would serve c once, to learn its model
        await bus._redis.hset(bus.keys.bases, base, m.encode(served(base)))
    await bus.added_bases.add("b", "/models/b", 31)
    await bus.added_bases.remove("b")
    async with running_scheduler(bus):
        await submit(bus, make_submit("r", base="a"))
        left, worker = worker, await _becomes(bus, worker, "a", "w2")
        assert {order.kind for order in left.orders} == {"serve"}, "it was not drained"
        await holds(worker, "r")


def test_no_worker_becomes_a_base_that_was_taken_away() -> None:
    """Not even to serve it once, and no gateway accepts calls for it."""
    scheduler = scheduler_of(beat("a"), known=["a", "c"])
    scheduler.workers.removed = frozenset({"b"})
    assert ordered(scheduler, 1000.0) == ordered(scheduler, 1000.0 + 2 * TOGETHER_MS) == {}
    assert set(scheduler.bases()) == {"a", "c"}

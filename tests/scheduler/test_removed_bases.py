"""A removed base: its waiting requests end once, its running ones finish, its workers drain, and it disappears."""

from __future__ import annotations

import json

from helpers.waiting import wait_until

from protocol.queue.bus import Bus
from protocol.wire import messages as m
from tests.scheduler.fakes import (
    GATEWAY,
    FakeWorker,
    becomes,
    deltas,
    holds,
    make_submit,
    running_scheduler,
    state,
    submit,
)
from tests.scheduler.test_late_bases import join, served


async def test_what_waits_ends_what_runs_is_finished_and_its_workers_drain(bus: Bus) -> None:
    await bus.added_bases.add("b", "/models/b", 31)
    first, second = await (await join(bus, "w1", "a")).join(), await join(bus, "w2", "b")
    second.capacity = 1
    await second.join()
    await bus.streams.create(bus.keys.out(GATEWAY), 60)
    async with running_scheduler(bus):
        await submit(bus, make_submit("runs", base="b"))
        await holds(second, "runs")
        await submit(bus, *(make_submit(f"waits{i}", base="b", tenant=f"t{i}") for i in range(20)))

        async def is_full() -> bool:
            await second.read()
            await second.beat()
            found = await bus.get(bus.keys.status, m.SchedulerStatus)
            return found is not None and "b" in found.bases and found.bases["b"].queued + len(second.held) == 21

        await wait_until(is_full, "the scheduler has all")
        held = set(second.held)
        waiting = [f"waits{i}" for i in range(20) if f"waits{i}" not in held]
        assert waiting
        await bus.added_bases.remove("b")
        for rid in waiting:
            await becomes(bus, rid, "failed", first, second)

        async def is_drained() -> bool:
            await second.read()
            return any(order.kind == "drain" for order in second.orders)

        await wait_until(is_drained, "its worker is told to drain")
        second.draining = True
        await second.beat()
        await submit(bus, make_submit("late", base="b"))  # from a gateway that has not read the removal yet
        await becomes(bus, "late", "failed", first, second)
        for rid in held:
            await second.write(rid, end=True)
        assert [await state(bus, rid) for rid in held] == ["completed"] * len(held)
        ends = [delta for delta in await deltas(bus) if delta.finish]
        assert sorted(delta.rid for delta in ends) == sorted([*waiting, "late", *held]), "each ends once"
        errors = {json.loads(delta.error)["code"] for delta in ends if delta.error}
        assert errors == {"base_not_served"}
        assert [base.name for base in (await bus.members.bases())[0]] == ["a", "b"]
        await bus.members.leave("w2")

        async def is_forgotten() -> bool:
            await first.beat()
            return [base.name for base in (await bus.members.bases())[0]] == ["a"]

        await wait_until(is_forgotten, "its record goes with its last worker")
        await submit(bus, make_submit("too late", base="b"), make_submit("other", base="a"))
        await holds(first, "other")
        await becomes(bus, "too late", "failed", first)
        assert set(first.held) == {"other"}, "the only base that is left gets nothing of it"


async def test_what_a_worker_hands_back_of_a_removed_base_runs_on_no_other(bus: Bus) -> None:
    first, second = await (await join(bus, "w1", "a")).join(), await (await join(bus, "w2", "b")).join()
    async with running_scheduler(bus, beat_timeout_s=0.6):
        await submit(bus, make_submit("b1", base="b"), make_submit("b2", base="b"))
        await holds(second, "b1", "b2")
        await bus.added_bases.add("b", "/models/b", 31)
        await bus.added_bases.remove("b")
        await bus.members.silence("w2")  # the worker dies, and its requests are queued again
        for rid in ("b1", "b2"):
            await becomes(bus, rid, "failed", first)
        assert first.held == {}


async def test_a_base_that_comes_back_at_once_is_served_again(bus: Bus) -> None:
    await bus.added_bases.add("b", "/models/b", 31)
    first = await (await join(bus, "w1", "a")).join()
    async with running_scheduler(bus):
        for _ in range(5):
            await bus.added_bases.remove("b")
            await bus.added_bases.add("b", "/models/b", 31)
        await bus.members.join(m.WorkerBeat(wid="w2", name="w2", capacity=8), served("b"), 3_600_000)
        second = await FakeWorker(bus, "w2", base="b").join()
        await submit(bus, make_submit("b1", base="b"))
        await holds(second, "b1")
        assert first.held == {}


async def test_why_it_did_not_start_goes_with_it(bus: Bus) -> None:
    """It has no record, since no worker of it has ever joined. Once repaired and added again, it has not failed yet."""
    await bus.added_bases.add("b", "/models/b", 31)
    await bus.members.note_failure("b", "no memory")
    first = await (await join(bus, "w1", "a")).join()
    async with running_scheduler(bus):
        await bus.added_bases.remove("b")

        async def is_forgotten() -> bool:
            await first.beat()
            return (await bus.members.bases())[1] == {}

        await wait_until(is_forgotten, "nothing is left of it")
        assert [base.name for base in (await bus.members.bases())[0]] == ["a"]

"""The record of bases that operators add and remove, and its effect on bases that workers have reported."""

from __future__ import annotations

import asyncio

import pytest

from protocol.queue.added_bases import MAX_REMOVED
from protocol.queue.bus import Bus
from protocol.wire import messages as m
from protocol.wire.errors import Conflict, NotFound
from tests.protocol.queue.test_bases import base, join, names


async def test_adding_is_repeated_without_effect_and_removing_is_remembered(bus: Bus) -> None:
    record = bus.added_bases
    assert await record.add("b", "/models/b", 31)
    one = await record.get()
    assert {name: found.model for name, found in one.bases.items()} == {"b": "/models/b"}
    assert one.bases["b"].added_ms > 0
    assert not await record.add("b", "/models/b", 31)
    assert await record.get() == one
    await record.remove("b")
    assert await record.get() == m.AddedBases(removed=["b"])
    with pytest.raises(NotFound):
        await record.remove("b")
    assert await record.add("b", "/models/other", 31)
    back = await record.get()
    assert (back.bases["b"].model, back.removed) == ("/models/other", [])


async def test_a_name_a_model_and_a_place_are_taken_once(bus: Bus) -> None:
    await bus.added_bases.add("b", "/models/b", 1)
    for name, model, words in (
        ("b", "/models/c", "remove it first"),
        ("c", "/models/b", "name each base model once"),
        ("c", "/models/c", "no more than 1"),
    ):
        with pytest.raises(Conflict, match=words):
            await bus.added_bases.add(name, model, 1)


async def test_the_names_of_removed_bases_are_bounded(bus: Bus) -> None:
    for number in range(3 * MAX_REMOVED):
        await bus.added_bases.add(f"n{number}", f"/m/{number}", 31)
        await bus.added_bases.remove(f"n{number}")
    known = await bus.added_bases.get()
    assert known.removed == [f"n{number}" for number in range(2 * MAX_REMOVED, 3 * MAX_REMOVED)]
    assert len(m.encode(known)) < 2_000


async def test_gateways_that_change_it_together_lose_nothing(bus: Bus) -> None:
    """Concurrent additions and removals: each change is applied to the result of the previous one."""
    async with asyncio.TaskGroup() as group:
        for number in range(31):
            group.create_task(bus.added_bases.add(f"n{number}", f"/m/{number}", 31))
    assert len((await bus.added_bases.get()).bases) == 31
    with pytest.raises(Conflict):
        await bus.added_bases.add("more", "/m/more", 31)
    found = await asyncio.gather(*(bus.added_bases.remove(f"n{i % 31}") for i in range(62)), return_exceptions=True)
    assert sum(isinstance(one, NotFound) for one in found) == 31
    known = await bus.added_bases.get()
    assert (known.bases, len(known.removed)) == ({}, 31)


async def test_a_fleet_of_one_base_lets_another_in_once_it_is_added(bus: Bus) -> None:
    await join(bus, "w1", base("a"), several=False)
    with pytest.raises(Conflict, match="cannot join it"):
        await join(bus, "w2", base("b"), several=False)
    await bus.added_bases.add("b", "/models/b", 31)
    assert await join(bus, "w2", base("b"), several=False) == "b"
    assert await join(bus, "w3", base("a"), several=False) == "a", "a worker of the first base that is started again"
    await bus.added_bases.remove("b")
    with pytest.raises(Conflict, match="was removed from this fleet"):
        await join(bus, "w4", base("b"), several=False)


async def test_the_worker_of_an_added_base_leaves_others_their_records(bus: Bus) -> None:
    """Even if no other worker is alive for a moment, because the only one restarts or swaps."""
    for wid, name in (("w1", "a"), ("w2", "b")):
        await join(bus, wid, base(name))
    await bus.added_bases.add("x", "/models/x", 31)
    for wid in ("w1", "w2"):
        await bus.members.leave(wid)
    assert await join(bus, "w3", base("x"), several=False) == "x"
    assert await names(bus) == ["a", "b", "x"], "the first base stays the first"


async def test_a_worker_that_swaps_keeps_the_records_of_added_bases(bus: Bus) -> None:
    await join(bus, "w1", base("a"))
    await bus.added_bases.add("x", "/models/x", 31)
    await join(bus, "w2", base("x"), several=False)
    for wid in ("w1", "w2"):
        await bus.members.leave(wid)
    beat = m.WorkerBeat(wid="w3", name="w1", capacity=1)
    await bus.members.join(beat, base("b"), 60_000, fleet=["a", "b"])
    assert await names(bus) == ["a", "b", "x"]


@pytest.mark.parametrize("first", ["a", "b"])
async def test_a_removed_base_is_forgotten_with_its_last_worker(bus: Bus, first: str) -> None:
    await bus.added_bases.add("b", "/models/b", 31)
    wids = {"w1": first, "w2": "b" if first == "a" else "a"}
    for wid, name in wids.items():
        await join(bus, wid, base(name))
    await bus.members.note_failure("b", "no memory")
    await bus.added_bases.remove("b")
    await bus.members.drop_base("b")
    assert set(await names(bus)) == {"a", "b"}, "its worker would count as one of the only base that is left"
    await bus.members.leave(next(wid for wid, name in wids.items() if name == "b"))
    await bus.members.drop_base("b")
    assert await bus.members.bases() == ([base("a")], {})
    await bus.members.drop_base("b")
    assert await names(bus) == ["a"]


async def test_nobody_is_told_why_a_removed_base_does_not_start(bus: Bus) -> None:
    """A supervisor restarts its worker, which may not join. Once it is added again, it has not failed yet."""
    await join(bus, "w1", base("a"))
    await bus.added_bases.add("b", "/models/b", 31)
    await bus.added_bases.remove("b")
    for keep in (False, True):
        await bus.members.note_failure("b", "it was taken away", keep=keep)
    await bus.added_bases.add("b", "/models/b", 31)
    assert (await bus.members.summary(60_000)).failures == {}
    await bus.members.note_failure("b", "no memory")
    assert (await bus.members.summary(60_000)).failures == {"b": "no memory"}


async def test_a_base_whose_worker_joins_meanwhile_stays(bus: Bus) -> None:
    """A worker of an earlier version does not know of removals. Every live worker's base must keep its record."""
    await join(bus, "w", base("a"))
    for number in range(40):
        joins = asyncio.create_task(join(bus, f"w{number}", base("b")))
        for _ in range(number % 5):
            await asyncio.sleep(0)
        await asyncio.gather(joins, bus.members.drop_base("b"), bus.members.drop_base("b"))
        assert await names(bus) == ["a", "b"]
        await bus.members.leave(f"w{number}")

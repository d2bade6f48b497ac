"""Slots shared by tenants: who is next, who leaves the line, and how many one tenant may hold."""

from __future__ import annotations

import asyncio

import pytest

from protocol.runtime.fair_slots import FairSlots
from protocol.wire.errors import Overloaded, Unavailable

MAX_BODY = 4 << 20


async def taken(places: FairSlots, *tenants: str) -> list[asyncio.Task[None]]:
    """Let tenants request slots, in this order."""
    tasks = []
    for tenant in tenants:
        tasks.append(asyncio.create_task(places.take(tenant)))
        await asyncio.sleep(0)
    return tasks


def done(tasks: list[asyncio.Task[None]]) -> list[bool]:
    return [task.done() for task in tasks]


async def test_a_free_place_goes_to_whoever_holds_fewest() -> None:
    places = FairSlots(2)
    tasks = await taken(places, "a", "a", "a", "a", "b")
    assert done(tasks) == [True, True, False, False, False]
    places.give("a")
    await asyncio.sleep(0)
    assert done(tasks) == [True, True, False, False, True]
    places.give("b")
    await asyncio.sleep(0)
    assert done(tasks) == [True, True, True, False, True]
    places.give("a")
    await asyncio.sleep(0)
    assert done(tasks) == [True] * 5


async def test_who_has_left_the_line_is_not_counted_any_more() -> None:
    places = FairSlots(1, num_waiting=4)
    [first, *gone] = await taken(places, "a", "b", "c", "b", "d")
    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)
    tasks = await taken(places, "b", "c", "b", "d")
    assert done(tasks) == [False] * 4, "none was refused"
    tasks[0].cancel()
    await asyncio.sleep(0)
    for left in ("a", "c", "b"):
        places.give(left)
        await asyncio.sleep(0)
    assert done([first, *tasks]) == [True] * 5
    assert not places._waiting


async def test_one_tenant_leaves_room_for_others() -> None:
    places = FairSlots(3, num_of_tenant=2)
    tasks = await taken(places, "a", "a", "a", "b")
    assert done(tasks) == [True, True, False, True]
    places.give("b")
    await asyncio.sleep(0)
    assert done(tasks) == [True, True, False, True]  # tenant a has its share
    places.give("a")
    await asyncio.sleep(0)
    assert done(tasks)[2]


async def test_the_line_is_bounded_and_half_of_it_is_for_others() -> None:
    places = FairSlots(1, num_waiting=4)
    tasks = await taken(places, "a", "a", "a")
    with pytest.raises(Overloaded, match="2 large bodies are waiting"):
        await places.take("a")
    tasks += await taken(places, "b", "b")
    with pytest.raises(Overloaded, match="4 large bodies are waiting"):
        await places.take("c")
    own = FairSlots(1, 1, 3, 1, lambda num: Unavailable(f"{num} wait"))
    tasks += await taken(own, "a", "a", "b")
    with pytest.raises(Unavailable, match="2 wait"):
        own.check("b")
    own.check("c")
    for task in tasks:
        task.cancel()


async def test_tenants_take_turns_at_one_slot() -> None:
    places, order = FairSlots(1), list[str]()

    async def wait(tenant: str) -> None:
        async with places.held(tenant):
            order.append(tenant)
            await asyncio.sleep(0)

    await asyncio.gather(*map(wait, "aaaabcb"))
    assert "".join(order) == "aabcaba"


async def test_who_leaves_the_line_takes_no_place() -> None:
    places = FairSlots(1)
    first, second, third = await taken(places, "a", "b", "c")
    second.cancel()
    places.give("a")  # before the second has noticed
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert done([first, second, third]) == [True, True, True]
    [fourth] = await taken(places, "d")
    third_and_fourth = [third, fourth]
    assert done(third_and_fourth) == [True, False]
    fourth.cancel()
    places.give("c")
    await places.take("e")


async def test_a_place_that_came_too_late_is_given_back() -> None:
    places = FairSlots(1)
    _, second = await taken(places, "a", "b")
    places.give("a")  # goes to the second, which is cancelled before it runs
    second.cancel()
    await asyncio.wait([second])
    await places.take("c")


async def test_only_who_would_have_a_further_place_is_kept_waiting_by_others() -> None:
    places = FairSlots(3, num_of_tenant=2)
    tasks = await taken(places, "a", "a", "a")
    assert (done(tasks), places.num_kept_waiting) == ([True, True, False], 0), "a place is free, but it has its share"
    tasks += await taken(places, "b", "b", "b", "c")
    assert places.num_kept_waiting == 2, "one of b, which may have one more, and c"
    places.give("a")
    await asyncio.sleep(0)
    assert (done(tasks)[-1], places.num_kept_waiting) == (True, 2), "one of a and one of b"
    for task in tasks:
        task.cancel()

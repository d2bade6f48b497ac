"""Pending events are stored per tenant, and tenants are served in turn; the previous version's records are migrated."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from protocol.queue.bus import Bus, now_ms
from protocol.queue.kept.webhooks import MAX_GIVEN_UP
from protocol.wire import messages as m


def endpoint(number: int, tenant: str = "a") -> m.WebhookEndpoint:
    return m.WebhookEndpoint(
        id=f"we_{number}", tenant=tenant, name="n", url="https://a.example", events=["job.completed"], secret="s",
        hint="h", created_ms=number, updated_ms=number,
    )  # fmt: skip


def delivery(number: int, tenant: str = "a", **facts: Any) -> m.Delivery:
    return m.Delivery(
        id=f"evt_{number}:we_1", event=f"evt_{number}", endpoint="we_1", tenant=tenant, type="job.completed",
        subject=f"job_{number}", created_ms=now_ms(), **facts,
    )  # fmt: skip


async def turns(bus: Bus, num: int, of_turn: int) -> list[str]:
    """Return the tenant of each delivery taken in `num` tenants' turns, in order."""
    taken: list[str] = []
    for tenant in await bus.webhooks.tenants_with_deliveries(num):
        taken += [one.tenant for one in await bus.webhooks.take(tenant, of_turn, 60_000)]
    return taken


async def end(bus: Bus, tenant: str, id_: str, type_: str = "batch.completed") -> None:
    await bus._redis.xadd(bus.keys.ends_of(tenant), {"id": id_, "type": type_})
    await bus._redis.zadd(bus.keys.ends, {tenant: now_ms()}, nx=True)


async def test_no_more_endpoints_than_allowed_whoever_asks_at_once(bus: Bus) -> None:
    made = await asyncio.gather(*(bus.webhooks.keep_endpoint(endpoint(number), 20) for number in range(60)))
    assert sum(made) == 20
    kept = await bus.webhooks.endpoints("a")
    assert len(kept) == 20
    assert await bus.webhooks.keep_endpoint(kept[0], 20), "an earlier reply was lost"
    assert await bus.webhooks.keep_endpoint(endpoint(0, "b"), 20), "another tenant's do not count"
    assert await bus.webhooks.keep_endpoint(kept[0])
    assert await bus.webhooks.delete_endpoint("a", kept[0].id)
    assert not await bus.webhooks.keep_endpoint(kept[0]), "a change does not bring back what was deleted"


async def test_a_tenant_with_one_delivery_has_the_next_turn(bus: Bus) -> None:
    """A thousand deliveries overdue for an hour take one turn, not a thousand."""
    for number in range(0, 1000, 100):
        await bus.webhooks.add("a", [delivery(number + one) for one in range(100)], 1000)
    assert await turns(bus, 8, 4) == ["a"] * 4
    await bus.webhooks.add("b", [delivery(1, "b")], 1000)
    order = await turns(bus, 8, 4) + await turns(bus, 8, 4)
    assert order.count("b") == 1
    assert order.index("b") <= 4


async def test_tenants_take_turns_however_few_are_looked_at(bus: Bus) -> None:
    names = [f"t{number:02}" for number in range(30)]
    for name in names:
        await bus.webhooks.add(name, [delivery(number, name) for number in range(9)], 1000)
    seen: list[str] = []
    for _ in range(10):
        seen += await turns(bus, 3, 1)
    assert sorted(seen) == names, "each has had one turn before any has had two"


async def test_a_turn_without_room_does_not_block_the_line(bus: Bus) -> None:
    for name in ("a", "b"):
        await bus.webhooks.add(name, [delivery(1, name)], 1000)
    [first] = await bus.webhooks.tenants_with_deliveries(1)
    assert await bus.webhooks.take(first, 0, 60_000) == []
    [second] = await bus.webhooks.tenants_with_deliveries(1)
    assert {first, second} == {"a", "b"}


async def test_what_was_taken_is_due_again_if_nothing_is_heard(bus: Bus) -> None:
    await bus.webhooks.add("a", [delivery(1), delivery(2)], 1000)
    assert len(await bus.webhooks.take("a", 9, 60_000)) == 2
    assert await bus.webhooks.take("a", 9, 60_000) == []
    assert await bus.webhooks.tenants_with_deliveries(9) == []
    await bus.webhooks.later(delivery(1, attempts=1), now_ms() - 1)
    assert await bus.webhooks.tenants_with_deliveries(9) == ["a"]
    [again] = await bus.webhooks.take("a", 9, 0)
    assert again.attempts == 1
    assert [one.id for one in await bus.webhooks.take("a", 9, 60_000)] == [again.id]
    for number in (1, 2):
        await bus.webhooks.done(delivery(number))
    await bus._redis.zadd(bus.keys.outboxes, {"a": 0})
    assert await bus.webhooks.take("a", 9, 60_000) == []
    assert await bus._redis.exists(bus.keys.outboxes, bus.keys.outbox("a"), bus.keys.outbox_times("a")) == 0


async def test_deliveries_that_wait_are_bounded(bus: Bus) -> None:
    assert await bus.webhooks.add("a", [delivery(number) for number in range(4)], 3) == [-1, -1, -1, 3]
    assert await bus.webhooks.add("a", [delivery(0)], 3) == [-1], "an earlier reply was lost"
    assert await bus.webhooks.add("b", [delivery(0, "b")], 3) == [-1]
    assert len(await bus.webhooks.waiting("a")) == 3


async def test_an_endpoint_that_takes_nothing_leaves_places_to_others(bus: Bus) -> None:
    for number in (1, 2, 3):
        await bus.webhooks.keep_endpoint(endpoint(number), 20)
    ours = [delivery(number) for number in range(12)]
    assert await bus.webhooks.add("a", ours, 12) == [-1] * 6 + [6] * 6, "alone, it gets half of the places"
    others = [msgspec.structs.replace(one, id=f"{one.event}:we_2", endpoint="we_2") for one in ours]
    assert await bus.webhooks.add("a", others, 12) == [-1] * 4 + [10] * 8, "then each gets its third"
    assert await bus.webhooks.add("a", [ours[0], others[0]], 12) == [-1, -1], "earlier replies were lost"


async def test_an_endpoint_leaves_with_its_deliveries(bus: Bus) -> None:
    """They would keep those to the tenant's other endpoints from being recorded, until their next attempts."""
    await bus.webhooks.keep_endpoint(endpoint(1), 20)
    ours = [delivery(number) for number in range(3)]
    other = msgspec.structs.replace(delivery(3), id="evt_3:we_11", endpoint="we_11")
    await bus.webhooks.add("a", [*ours, other], 4)
    for one in ours:
        await bus.webhooks.later(one, now_ms() + 60_000)
    assert await bus.webhooks.delete_endpoint("a", "we_1")
    assert await bus.webhooks.waiting("a") == [other]
    assert await bus._redis.zrange(bus.keys.outbox_times("a"), 0, -1) == [b"evt_3:we_11"]
    assert not await bus.webhooks.delete_endpoint("a", "we_1")


async def test_ends_are_told_by_tenant_and_forgotten_once(bus: Bus) -> None:
    for number in range(40):
        await end(bus, "a", f"batch_{number}")
    await end(bus, "b", "batch_b")
    assert await bus.webhooks.tenants_with_ends(1) == ["a"]
    ended = await bus.webhooks.ended("a", 16)
    assert [one.id for one in ended] == [f"batch_{number}" for number in range(16)]
    await bus.webhooks.drop_ends("a", ended)
    assert await bus.webhooks.tenants_with_ends(9) == ["b", "a"]
    await bus.webhooks.drop_ends("a", ended)  # by a gateway that has lost the lead without noticing
    assert (await bus.webhooks.ended("a", 1))[0].id == "batch_16"
    await bus.webhooks.drop_ends("b", await bus.webhooks.ended("b", 16))
    assert await bus.webhooks.tenants_with_ends(9) == ["a"]
    assert await bus._redis.exists(bus.keys.ends_of("b")) == 0


async def test_those_given_up_are_the_newest(bus: Bus) -> None:
    for number in range(MAX_GIVEN_UP + 3):
        await bus.webhooks.give_up("a", [delivery(number)])
    assert len(await bus.webhooks.given_up("a")) == MAX_GIVEN_UP


async def test_what_the_version_before_kept_is_taken_over(bus: Bus) -> None:
    redis, keys = bus._redis, bus.keys
    for number in range(100):
        tenant = f"t{number % 3}"
        await redis.hset(keys.old_hooks, f"{tenant}:we_{number}", m.encode(endpoint(number, tenant)))
        one = delivery(number, tenant, attempts=2)
        await redis.hset(keys.old_deliveries, one.id, m.encode(one))
        await redis.zadd(keys.old_delivery_times, {one.id: 1000 + number})
        at = await redis.xadd(keys.old_ends, {"tenant": tenant, "id": f"batch_{number}", "type": "batch.completed"})
        if number == 39:
            await redis.set(keys.old_cursor, at)
    await redis.xadd(keys.old_ends, {"neither": "tenant nor id"})
    await redis.hset(keys.old_deliveries, "bad", b"\x81")
    await redis.zadd(keys.old_delivery_times, {"bad": 1})
    await redis.hset(keys.old_hooks, "t0:we_0", m.encode(endpoint(0, "t0")))
    await redis.hset(keys.hooks("t0"), "we_0", m.encode(endpoint(7, "t0")))  # changed since then
    num_steps = 0
    while await bus.webhooks.take_over(16):
        num_steps += 1
        assert num_steps < 100
    assert num_steps > 3, "what is moved at once is bounded"
    for number in range(3):
        tenant, mine = f"t{number}", [one for one in range(100) if one % 3 == number]
        kept = await bus.webhooks.endpoints(tenant)
        assert len(kept) == len(mine)
        assert {one.subject for one in await bus.webhooks.waiting(tenant)} == {f"job_{one}" for one in mine}
        taken = await bus.webhooks.take(tenant, 99, 60_000)
        assert [one.subject for one in taken] == [f"job_{one}" for one in mine], "the most overdue first"
        assert {one.attempts for one in taken} == {2}
        assert [one.id for one in await bus.webhooks.ended(tenant, 99)] == [
            f"batch_{one}" for one in mine if one > 39
        ]  # fmt: skip
    assert (await bus.webhooks.endpoints("t0"))[0].created_ms != 0, "what was changed since stays"
    old = (keys.old_hooks, keys.old_ends, keys.old_cursor, keys.old_deliveries, keys.old_delivery_times)
    assert await redis.exists(*old) == 0
    await redis.xadd(keys.old_ends, {"tenant": "t0", "id": "batch_late", "type": ""})  # by a worker of that version
    assert await bus.webhooks.take_over(16)
    assert (await bus.webhooks.ended("t0", 99))[-1].id == "batch_late"
    await bus.webhooks.take_over(16)

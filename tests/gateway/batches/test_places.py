"""Places of a gateway's batches: whose batches run when there are more than places."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from helpers.waiting import wait_until

from gateway.batches.run import BatchPace
from gateway.files.storage import FolderStorage
from protocol.queue.bus import Bus
from tests.gateway.batches.test_runner import PACE, Endpoint, World
from tests.gateway.batches.test_trouble import ShakyWorld, batch_of


async def test_tenants_with_two_places_leave_one_to_a_third_tenant(bus: Bus, tmp_path: Path) -> None:
    """The newest batch is left, and continues when there is a place again."""
    world = World(bus, tmp_path)
    held = [
        await batch_of(world, [{"n": number}], f"{number}-{tenant}", tenant) for number, tenant in enumerate("abab")
    ]
    endpoint = Endpoint(holds=lambda number: number < 4)
    async with world.gateway("g1", endpoint, replace(PACE, second_s=0.0)):
        await wait_until(lambda: len(endpoint.asked) == BatchPace().max_batches, "all places are held")
        await batch_of(world, [{"n": 4}], "1", "t")
        assert (await world.ended()).status == "completed"
        await wait_until(lambda: len(endpoint.asked) == BatchPace().max_batches + 2, "the batch continues")
        assert sorted(endpoint.asked) == [0, 1, 2, 3, 3, 4]
        endpoint.go.set()

        async def all_ended() -> bool:
            found = await bus.batches.get_many([batch.id for batch in held])
            return [(batch.status, batch.completed) for batch in found] == [("completed", 1)] * 4

        await wait_until(all_ended, "every batch has its answer")


async def test_tenants_whose_batches_take_a_day_take_turns_with_others(bus: Bus, tmp_path: Path) -> None:
    """Each continues where it was, and none of four waits for ever, though there is one place."""
    world, tenants = World(bus, tmp_path), "abcd"
    for number, tenant in enumerate(tenants):
        await batch_of(world, [{"n": 10 * number}, {"n": 10 * number + 1}], tenant, tenant)
    endpoint = Endpoint(holds=lambda number: number % 10 == 1)
    async with world.gateway("g1", endpoint, replace(PACE, max_batches=1, turn_s=0.15)):
        held = {10 * number + 1 for number in range(len(tenants))}
        await wait_until(lambda: min(Counter(endpoint.asked)[number] for number in held) >= 2, "each had two turns")
        endpoint.go.set()

        async def all_ended() -> bool:
            found = await bus.batches.get_many([f"batch_{tenant}" for tenant in tenants])
            return [(batch.status, batch.completed) for batch in found] == [("completed", 2)] * len(tenants)

        await wait_until(all_ended, "every batch has its answers")


async def test_a_batch_that_writes_its_files_keeps_its_place(bus: Bus, tmp_path: Path) -> None:
    go = asyncio.Event()

    class Slow(FolderStorage):
        async def write(self, name: str, chunks: AsyncIterator[bytes | bytearray]) -> int:
            if name.endswith("-output"):
                await go.wait()
            return await super().write(name, chunks)

    world = ShakyWorld(bus, tmp_path)
    world.shaky = Slow(tmp_path)  # type: ignore[assignment]
    writing = await batch_of(world, [{"n": 1}], "a", "a")
    endpoint = Endpoint()
    async with world.gateway("g1", endpoint, replace(PACE, max_batches=1, turn_s=0.0)):

        async def is_finalizing() -> bool:
            found = await bus.batches.get(writing.id, "a")
            return found is not None and found.status == "finalizing"

        await wait_until(is_finalizing, "it writes")
        await batch_of(world, [{"n": 2}], "1", "t")
        renewed: set[float] = set()

        async def is_renewed() -> bool:
            renewed.add(await bus._redis.zscore(bus.keys.open_batches, "a:batch_a"))
            return len(renewed) > 5

        await wait_until(is_renewed, "the gateway has looked several times for a batch to run")
        assert endpoint.asked == [1]
        go.set()
        assert (await world.ended()).status == "completed"
    assert int(await bus._redis.hget(bus.keys.batch(writing.id), "epoch")) == 1, "it was interrupted"


async def test_a_tenant_s_older_batch_is_not_interrupted(bus: Bus, tmp_path: Path) -> None:
    """Not even while its newer one is too young: many short batches of others would end its turn again and again."""
    world = World(bus, tmp_path)
    for number, tenant in enumerate("aabc"):
        await batch_of(world, [{"n": number}], f"{number}-{tenant}", tenant)
    endpoint = Endpoint(holds=lambda number: number < 4)
    async with world.gateway("g1", endpoint, replace(PACE, second_s=1000.0, turn_s=0.0)):
        await wait_until(lambda: len(endpoint.asked) == BatchPace().max_batches, "all places are held")
        await batch_of(world, [{"n": 4}], "1", "t")
        assert (await world.ended()).status == "completed"
        assert (endpoint.asked.count(0), endpoint.asked.count(1)) == (1, 1)
        endpoint.go.set()


async def test_many_interrupted_batches_hide_no_other(bus: Bus, tmp_path: Path) -> None:
    """They wait behind what has waited before, also if more wait than are looked at."""
    world = World(bus, tmp_path)
    waiting = await batch_of(world, [{"n": 1}], "z", "z")
    for tenant in "abcde":
        batch = await batch_of(world, [{"n": 1}], tenant, tenant)
        claimed = await bus.batches.claim(batch.id, tenant, "g1", 60_000)
        assert claimed is not None
        assert await bus.batches.save(batch, claimed.epoch, leaves=True)
    assert (await bus.batches.waiting(3))[0] == ("z", waiting.id)

"""Places of a gateway's batches: whose batches run when there are more than places."""

from __future__ import annotations

from pathlib import Path

from helpers.waiting import wait_until

from gateway.batches.run import BatchPace
from protocol.queue.bus import Bus
from tests.gateway.batches.test_runner import Endpoint, World
from tests.gateway.batches.test_trouble import batch_of


async def test_tenants_with_two_places_leave_one_to_a_third_tenant(bus: Bus, tmp_path: Path) -> None:
    """The newest batch is left, and continues when there is a place again."""
    world = World(bus, tmp_path)
    held = [
        await batch_of(world, [{"n": number}], f"{number}-{tenant}", tenant) for number, tenant in enumerate("abab")
    ]
    endpoint = Endpoint(holds=lambda number: number < 4)
    async with world.gateway("g1", endpoint):
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

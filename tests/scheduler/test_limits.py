"""A tenant's limits while workers and gateways die: on a real queue, with the scheduler that notices."""

from __future__ import annotations

from protocol.queue.books.quota import Quota
from protocol.queue.bus import Bus, StepResult, StepRow
from tests.scheduler.fakes import GATEWAY, FakeWorker, becomes, holds, make_submit, running_scheduler, submit


async def test_who_dies_takes_none_of_its_tenants_limits_along(bus: Bus) -> None:
    """A place and a reservation are held while a request moves, and are free once it will not go on."""
    quota = Quota("acme", tokens_per_minute=40, concurrency=2)  # a request reserves 4 + 4
    running, used = bus.keys.running("acme"), bus.keys.quota("acme")
    await bus.members.beat(bus.keys.gateway_beat("alive"), bus.keys.gateways, "alive", b"url", 60_000)
    await bus.members.beat(bus.keys.gateway_beat(GATEWAY), bus.keys.gateways, GATEWAY, b"url", 60_000)
    first = await FakeWorker(bus, "w1").join()
    async with running_scheduler(bus, beat_timeout_s=0.6, max_attempts=2):
        assert await submit(bus, make_submit("moves"), make_submit("poison"), quota=quota) == "ok"
        await holds(first, "moves", "poison")
        await first.write("moves", 2)
        second = await FakeWorker(bus, "w2").join()
        await holds(second, "moves", "poison")  # the first one beats no more
        assert await submit(bus, make_submit("r"), quota=quota) == "limit"
        assert float(await bus._redis.hget(used, "tokens")) > 15
        assert await second.write("moves", 2, end=True) == []
        assert await bus._redis.zrange(running, 0, -1) == [b"poison"]
        await becomes(bus, "poison", "failed")  # nor does the second
        assert await bus._redis.zcard(running) == 0
        assert float(await bus._redis.hget(used, "tokens")) <= 8 + 4  # its prompt was computed

        third = await FakeWorker(bus, "w3", capacity=1).join()
        await submit(bus, make_submit("begun"), quota=quota)
        await submit(bus, *(make_submit(rid, gateway="alive") for rid in ("full", "fuller")))
        await holds(third, "begun", "full", "fuller")
        await submit(bus, make_submit("queued"), quota=quota)
        await bus._redis.delete(bus.keys.gateway_beat(GATEWAY))
        await becomes(bus, "queued", "cancelled", third)
        assert await bus._redis.zrange(running, 0, -1) == [b"begun"]  # until its worker has let go
        assert await third.write("begun") == ["cancelled"]
        end = StepRow("begun", third.held["begun"].epoch, 0, b"", b"", "cancelled", "cancelled")
        assert await bus.step("w3", StepResult(rows=[end])) == []
        assert await bus._redis.zcard(running) == 0
        assert float(await bus._redis.hget(used, "tokens")) <= 8 + 4 + 4


async def test_a_worker_is_told_who_yields_because_it_is_alone(bus: Bus) -> None:
    worker = await FakeWorker(bus, "w1").join()
    await submit(bus, make_submit("first", tenant="a"))
    async with running_scheduler(bus):
        await holds(worker, "first")
        await submit(bus, make_submit("second", tenant="b"))
        await holds(worker, "second")
    flags = {item.rid: (item.yields, item.alone) for batch in worker.batches for item in batch}
    assert flags == {"first": (True, True), "second": (False, False)}

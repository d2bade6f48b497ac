"""The scheduler on a real queue with workers played by the test."""

from __future__ import annotations

from waiting import wait_until

from protocol.bus import Bus
from tests.scheduler.fakes import FakeWorker, make_submit, running_scheduler, submit


async def holds(worker: FakeWorker, *rids: str) -> None:
    """Wait until a worker has got these requests; it beats meanwhile."""

    async def has() -> bool:
        await worker.read()
        await worker.beat()
        return set(rids) <= worker.held.keys()

    await wait_until(has, f"{worker.wid} holds {rids}")


async def state(bus: Bus, rid: str) -> str:
    return (await bus.redis.hget(bus.keys.req(rid), "state")).decode()


async def becomes(bus: Bus, rid: str, value: str, *living: FakeWorker) -> None:
    async def has() -> bool:
        for worker in living:
            await worker.beat()
        return await state(bus, rid) == value

    await wait_until(has, f"{rid} becomes {value}")


async def test_a_batch_of_several_adapters_goes_out_in_one_entry(bus: Bus) -> None:
    worker = await FakeWorker(bus, "w1", resident=["a", "b"]).join()
    await submit(bus, *(make_submit(f"r{d}", digest=d) for d in ("", "a", "b")))
    async with running_scheduler(bus):
        await holds(worker, "r", "ra", "rb")
        assert [[item.rid for item in batch] for batch in worker.batches] == [["r", "ra", "rb"]]
        assert [item.epoch for item in worker.batches[0]] == [1, 1, 1]
        assert await bus.redis.xlen(bus.keys.sub("interactive")) == 0


async def test_a_dead_workers_requests_go_to_another_with_their_tokens(bus: Bus) -> None:
    await bus.create_stream(bus.keys.out("g-test"), 300)
    first = await FakeWorker(bus, "w1").join()
    async with running_scheduler(bus, beat_timeout_s=1.0):
        await submit(bus, make_submit("r"))
        await holds(first, "r")
        assert await first.write("r", 2) == []
        second = await FakeWorker(bus, "w2").join()
        await holds(second, "r")  # the first one beats no more
        assert second.held["r"].epoch == 3
        assert await first.write("r", 1) == ["stale"]
        assert await second.write("r", 2, end=True) == []
        assert await bus.redis.strlen(bus.keys.tok("r")) == 4 * 4
        assert not await bus.redis.exists(bus.keys.work("w1"), bus.keys.ctl("w1"))
        assert await bus.members(bus.keys.workers) == ["w2"]

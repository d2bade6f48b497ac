"""When the queue has lost its last second of writes, a worker writes them again."""

from __future__ import annotations

from helpers.waiting import wait_until

from protocol.queue.bus import Bus
from tests.gpu_worker.service.fakes import GATEWAY, assign, expected, log, running_worker, state, submit


async def test_a_log_that_lost_its_end_is_mended_before_more_is_written(bus: Bus) -> None:
    await bus.streams.create(bus.keys.out(GATEWAY), 300)
    await submit(bus, "r", max_new=100)
    async with running_worker(bus, step_s=0.01) as (worker, _):
        await assign(bus, worker.wid, "r")
        await wait_until(lambda: _has_ten(bus, "r"), "some tokens are durable")
        short = (await bus._redis.get(bus.keys.tok("r")))[: 4 * 4]
        await bus._redis.set(bus.keys.tok("r"), short, ex=600)
        await wait_until(lambda: _is_completed(bus, "r"), "it completes")
    assert await log(bus, "r") == expected(100)


async def test_a_lost_end_comes_again_while_its_neighbour_runs(bus: Bus) -> None:
    """A power cut loses the last second of writes: among them one of the two ends that a work entry waits for."""
    await bus.streams.create(bus.keys.out(GATEWAY), 300)
    await submit(bus, "ended", max_new=3)
    await submit(bus, "runs", max_new=100_000)
    own, keys = bus.keys.own, (bus.keys.req("ended"), bus.keys.body("ended"))
    async with running_worker(bus, step_s=0.01) as (worker, _):
        assert await assign(bus, worker.wid, "ended", "runs") == "ok"
        before = [await bus._redis.dump(key) for key in keys]
        await wait_until(lambda: _is_completed(bus, "ended"), "it completes")
        assert await bus._redis.hget(own(worker.wid), "ended") is None
        async with bus._redis.pipeline(transaction=True) as pipe:  # restore the queue's state of a second ago
            pipe.delete(bus.keys.tok("ended"))
            for key, value in zip(keys, before, strict=True):
                pipe.restore(key, 600_000, value, replace=True)
            pipe.hset(own(worker.wid), "ended", 1)
            await pipe.execute()
        worker._restarted = True
        worker._beat_now.set()
        await wait_until(lambda: _is_completed(bus, "ended"), "it completes again")
        assert await log(bus, "ended") == expected(3)
        assert await state(bus, "runs") == "assigned"
        assert await bus._redis.xlen(bus.keys.work(worker.wid)) == 1


async def _is_completed(bus: Bus, rid: str) -> bool:
    return await state(bus, rid) == "completed"


async def _has_ten(bus: Bus, rid: str) -> bool:
    return len(await log(bus, rid)) >= 10

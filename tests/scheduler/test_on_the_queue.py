"""The scheduler on a real queue: what it publishes, and the requests and limits of dead services."""

from __future__ import annotations

import pytest
from helpers.waiting import wait_until

from protocol.queue.books.quota import Quota
from protocol.queue.bus import Bus, StepResult, StepRow
from protocol.wire import messages as m
from scheduler.config import SchedulerConfig
from scheduler.core import Scheduler
from scheduler.recovery import Recovery
from tests.scheduler.fakes import GATEWAY, FakeWorker, becomes, holds, make_submit, running_scheduler, submit


async def test_the_status_tells_what_some_worker_knows(bus: Bus) -> None:
    await FakeWorker(bus, "old").join()
    await FakeWorker(bus, "new", knows=["later"]).join()

    async def told() -> bool:
        status = await bus.get(bus.keys.status, m.SchedulerStatus)
        return status is not None and status.knows == ["later"]

    async with running_scheduler(bus):
        await wait_until(told, "the newest worker's fields are told")


async def test_who_dies_takes_none_of_its_tenants_limits_along(bus: Bus) -> None:
    """Concurrency and reserved tokens are held while a request moves, and released once it will not continue."""
    quota = Quota("acme", tokens_per_minute=40, concurrency=2)  # a request reserves 4 + 4 tokens
    running, used = bus.keys.running("acme"), bus.keys.quota("acme")
    await bus.members.beat(bus.keys.gateway_beat("alive"), bus.keys.gateways, "alive", b"url", 3_600_000)
    await bus.members.beat(bus.keys.gateway_beat(GATEWAY), bus.keys.gateways, GATEWAY, b"url", 3_600_000)
    first = await FakeWorker(bus, "w1").join()
    async with running_scheduler(bus, beat_timeout_s=0.6, max_attempts=2):
        assert await submit(bus, make_submit("moves"), make_submit("poison"), quota=quota) == "ok"
        await holds(first, "moves", "poison")
        await first.write("moves", 2)
        second = await FakeWorker(bus, "w2").join()
        await holds(second, "moves", "poison")  # the first worker sends no more heartbeats
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
        assert await bus._redis.zrange(running, 0, -1) == [b"begun"]  # until its worker has released it
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


TOKENS = b"\1\0\0\0\2\0\0\0"


async def assign(bus: Bus, rid: str, wid: str) -> None:
    await bus.streams.create(bus.keys.work(wid), 3600)
    await bus.members.beat(bus.keys.worker_beat(wid), bus.keys.workers, wid, b"", 4000)
    await submit(bus, make_submit(rid))
    assert (await bus.assign(wid, [(m.Assigned(rid, 1, ""), 0)]))[0] == "ok"
    assert not await bus.step(wid, StepResult(rows=[StepRow(rid, 1, 0, TOKENS)]))


@pytest.mark.parametrize("cancelled", [False, True])
async def test_what_is_assigned_to_nobody_is_queued_again_with_its_tokens(bus: Bus, cancelled: bool) -> None:
    await assign(bus, "kept", "w1")
    await assign(bus, "orphan", "w2")
    if cancelled:
        await bus.cancel("orphan")
    await bus.members.leave("w2")
    recovery = Recovery(bus, Scheduler(SchedulerConfig()), 3)
    assert await recovery.find_orphans() == 1
    kept, orphan = await bus.requests(["kept", "orphan"])
    assert kept is not None
    assert orphan is not None
    assert (kept.state, kept.epoch) == ("assigned", 1)
    assert (orphan.state, orphan.num_output_tokens) == ("cancelled" if cancelled else "queued", 2)
    assert await bus._redis.xlen(bus.keys.sub("interactive")) == (0 if cancelled else 1)
    assert await recovery.find_orphans() == 0


async def test_what_has_no_work_entry_is_queued_again(bus: Bus) -> None:
    """One end of an entry is lost with the queue's last second of writes; the next end of the entry deletes it."""
    await assign(bus, "kept", "w1")
    await assign(bus, "orphan", "w2")
    (entry, _), *_ = await bus.streams.entries(bus.keys.work("w2"))
    assert not await bus.step("w2", StepResult(done_entries=[entry]))
    scheduler = Scheduler(SchedulerConfig())
    recovery = Recovery(bus, scheduler, 3)
    await recovery.rebuild()
    assert not scheduler.is_assigned_to("orphan", "w2")
    assert await recovery.find_orphans() == 1
    kept, orphan = await bus.requests(["kept", "orphan"])
    assert kept is not None
    assert orphan is not None
    assert (kept.state, kept.epoch) == ("assigned", 1)
    assert (orphan.state, orphan.num_output_tokens) == ("queued", 2)

"""A queue whose memory or disk is full accepts nothing new, keeps running, and accepts work again once it can."""

from __future__ import annotations

import pytest
from helpers.full_memory import full_memory
from helpers.script_queue import GATEWAY, Queue, ids, make_body, make_submit, row
from helpers.waiting import wait_until

from chaos.shortage import disk_again, no_disk
from lorafleet.launcher.embedded import EmbeddedServer
from protocol.queue.books.quota import Quota
from protocol.queue.bus import CONNECTION_ERRORS, Bus, DiskFull, MemoryFull, StepResult
from protocol.wire import messages as m
from protocol.wire.keys import Keys


@pytest.mark.parametrize("quota", [None, Quota("acme", requests_per_minute=5, concurrency=5)])
async def test_a_full_queue_takes_no_new_request(queue: Queue, quota: Quota | None) -> None:
    await queue.bus.submit("interactive", [(make_submit("a"), make_body())], max_queued=9, quota=quota)
    before = sorted(await queue.bus._redis.keys())
    async with full_memory(queue.bus):
        with pytest.raises(MemoryFull):
            await queue.bus.submit("interactive", [(make_submit("b"), make_body())], max_queued=9, quota=quota)
        assert sorted(await queue.bus._redis.keys()) == before
    assert await queue.queued() == [("a", 0)]
    await queue.submit("b")
    assert await queue.queued() == [("a", 0), ("b", 0)]


async def test_a_full_queue_retries_no_dead_letter(queue: Queue) -> None:
    await queue.submit("a")
    await queue.bus.finish("a", "failed", "error", dead_letter=m.DeadLetter(reason="x", submit=make_submit("a")))
    ((letter, _),) = await queue.bus.dead_letters.newest(1)
    async with full_memory(queue.bus):
        with pytest.raises(MemoryFull):
            await queue.bus.dead_letters.retry(letter, 60)
    assert await queue.bus.dead_letters.retry(letter, 60) == "a"


async def test_a_full_queue_carries_on_and_ends_what_it_has(queue: Queue) -> None:
    bus = queue.bus
    await queue.submit("a", "b", "c", "d", "e")
    async with full_memory(bus):
        assert (await queue.assign("a", "b", "c", "d"))[0] == "ok"
        step = StepResult([row("a", 0, 1, 2), row("b", 0, 3)], {GATEWAY: [m.Delta("a", 1, 0, ids(1, 2))]})
        assert await bus.step("w", step) == []
        assert await queue.requeue("b") == {"b": "requeued"}
        assert await queue.write(row("a", 2, 4, finish="stop")) == []
        assert await bus.finish("c", "failed", "error")
        assert await bus.cancel("d") == "assigned"
        assert await bus.cancel("e") == "cancelled"
        assert await bus.position("b") == 0
        assert await bus.repair("d", 0, ids(7), b"", 0) == 1
    assert await queue.log("a") == ids(1, 2, 4)
    assert await queue.queued() == [("b", 2)]
    states = {rid: (await queue.fields(rid))["state"] for rid in "abcde"}
    assert states == {"a": "completed", "b": "queued", "c": "failed", "d": "assigned", "e": "cancelled"}


async def test_members_of_a_full_queue_live_on(queue: Queue) -> None:
    bus, keys = queue.bus, queue.keys
    served = m.ServedModel(
        model="b", name="b", fingerprint="f", model_type="t", vocab_size=9, max_model_len=9, sites=[]
    )
    order = m.Control(kind="prefetch", digest="d")
    async with full_memory(bus):
        await bus.streams.create(keys.work("x"), 300)
        await bus.members.join(m.WorkerBeat(wid="x", name="x", capacity=1), served, 4000)
        assert await bus.members.beat(keys.worker_beat("x"), keys.workers, "x", b"beat", 4000, [keys.work("x")])
        assert not await bus.members.beat(keys.worker_beat("x"), keys.workers, "x", b"beat", 4000, [keys.work("y")])
        assert await bus.lead("", "me", 500) == "me:1"
        await bus.set(keys.status, m.SchedulerStatus(queued=0, running=0, workers=1, drain_rate=0.0), 5000)
        await bus.streams.tell([("w", order), ("gone", order)])
        await bus.streams.reject(keys.ended, (b"1-1", {b"b": b"?"}), "unreadable")
        assert await bus.streams.keep(keys.work("x"), ttl_s=300, max_age_ms=60_000)
    assert await queue.orders() == [order]
    assert not await bus._redis.exists(keys.ctl("gone"))
    assert await bus.members.ids(keys.workers) == ["x"]
    assert len(await bus.dead_letters.newest(9)) == 1


async def test_a_full_queue_is_trouble_that_loops_wait_out(queue: Queue) -> None:
    async with full_memory(queue.bus):
        with pytest.raises(CONNECTION_ERRORS):
            await queue.bus.adapters.announce(m.AdapterEvent(kind="wanted"))


async def test_the_memory_of_the_server_is_told(queue: Queue) -> None:
    used, most = await queue.bus.memory()
    assert 0 < used < most
    async with full_memory(queue.bus):
        assert (await queue.bus.memory())[1] == 1


async def test_a_full_disk_refuses_writes_until_there_is_room(durable: EmbeddedServer) -> None:
    queue = Queue(Bus(durable.url, Keys()))
    await queue.submit("a")
    no_disk(durable.process, durable.folder)

    async def refused() -> bool:
        """Writes that the server had accepted when it found the disk full are kept, and written later."""
        try:
            await queue.bus._redis.set(queue.keys.tag, "x", px=60_000)
        except DiskFull:
            return True
        return False

    await wait_until(refused, "the server refuses writes")
    with pytest.raises(DiskFull, match="MISCONF"):
        await queue.submit("b")
    assert await queue.queued() == [("a", 0)]
    assert durable.process.poll() is None
    disk_again(durable.process)

    async def taken() -> bool:
        return not await refused()

    await wait_until(taken, "the server takes writes again")
    await queue.submit("c")
    assert await queue.queued() == [("a", 0), ("c", 0)]
    await queue.bus.close()

"""The worker's service on a real queue, with an engine without a model: what becomes durable, and who owns it."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from types import CoroutineType
from urllib.request import urlopen

import msgspec
import numpy as np
import pytest
from helpers.full_memory import full_memory
from helpers.waiting import wait_until

from benchmarks.common.fake_worker import ADAPTER_BYTES, MAX_UNACKED, FakeEngine
from chaos.fleet import free_port
from gpu_worker.planning.request import EngineRequest
from gpu_worker.service import service
from gpu_worker.service.outbox import OutboxRecovery
from gpu_worker.service.owned import OwnedRequest
from gpu_worker.service.service import WorkerService
from protocol.queue.bus import Bus, Refused, StepResult, decode
from protocol.wire import messages as m
from tests.gpu_worker.service.fakes import (
    GATEWAY,
    PROMPT,
    SERVED,
    VOCAB,
    assign,
    beats,
    deltas,
    expected,
    log,
    running_worker,
    state,
    submit,
)  # fmt: skip


async def test_a_batch_runs_to_its_end_and_leaves_no_work_behind(bus: Bus) -> None:
    await bus.streams.create(bus.keys.out(GATEWAY), 300)
    async with running_worker(bus) as (worker, _):
        for rid, num in (("a", 3), ("b", 8)):
            await submit(bus, rid, max_new=num)
        given: list[bool] = []
        submit_to_engine = worker.engine.submit

        def note_and_submit(request: EngineRequest) -> None:
            given.append(request.yields)
            submit_to_engine(request)

        worker.engine.submit = note_and_submit
        assert await assign(bus, worker.wid, "a", "b", yields=True) == "ok"
        for rid, num in (("a", 3), ("b", 8)):
            await wait_until(lambda rid=rid: _is(bus, rid, "completed"), f"{rid} completes")
            assert await log(bus, rid) == expected(num)
            seen = await deltas(bus, rid)
            assert b"".join(delta.ids for delta in seen) == np.asarray(expected(num), "<i4").tobytes()
            assert [delta.finish for delta in seen if delta.finish] == ["length"]
            assert seen[-1].usage == m.RequestUsage(len(PROMPT), num, 0)
        assert await bus._redis.xlen(bus.keys.work(worker.wid)) == 0
        ended = [
            item
            for entry in await bus.streams.entries(bus.keys.ended)
            for item in decode(entry[1][b"b"], list[m.Ended])
        ]
        assert sorted((item.rid, item.num_output_tokens) for item in ended) == [("a", 3), ("b", 8)]
        assert given == [True, True]


async def test_a_worker_ends_its_requests_while_the_queue_s_memory_is_full(bus: Bus) -> None:
    async with running_worker(bus) as (worker, _):
        engine, wid = worker.engine, worker.wid
        assert isinstance(engine, FakeEngine)
        await submit(bus, "a")
        async with full_memory(bus):
            await bus.streams.tell([(wid, m.Control(kind="evict", digest="b", order="o1"))])
            await wait_until(lambda: engine.orders, "it has something to tell, for which there is no room")
            beaten_ms = (await bus._redis.zscore(bus.keys.workers, wid)) or 0

            async def has_beaten() -> bool:
                return (await bus._redis.zscore(bus.keys.workers, wid) or 0) > beaten_ms

            await wait_until(has_beaten, "it beats nevertheless")
            assert await assign(bus, wid, "a") == "ok"
            await wait_until(lambda: _is(bus, "a", "completed"), "a completes")
            await wait_until(has_beaten, "it still beats")
        assert worker.wid == wid
        await submit(bus, "b")
        assert await assign(bus, wid, "b") == "ok"
        await wait_until(lambda: _is(bus, "b", "completed"), "b completes")


async def test_a_drained_worker_hands_over_and_another_goes_on_where_it_stopped(bus: Bus) -> None:
    await bus.streams.create(bus.keys.out(GATEWAY), 300)
    await submit(bus, "r", max_new=60)
    async with running_worker(bus) as (first, _):
        await assign(bus, first.wid, "r")
        await wait_until(lambda: _has_tokens(bus, "r", 5), "some tokens are durable")
    assert await state(bus, "r") == "queued"
    assert not await bus._redis.exists(bus.keys.work(first.wid), bus.keys.ctl(first.wid))
    assert first.wid not in await bus.members.ids(bus.keys.workers)
    done = len(await log(bus, "r"))
    assert 5 <= done < 60
    async with running_worker(bus) as (second, _):
        await assign(bus, second.wid, "r")
        await wait_until(lambda: _is(bus, "r", "completed"), "the second worker finishes")
    assert await log(bus, "r") == expected(60)
    assert int(await bus._redis.hget(bus.keys.req("r"), "attempts")) == 0


async def test_a_worker_hands_over_while_the_queue_s_memory_is_full(bus: Bus) -> None:
    """The record of how long its adapters were resident does not fit and is lost; no request waits for it."""
    await submit(bus, "r", max_new=200)
    async with running_worker(bus, step_s=0.02) as (worker, stop):
        worker.engine.pin("a" * 64)
        await assign(bus, worker.wid, "r")
        await wait_until(lambda: _has_tokens(bus, "r", 5), "some tokens are durable")
        async with full_memory(bus):
            stop.set()
            await wait_until(lambda: _is(bus, "r", "queued"), "it is handed over")
            await wait_until(lambda: _is_gone(bus, worker.wid), "the worker has left")
    assert await log(bus, "r") == expected(200)[: len(await log(bus, "r"))]
    assert int(await bus._redis.hget(bus.keys.req("r"), "attempts")) == 0


async def test_a_body_that_cannot_be_read_fails_its_own_request_alone(bus: Bus) -> None:
    await bus.streams.create(bus.keys.out(GATEWAY), 300)
    odd = m.Body(prompt=b"\1\0\0", sampling=m.Sampling(), max_new_tokens=8)
    async with running_worker(bus) as (worker, _):
        for rid, raw in (("odd", m.encode(odd)), ("text", b"\x81\xa6prompt\xa1\xff"), ("good", b"")):
            await submit(bus, rid)
            if raw:
                await bus._redis.hset(bus.keys.body(rid), "0", raw)
        assert await assign(bus, worker.wid, "odd", "text", "good") == "ok"
        for rid in ("odd", "text"):
            await wait_until(lambda rid=rid: _is(bus, rid, "failed"), f"{rid} fails")
        await wait_until(lambda: _is(bus, "good", "completed"), "the good one completes")
        assert await log(bus, "good") == expected(8)
        assert [delta.finish for delta in await deltas(bus, "odd")] == ["error"]
        assert await bus._redis.xlen(bus.keys.work(worker.wid)) == 0
        assert await bus._redis.xlen(bus.keys.dlq) == 0


async def test_an_order_without_a_message_is_put_aside(bus: Bus) -> None:
    async with running_worker(bus) as (worker, _):
        for fields in ({"x": "y"}, {"b": b"\x81\xa4kind\xa1\xff"}):
            await bus._redis.xadd(bus.keys.ctl(worker.wid), fields)
        await submit(bus, "r")
        assert await assign(bus, worker.wid, "r") == "ok"
        await wait_until(lambda: _is(bus, "r", "completed"), "the worker goes on")
        await wait_until(lambda: _has_length(bus, bus.keys.dlq, 2), "both are dead letters")


async def _has_length(bus: Bus, stream: str, num: int) -> bool:
    return await bus.streams.length(stream) == num


async def test_a_fenced_worker_writes_nothing_more(bus: Bus) -> None:
    await bus.streams.create(bus.keys.out(GATEWAY), 300)
    await submit(bus, "r", max_new=500)
    async with running_worker(bus) as (worker, _):
        await assign(bus, worker.wid, "r")
        await wait_until(lambda: _has_tokens(bus, "r", 3), "some tokens are durable")
        assert await bus.requeue(worker.wid, ["r"], counts=True, max_attempts=3) == {"r": "requeued"}
        length = len(await log(bus, "r"))
        await wait_until(lambda: "r" not in worker.outbox.owned, "the worker lets go")
        assert len(await log(bus, "r")) == length
        assert worker.engine.stats().running == 0
    assert await state(bus, "r") == "queued"


async def test_cancel_ends_a_running_request_once_with_its_usage(bus: Bus) -> None:
    await bus.streams.create(bus.keys.out(GATEWAY), 300)
    await submit(bus, "r", max_new=5000)
    async with running_worker(bus) as (worker, _):
        await assign(bus, worker.wid, "r")
        await wait_until(lambda: _has_tokens(bus, "r", 3), "some tokens are durable")
        await bus.cancel("r")
        await wait_until(lambda: _is(bus, "r", "cancelled"), "it is cancelled")
        ends = [delta for delta in await deltas(bus, "r") if delta.finish]
        assert [delta.finish for delta in ends] == ["cancelled"]
        assert ends[0].usage is not None
        assert ends[0].usage.num_output_tokens == len(await log(bus, "r"))
        assert await bus._redis.xlen(bus.keys.work(worker.wid)) == 0
        assert worker.engine.stats().running == 0


async def test_the_order_to_cancel_may_get_lost(bus: Bus) -> None:
    """The flag in the record is enough: the queue refuses the request's next step row, and no other."""
    await bus.streams.create(bus.keys.out(GATEWAY), 300)
    for rid in ("r", "other"):
        await submit(bus, rid, max_new=200)
    async with running_worker(bus) as (worker, _):
        await assign(bus, worker.wid, "r", "other")
        await wait_until(lambda: _has_tokens(bus, "r", 3), "some tokens are durable")
        # The writes of the cancel script, without its control message.
        await bus._redis.hset(bus.keys.req("r"), "cancel", 1)
        await bus._redis.hdel(bus.keys.own(worker.wid), "r")
        await wait_until(lambda: _is(bus, "r", "cancelled"), "it is cancelled")
        await wait_until(lambda: _is(bus, "other", "completed"), "the other one completes")
        assert await log(bus, "other") == expected(200)


async def test_what_is_dropped_is_cancelled_before_anything_is_waited_for(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """During a wait the request may be assigned again; a later cancel would then hit the new assignment."""
    done: list[str] = []
    owned = OwnedRequest("r", 1, b"1-0", "", "t", num_prompt_tokens=5, record_bytes=0)
    async with running_worker(bus) as (worker, _):

        async def repair(*_: object) -> int:
            done.append("repaired")
            return 0

        monkeypatch.setattr(worker.engine, "cancel", lambda rids: done.append(f"cancelled {rids}"))
        monkeypatch.setattr(worker.bus, "repair", repair)
        await worker._recover(OutboxRecovery(dropped=["s"], repairs=[owned]))
        monkeypatch.undo()
    assert done == ["cancelled ['s']", "repaired"]


async def test_the_fleet_promises_what_its_smallest_worker_can_hold(bus: Bus) -> None:
    small = msgspec.structs.replace(SERVED, max_model_len=50)

    async def promised() -> int:
        (base,), _ = await bus.members.bases()
        return base.max_model_len

    async with running_worker(bus, served=small), running_worker(bus):
        assert await promised() == 50
    async with running_worker(bus):
        assert await promised() == SERVED.max_model_len


async def test_joining_again_leaves_no_task_behind(bus: Bus) -> None:
    def num_waits() -> int:
        running = (task.get_coro() for task in asyncio.all_tasks())
        return sum(isinstance(wait, CoroutineType) and wait.__qualname__ == "Event.wait" for wait in running)

    async with running_worker(bus) as (worker, _):
        for _ in range(3):
            old = worker.wid
            await bus.members.leave(old)
            worker._beat_now.set()
            await wait_until(lambda old=old: worker.wid != old and beats(bus, worker), "it is back")
            await wait_until(
                lambda: num_waits() == 3, "it waits for its end, its engine's and an order to swap; nothing else waits"
            )


async def test_the_worker_reads_no_faster_than_its_engine_takes(bus: Bus) -> None:
    engine, room = FakeEngine(vocab_size=VOCAB), Future[None]()
    engine.room = lambda: room
    async with running_worker(bus, engine=engine) as (worker, _):
        for digest in ("a", "b"):
            await bus.streams.tell([(worker.wid, m.Control(kind="prefetch", digest=digest))])
        for _ in range(20):
            await bus._redis.ping()
        assert engine.orders == []
        room.set_result(None)
        await wait_until(lambda: engine.orders == [("prefetch", "a"), ("prefetch", "b")], "the orders are obeyed")


async def test_a_worker_taken_for_dead_joins_again_under_a_new_id(bus: Bus) -> None:
    await bus.streams.create(bus.keys.out(GATEWAY), 300)
    for rid in ("r", "next"):
        await submit(bus, rid, max_new=300)
    async with running_worker(bus) as (worker, _):
        old = worker.wid
        await assign(bus, old, "r")
        await wait_until(lambda: _has_tokens(bus, "r", 3), "some tokens are durable")
        await bus.requeue(old, ["r"], counts=True, max_attempts=3)
        await bus.members.leave(old)
        length = len(await log(bus, "r"))
        await wait_until(lambda: worker.wid != old, "it has a new id")
        await wait_until(lambda: beats(bus, worker), "it beats again")
        assert await bus.members.ids(bus.keys.workers) == [worker.wid]
        assert len(await log(bus, "r")) == length
        assert await assign(bus, worker.wid, "next", "r") == "ok"
        for rid in ("r", "next"):
            await wait_until(lambda rid=rid: _is(bus, rid, "completed"), f"{rid} completes")
            assert await log(bus, rid) == expected(300)


async def test_steps_given_up_when_fenced_are_not_owed_to_the_engine(bus: Bus) -> None:
    await bus.streams.create(bus.keys.out(GATEWAY), 300)
    async with running_worker(bus, step_s=0.0005) as (worker, _):
        write, writing = worker.bus.step, asyncio.Event()

        async def never_answer(wid: str, step: StepResult) -> list[Refused]:
            writing.set()
            return await asyncio.Future()

        for i in range(MAX_UNACKED + 1):
            rid, old = f"r{i}", worker.wid
            writing.clear()
            worker.bus.step = never_answer
            await submit(bus, rid, max_new=100_000)
            assert await assign(bus, old, rid) == "ok"
            await wait_until(writing.is_set, "a step is being written")
            await bus.finish(rid, "failed", "error")
            await bus.members.leave(old)
            worker._beat_now.set()
            await wait_until(lambda old=old: worker.wid != old and beats(bus, worker), "it is back")
        worker.bus.step = write
        await submit(bus, "last", max_new=50)
        assert await assign(bus, worker.wid, "last") == "ok"
        await wait_until(lambda: _is(bus, "last", "completed"), "it still works")


async def test_a_worker_that_leaves_does_not_come_back(bus: Bus) -> None:
    async with running_worker(bus) as (worker, stop):
        wid, delete_stream = worker.wid, worker.bus.streams.delete

        async def delete_and_ask_for_a_beat(stream: str, num_entries: int) -> bool:
            gone = await delete_stream(stream, num_entries)
            worker._beat_now.set()
            for _ in range(20):  # time for a heartbeat, if any is still sent
                await bus._redis.ping()
            return gone

        worker.bus.streams.delete = delete_and_ask_for_a_beat
        stop.set()
        await wait_until(lambda: _is_off(bus, worker), "it has left")
    assert worker.wid == wid


async def test_a_message_nobody_can_read_does_not_take_its_neighbours_along(bus: Bus) -> None:
    await bus.streams.create(bus.keys.out(GATEWAY), 300)
    await submit(bus, "r", max_new=5)
    async with running_worker(bus) as (worker, _):
        keys = bus.keys
        async with bus._redis.pipeline(transaction=True) as pipe:  # so that one read returns both
            pipe.xadd(keys.work(worker.wid), {"b": b"\xc1 no message"})
            pipe.xadd(keys.ctl(worker.wid), {"b": b"\xc1 no message"})
            pipe.hset(keys.req("r"), mapping={"state": "assigned", "epoch": 1, "owner": worker.wid})
            pipe.xadd(keys.work(worker.wid), {"b": m.encode([m.Assigned("r", 1, "", "t", GATEWAY)])})
            await pipe.execute()
        await wait_until(lambda: _is(bus, "r", "completed"), "the readable one completes")
        await wait_until(lambda: _num_letters(bus, 2), "the others are dead letters")
        assert await bus._redis.xlen(keys.work(worker.wid)) == 0


async def _num_letters(bus: Bus, num: int) -> bool:
    return await bus._redis.xlen(bus.keys.dlq) == num


async def _is_off(bus: Bus, worker: WorkerService) -> bool:
    return worker.wid not in await bus.members.ids(bus.keys.workers)


async def _is(bus: Bus, rid: str, value: str) -> bool:
    return await state(bus, rid) == value


async def _is_gone(bus: Bus, wid: str) -> bool:
    return wid not in await bus.members.ids(bus.keys.workers)


async def _has_tokens(bus: Bus, rid: str, num: int) -> bool:
    return len(await log(bus, rid)) >= num


async def test_a_worker_shows_its_own_metrics_on_its_port(bus: Bus) -> None:
    port = free_port()

    def scrape() -> dict[str, float]:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as page:
            lines = page.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.split()[-1]) for line in lines if not line.startswith("#")}

    async with running_worker(bus, metrics_port=port) as (worker, _):
        publishing = 'lorafleet_worker_phase_seconds_total{phase="publish",worker="w"}'

        async def shown() -> bool:
            return publishing in await asyncio.to_thread(scrape)

        await wait_until(shown, "its first beat after it has joined")
        assert (await asyncio.to_thread(scrape))[publishing] == 0
        await submit(bus, "r")
        await assign(bus, worker.wid, "r")

        async def published() -> bool:
            return (await asyncio.to_thread(scrape))[publishing] > 0

        await wait_until(published, "the time of step scripts is shown")
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(scrape)


class LoadingEngine(FakeEngine):
    """An engine that reports a number of loaded adapters."""

    num_loads = 0

    def stats(self) -> m.WorkerBeat:
        return msgspec.structs.replace(super().stats(), num_loads=self.num_loads)


async def test_it_beats_at_once_when_an_adapter_has_come(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler limits how many adapters load at a time, and learns from heartbeats which have been loaded."""
    monkeypatch.setattr(service, "BEAT_S", 3600.0)
    engine = LoadingEngine(step_s=0.002, vocab_size=VOCAB)
    async with running_worker(bus, engine=engine) as (worker, _):
        await submit(bus, "r", max_new=1_000_000)
        await assign(bus, worker.wid, "r")
        for num in (1, 3):
            await wait_until(lambda num=num: _has_tokens(bus, "r", 10 * num), "a request runs and does not end")
            engine.num_loads = num

            async def is_told(num: int = num) -> bool:
                beat = (await bus.members.worker_beats())[worker.wid]
                return beat is not None and beat.num_loads == num

            await wait_until(is_told, "a beat tells of the adapter")
        await bus.cancel("r")


async def test_orders_about_adapters_are_obeyed_and_what_they_freed_is_told(bus: Bus) -> None:
    async with running_worker(bus) as (worker, _):
        engine = worker.engine
        assert isinstance(engine, FakeEngine)
        orders = [
            m.Control(kind="prefetch", digest="a"),
            m.Control(kind="pin", digest="b"),
            m.Control(kind="unpin", digest="b"),
            m.Control(kind="queued", digests=["c", "d"]),
            m.Control(kind="evict", digest="b", order="o1"),
        ]
        await bus.streams.tell([(worker.wid, order) for order in orders])

        async def told() -> list[m.AdapterEvent]:
            return [
                decode(fields[b"b"], m.AdapterEvent) for _, fields in await bus.streams.entries(bus.keys.adapter_events)
            ]

        (event,) = await wait_until(told, "the eviction is told")
        assert event.pool_bytes == event.host_bytes == ADAPTER_BYTES
        assert (event.kind, event.digest, event.order, event.source) == ("evicted", "b", "o1", worker.wid)
        expected_orders = [("prefetch", "a"), ("pin", "b"), ("unpin", "b"), ("queued", "c,d"), ("evict", "b")]
        assert engine.orders == expected_orders

"""The scheduler on a real queue with simulated workers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from helpers.full_memory import full_memory
from helpers.waiting import wait_until
from msgspec import json

from chaos.fleet import free_port
from lorafleet.launcher.embedded import start_embedded
from protocol.queue.bus import Bus, decode, now_ms
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import Internal
from scheduler import session
from scheduler.config import SchedulerConfig
from scheduler.core import Scheduler
from scheduler.recovery import Recovery
from scheduler.service import serve
from scheduler.workers import MAX_LOADS
from tests.scheduler.fakes import (
    GATEWAY,
    FakeWorker,
    becomes,
    deltas,
    gateways_are,
    holds,
    make_submit,
    running_scheduler,
    start_scheduler,
    state,
    status_is,
    submit,
)


async def test_a_batch_of_several_adapters_goes_out_in_one_entry(bus: Bus) -> None:
    worker = await FakeWorker(bus, "w1", resident=["a", "b"]).join()
    await submit(bus, *(make_submit(f"r{d}", digest=d) for d in ("", "a", "b")))
    async with running_scheduler(bus):
        await holds(worker, "r", "ra", "rb")
        assert [[item.rid for item in batch] for batch in worker.batches] == [["r", "ra", "rb"]]
        assert [item.epoch for item in worker.batches[0]] == [1, 1, 1]
        assert await bus._redis.xlen(bus.keys.sub("interactive")) == 0


async def test_a_full_queue_is_scheduled_and_its_scheduler_warns(bus: Bus, caplog: pytest.LogCaptureFixture) -> None:
    worker = await FakeWorker(bus, "w1", capacity=8).join()
    await submit(bus, make_submit("r0"), make_submit("r1", deadline_ms=now_ms() - 1))

    async def told(*, full: bool) -> bool:
        status = await bus.get(bus.keys.status, m.SchedulerStatus)
        return status is not None and (status.used_bytes > status.max_bytes > 0) == full

    async with running_scheduler(bus):
        leader = await wait_until(lambda: bus._redis.get(bus.keys.leader), "it leads")
        await wait_until(lambda: told(full=False), "the memory is told")
        warnings = [record for record in caplog.records if "the queue holds" in record.message]
        assert warnings == []
        async with full_memory(bus):
            await wait_until(lambda: told(full=True), "the shortage is told")
            await becomes(bus, "r1", "failed")
            await holds(worker, "r0")
            assert await worker.write("r0", 4, end=True) == []
        await wait_until(lambda: told(full=False), "the shortage is over")
        assert await bus._redis.get(bus.keys.leader) == leader
    levels = [record.levelname for record in caplog.records if "the queue holds" in record.message]
    assert levels[0] == "WARNING"
    assert levels.count("WARNING") == 1


async def test_a_dead_workers_requests_go_to_another_with_their_tokens(bus: Bus) -> None:
    await bus.streams.create(bus.keys.out("g-test"), 300)
    first = await FakeWorker(bus, "w1").join()
    async with running_scheduler(bus, beat_timeout_s=1.0):
        await submit(bus, make_submit("r"))
        await holds(first, "r")
        assert await first.write("r", 2) == []
        second = await FakeWorker(bus, "w2").join()
        await holds(second, "r")  # the first worker sends no more heartbeats
        assert second.held["r"].epoch == 3
        assert await first.write("r", 1) == ["stale"]
        assert await second.write("r", 2, end=True) == []
        assert await bus._redis.strlen(bus.keys.tok("r")) == 4 * 4
        assert not await bus._redis.exists(bus.keys.work("w1"), bus.keys.ctl("w1"))
        assert await bus.members.ids(bus.keys.workers) == ["w2"]


async def test_a_request_that_kills_its_workers_ends_as_a_dead_letter(bus: Bus) -> None:
    await bus.streams.create(bus.keys.out(GATEWAY), 300)
    async with running_scheduler(bus, beat_timeout_s=0.6, max_attempts=2):
        await submit(bus, make_submit("poison"))
        for number in (1, 2):
            worker = await FakeWorker(bus, f"w{number}").join()
            await holds(worker, "poison")  # and never sends a heartbeat again
        await becomes(bus, "poison", "failed")
        ends = [delta for delta in await deltas(bus) if delta.finish]
        assert [(delta.rid, delta.finish) for delta in ends] == [("poison", "error")]
        assert json.decode(ends[0].error, type=m.ErrorInfo).code == "worker_lost"
        ((_, fields),) = await bus.streams.entries(bus.keys.dlq)
        letter = decode(fields[b"b"], m.DeadLetter)
        assert [(death.wid, death.name, death.phase) for death in letter.deaths] == [
            ("w1", "w1", "prefill"), ("w2", "w2", "prefill"),
        ]  # fmt: skip
        assert letter.attempts == 2
        for death in letter.deaths:
            assert letter.submit is not None
            assert letter.submit.submitted_ms <= death.assigned_ms <= death.ms <= letter.ms
        assert letter.submit is not None
        assert letter.submit.rid == "poison"
        third = await FakeWorker(bus, "w3").join()
        await submit(bus, make_submit("next"))
        await holds(third, "next")


async def test_a_cancelled_request_of_a_dead_worker_ends_and_is_not_run_again(bus: Bus) -> None:
    await bus.streams.create(bus.keys.out(GATEWAY), 300)
    first = await FakeWorker(bus, "w1").join()
    async with running_scheduler(bus, beat_timeout_s=0.6):
        await submit(bus, make_submit("r"))
        await holds(first, "r")
        await bus.cancel("r")
        await becomes(bus, "r", "cancelled")
        assert [delta.finish for delta in await deltas(bus)] == ["cancelled"]
        assert await bus._redis.xlen(bus.keys.sub("interactive")) == 0


async def test_a_queued_request_that_is_cancelled_is_forgotten(bus: Bus) -> None:
    async with running_scheduler(bus):
        await submit(bus, make_submit("r"), make_submit("other"))
        await wait_until(lambda: status_is(bus, queued=2), "both are queued")
        await bus.cancel("r")
        await wait_until(lambda: status_is(bus, queued=1), "one is left")
        worker = await FakeWorker(bus, "w1").join()
        await holds(worker, "other")
        assert worker.held.keys() == {"other"}


async def test_a_queued_request_fails_at_its_deadline(bus: Bus) -> None:
    await bus.streams.create(bus.keys.out(GATEWAY), 300)
    async with running_scheduler(bus):
        await submit(bus, make_submit("late", deadline_ms=now_ms() + 300), make_submit("r"))
        await becomes(bus, "late", "failed")
        (delta,) = await deltas(bus)
        assert json.decode(delta.error, type=m.ErrorInfo).code == "deadline_exceeded"
        assert await state(bus, "r") == "queued"


async def test_a_running_request_is_fenced_at_its_deadline(bus: Bus) -> None:
    worker = await FakeWorker(bus, "w1").join()
    async with running_scheduler(bus):
        await submit(bus, make_submit("late", deadline_ms=now_ms() + 2000))
        await holds(worker, "late")
        await becomes(bus, "late", "failed", worker)
        assert await worker.write("late") == ["terminal"]
        await worker.read()
        assert worker.orders == [m.Control(kind="cancel", rid="late")]
        await wait_until(lambda: status_is(bus, running=0), "the scheduler lets go")


async def test_a_dead_gateways_requests_are_cancelled_unless_stored(bus: Bus) -> None:
    worker = await FakeWorker(bus, "w1", capacity=1).join()
    await bus.members.beat(bus.keys.gateway_beat("alive"), bus.keys.gateways, "alive", b"url", 3_600_000)
    await bus.members.beat(bus.keys.gateway_beat(GATEWAY), bus.keys.gateways, GATEWAY, b"url", 3_600_000)
    async with running_scheduler(bus):
        await submit(bus, make_submit("running"), make_submit("stored", stored=True))
        await submit(bus, make_submit("alive", gateway="alive"), make_submit("queued"))
        await holds(worker, "running", "stored", "alive")
        await bus._redis.delete(bus.keys.gateway_beat(GATEWAY))
        await becomes(bus, "queued", "cancelled", worker)
        assert await worker.write("running") == ["cancelled"]
        assert await worker.write("stored") == []
        assert await worker.write("alive") == []
        await wait_until(lambda: gateways_are(bus, "alive"), "the register is cleaned")


async def test_a_standby_takes_over_and_nothing_is_lost_or_doubled(bus: Bus) -> None:
    worker = await FakeWorker(bus, "w1", capacity=1).join()
    leading = await start_scheduler(bus)
    await submit(bus, *(make_submit(f"r{i}") for i in range(6)))
    await holds(worker, "r0", "r1", "r2")
    async with running_scheduler(bus):
        before = await bus._redis.get(bus.keys.leader)
        leading.cancel()  # as close to a killed process as possible in-process: the lease stays
        await asyncio.wait([leading])
        assert await bus._redis.get(bus.keys.leader) == before
        await submit(bus, make_submit("r6"))

        async def finished() -> bool:
            await worker.read()
            for rid in list(worker.held):
                await worker.write(rid, 4, end=True)
            await worker.beat()
            return all([await state(bus, f"r{i}") == "completed" for i in range(7)])

        await wait_until(finished, "all complete under the new leader")
        assert await bus._redis.get(bus.keys.leader) != before
        batches = [item.rid for batch in worker.batches for item in batch]
        assert sorted(batches) == [f"r{i}" for i in range(7)]
        for stream in (bus.keys.work("w1"), bus.keys.sub("interactive")):
            assert await bus._redis.xlen(stream) == 0
        await wait_until(lambda: status_is(bus, queued=0, running=0), "the books are empty")


async def test_a_new_leader_counts_what_runs_and_gives_no_worker_too_much(bus: Bus) -> None:
    worker = await FakeWorker(bus, "w1", capacity=2).join()
    leading = await start_scheduler(bus)
    await submit(bus, *(make_submit(f"r{i}") for i in range(8)))
    await holds(worker, "r0", "r1", "r2", "r3")
    leading.cancel()
    await asyncio.wait([leading])
    await bus._redis.delete(bus.keys.leader, bus.keys.status)
    async with running_scheduler(bus):
        await wait_until(lambda: status_is(bus, queued=4, running=4), "the new leader has rebuilt")
        await worker.read()
        assert len(worker.held) == 4
        await worker.write("r0", 4, end=True)
        await holds(worker, "r4")
        assert len(worker.held) == 4


async def test_a_leader_that_stops_gives_the_lock_back(bus: Bus) -> None:
    async with running_scheduler(bus):
        await wait_until(lambda: bus._redis.exists(bus.keys.leader), "it leads")
    assert not await bus._redis.exists(bus.keys.leader)


async def test_a_deposed_leader_assigns_nothing(bus: Bus) -> None:
    worker = await FakeWorker(bus, "w1").join()
    async with running_scheduler(bus):
        await wait_until(lambda: status_is(bus, workers=1), "it leads")
        await bus._redis.set(bus.keys.leader, "another:99", px=3_600_000)
        await submit(bus, make_submit("r"))
        await wait_until(lambda: _stands_by(bus), "it has noticed")
        await worker.read()
        assert worker.held == {}
        await bus._redis.delete(bus.keys.leader)
        await holds(worker, "r")


async def test_a_worker_taken_for_dead_that_wakes_gets_work_again(bus: Bus) -> None:
    worker = await FakeWorker(bus, "w1").join()
    async with running_scheduler(bus, beat_timeout_s=0.6):
        await submit(bus, make_submit("r"))
        await holds(worker, "r")
        await becomes(bus, "r", "queued")
        await wait_until(lambda: _is_gone(bus, bus.keys.work("w1")), "its streams are deleted")
        await worker.beat()
        worker.drop("r")
        await holds(worker, "r")
        assert worker.held["r"].epoch == 3


async def test_a_restarted_worker_is_known_by_its_name(bus: Bus) -> None:
    old = await FakeWorker(bus, "w1", name="gpu0").join()
    async with running_scheduler(bus, beat_timeout_s=60.0):
        await submit(bus, make_submit("r"))
        await holds(old, "r")
        new = await FakeWorker(bus, "w2", name="gpu0").join()
        await holds(new, "r")


async def test_what_a_draining_worker_hands_back_goes_on_elsewhere(bus: Bus) -> None:
    first = await FakeWorker(bus, "w1").join()
    async with running_scheduler(bus):
        await submit(bus, make_submit("r"))
        await holds(first, "r")
        first.draining = True
        await first.beat()
        await wait_until(lambda: status_is(bus, workers=0, running=1), "it is known that it drains")
        second = await FakeWorker(bus, "w2").join()
        await bus.requeue("w1", ["r"], counts=False, max_attempts=3)
        first.drop("r")
        await bus.members.leave("w1")
        await submit(bus, make_submit("r2"))
        await holds(second, "r", "r2")
        await wait_until(lambda: status_is(bus, workers=1, running=2), "only one is left")
        assert int(await bus._redis.hget(bus.keys.req("r"), "attempts")) == 0


async def test_an_unreadable_submission_is_a_dead_letter_and_its_request_ends(bus: Bus) -> None:
    await bus.streams.create(bus.keys.out(GATEWAY), 300)
    stream = bus.keys.sub("interactive")
    await submit(bus, make_submit("broken"))
    await bus._redis.xtrim(stream, maxlen=0)
    await bus._redis.xadd(stream, {"b": m.encode({"rid": "broken", "tenant": 7}), "e": "0"})
    await bus._redis.xadd(stream, {"b": b"\xc1\xc1", "e": "0"})
    await bus._redis.xadd(stream, {"nothing": "at all"})
    await bus._redis.xadd(bus.keys.ended, {"b": b"\xc1"})
    worker = await FakeWorker(bus, "w1").join()
    async with running_scheduler(bus):
        await submit(bus, make_submit("r"))
        await holds(worker, "r")
        await bus._redis.xadd(bus.keys.ended, {"b": b"\xc1"})
        await wait_until(lambda: _has_length(bus, bus.keys.dlq, 4), "all are put aside")
        assert await state(bus, "broken") == "failed"
        assert [delta.rid for delta in await deltas(bus)] == ["broken"]
        assert await bus._redis.xlen(stream) == 0


async def test_a_request_lost_on_its_way_to_a_worker_is_queued_again(bus: Bus) -> None:
    worker = await FakeWorker(bus, "w1").join()
    async with running_scheduler(bus):
        await submit(bus, make_submit("lost"), make_submit("kept"))
        await wait_until(lambda: _has_length(bus, bus.keys.work("w1"), 1), "they are assigned")
        await bus._redis.xtrim(bus.keys.work("w1"), maxlen=0)  # as on a server that returns without its last writes
        await holds(worker, "lost", "kept")
        assert worker.held["lost"].epoch == 3
        assert int(await bus._redis.hget(bus.keys.req("lost"), "attempts")) == 0


async def test_an_end_that_the_scheduler_was_not_told_of_frees_its_place(bus: Bus) -> None:
    worker = await FakeWorker(bus, "w1", capacity=1).join()
    async with running_scheduler(bus):
        await submit(bus, *(make_submit(f"r{i}") for i in range(4)))
        await holds(worker, "r0", "r1", "r2")
        await bus.finish("r0", "failed", "error")  # ended from outside, so no worker reports it
        worker.drop("r0")
        await holds(worker, "r3")


async def test_an_adapter_that_is_nowhere_holds_up_nobody_and_is_fetched_ahead(bus: Bus) -> None:
    worker = await FakeWorker(bus, "w1", capacity=4, resident=["warm"]).join()
    async with running_scheduler(bus):
        await submit(bus, *(make_submit(f"cold{i}", digest=f"c{i}") for i in range(20)))
        await submit(bus, *(make_submit(f"warm{i}", digest="warm") for i in range(4)))
        await holds(worker, *(f"warm{i}" for i in range(4)))
        assert sum(rid.startswith("cold") for rid in worker.held) == 4
        await wait_until(lambda: _prefetches(worker), "it is told to fetch others")


async def test_who_waits_for_adapters_goes_on_as_soon_as_beats_tell(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = await FakeWorker(bus, "w1", capacity=64).join()
    async with running_scheduler(bus):
        await wait_until(lambda: status_is(bus, workers=1), "the worker is known")
        await submit(bus, *(make_submit(f"r{i}", digest=f"c{i}") for i in range(4 * MAX_LOADS)))
        for num in (1, 2, 3, 4):
            await holds(worker, *(f"r{i}" for i in range(num * MAX_LOADS)))
            # From here on at most one pause between rounds ends; an idle scheduler's pause would not even check
            # requests.
            monkeypatch.setattr(session, "WATCH_S", 3600.0)
            worker.resident = [f"c{i}" for i in range(num * MAX_LOADS)]
            await worker.beat()


async def _prefetches(worker: FakeWorker) -> bool:
    await worker.read()
    return {order.kind for order in worker.orders} == {"prefetch"}


async def test_five_hundred_requests_over_three_workers_complete_once_each(bus: Bus) -> None:
    workers = [await FakeWorker(bus, f"w{i}", capacity=16).join() for i in range(3)]
    done = False
    async with running_scheduler(bus), asyncio.TaskGroup() as group:
        for worker in workers:
            group.create_task(worker.run(lambda: done))
        rids = [f"r{i}" for i in range(500)]
        for i, rid in enumerate(rids):
            await submit(bus, make_submit(rid, digest=f"a{i % 7}", tenant=f"t{i % 5}"))

        async def finished() -> bool:
            return all(facts is not None and facts.is_terminal for facts in await bus.requests(rids))

        await wait_until(finished, "all complete")
        done = True
        assigned = [item.rid for worker in workers for batch in worker.batches for item in batch]
        assert sorted(assigned) == sorted(rids)
        assert await bus._redis.xlen(bus.keys.sub("interactive")) == 0


async def _is_gone(bus: Bus, key: str) -> bool:
    return not await bus._redis.exists(key)


async def _has_length(bus: Bus, stream: str, length: int) -> bool:
    return await bus._redis.xlen(stream) == length


async def _stands_by(bus: Bus) -> bool:
    """The status expires, or is renewed, with the leadership."""
    return not await bus._redis.exists(bus.keys.status)


async def test_a_restarted_queue_finds_everything_where_it_was(tmp_path: Path) -> None:
    server = start_embedded(tmp_path)
    bus = Bus(server.url)
    worker = await FakeWorker(bus, "w1", capacity=1).join()
    try:
        async with running_scheduler(bus):
            await submit(bus, *(make_submit(f"r{i}") for i in range(5)))
            await holds(worker, "r0", "r1", "r2")
            await bus._redis.execute_command(
                "WAITAOF", 1, 0, 5000
            )  # unsynced writes may be lost, which another test covers
            server.process.kill()
            server.process.wait()
            server = start_embedded(tmp_path)
            for rid in ("r0", "r1", "r2"):
                await worker.write(rid, 4, end=True)
            await holds(worker, "r3", "r4")
            assert [await state(bus, f"r{i}") for i in range(5)] == ["completed"] * 3 + ["assigned"] * 2
            assert all(item.epoch == 1 for batch in worker.batches for item in batch)
    finally:
        await bus.close()
        server.stop()


async def test_a_scheduler_waits_for_a_queue_that_is_not_there_yet(tmp_path: Path) -> None:
    server = start_embedded(tmp_path)
    server.stop()
    waiting = asyncio.Event()
    task = asyncio.create_task(serve(Settings(redis_url=server.url), waiting))
    server = start_embedded(tmp_path)
    bus = Bus(server.url)
    try:
        await wait_until(lambda: bus._redis.exists(bus.keys.leader), "it leads")
        waiting.set()
        assert await task == 0
    finally:
        await bus.close()
        server.stop()


async def test_metrics_say_who_leads_and_what_was_assigned(bus: Bus) -> None:
    port = free_port()
    worker = await FakeWorker(bus, "w1", resident=["a"]).join()

    def scrape() -> str:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as page:
            return page.read().decode()

    def value(text: str, name: str) -> float:
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    async with running_scheduler(bus, metrics_port=port):
        await submit(bus, make_submit("r", digest="a"))
        await holds(worker, "r")
        text = await asyncio.to_thread(scrape)
        assert value(text, "lorafleet_scheduler_leads ") == 1
        assert value(text, 'lorafleet_assigned_requests_total{adapter="there"}') >= 1
        assert value(text, "lorafleet_queue_seconds_count") >= 1
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(scrape)


async def test_a_queue_that_may_evict_is_refused_and_the_lock_runs_out(bus: Bus) -> None:
    await bus._redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(Internal, match="noeviction"):
            await serve(Settings(redis_url=bus.url), asyncio.Event())
    finally:
        await bus._redis.config_set("maxmemory-policy", "noeviction")


async def test_an_unreadable_adapter_record_stops_nothing(bus: Bus) -> None:
    await bus._redis.set(bus.keys.adapter("a"), b"\xc1")
    worker = await FakeWorker(bus, "w1").join()
    async with running_scheduler(bus):
        await submit(bus, make_submit("r", digest="a"))
        await holds(worker, "r")


async def test_what_came_back_while_a_death_is_settled_is_not_forgotten(bus: Bus) -> None:
    """One of a dead worker's requests ends, and another, handed back by the worker itself, is read, in the meantime."""
    scheduler = Scheduler(SchedulerConfig())
    recovery = Recovery(bus, scheduler, 3)
    await FakeWorker(bus, "w1").join()
    scheduler.beats(await bus.members.worker_beats(), 0.0)
    subs = [make_submit("cancelled"), make_submit("back")]
    await submit(bus, *subs)
    await bus.assign("w1", [(m.Assigned(sub.rid, 1, ""), 0) for sub in subs])
    for sub in subs:
        scheduler.adopt("w1", sub, 1, 0)
    await bus.cancel("cancelled")
    await bus.requeue("w1", ["back"], counts=False, max_attempts=3)
    finish = bus.finish

    async def finish_and_read(rid: str, *args: Any, **more: Any) -> bool:
        scheduler.submit(subs[1], 2)  # what the session's reading loop does
        return await finish(rid, *args, **more)

    bus.finish = finish_and_read  # type: ignore[method-assign]
    await recovery.bury("w1")
    assert scheduler.requests.keys() == {"back"}
    assert scheduler.backlog.num_queued == 1

"""The queue's client: streams, registers, messages that cannot be decoded, unsuitable servers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lorafleet.launcher.embedded import EmbeddedServer, start_embedded
from protocol.queue.bus import CONNECTION_ERRORS, TIMEOUT_S, Bus, decode, now_ms
from protocol.queue.connection.redis_client import connect
from protocol.wire import messages as m
from protocol.wire.errors import Internal, ProtocolError
from protocol.wire.keys import Keys
from tests.helpers.waiting import wait_until


async def test_read_waits_for_new_entries_and_moves_on(bus: Bus) -> None:
    last = {"x": b"0", "y": b"0"}
    await bus._redis.xadd("x", {"b": "1"})
    found = await bus.streams.read(last, block_ms=1000)
    assert [fields[b"b"] for _, fields in found["x"]] == [b"1"]
    reading = asyncio.ensure_future(bus.streams.read(last, block_ms=60_000))
    await bus._redis.xadd("y", {"b": "2"})
    found = await reading
    assert list(found) == ["y"]
    assert last == {"x": last["x"], "y": found["y"][-1][0]}
    assert await bus.streams.read(last, block_ms=1) == {}
    await bus._redis.delete("x", "y")


async def test_a_read_keeps_no_other_waiting_nor_one_given_up(bus: Bus) -> None:
    given_up = asyncio.ensure_future(bus.streams.read({"x": b"0"}, block_ms=60_000))
    reading = asyncio.ensure_future(bus.streams.read({"y": b"0"}, block_ms=60_000))

    async def both_wait() -> bool:
        return int((await bus._redis.info("clients"))["blocked_clients"]) == 2

    await wait_until(both_wait, "both reads wait")
    given_up.cancel()
    await asyncio.wait([given_up])
    await bus._redis.xadd("x", {"b": "1"})
    assert list(await bus.streams.read({"x": b"0"}, block_ms=1)) == ["x"]
    await bus._redis.xadd("y", {"b": "2"})
    assert list(await reading) == ["y"]
    await bus._redis.delete("x", "y")


async def test_a_read_after_the_end_opens_no_connection(queue_server: EmbeddedServer) -> None:
    bus = Bus(queue_server.url)
    await bus.close()
    with pytest.raises(CONNECTION_ERRORS):
        await bus.streams.read({"x": b"0"}, block_ms=1)
    assert not bus.streams._lines


async def test_read_returns_several_streams_and_at_most_count_of_each(bus: Bus) -> None:
    for i in range(5):
        await bus._redis.xadd("x", {"b": i})
        await bus._redis.xadd("y", {"b": i})
    last = {"x": b"0", "y": b"0"}
    seen: dict[str, list[bytes]] = {"x": [], "y": []}
    while found := await bus.streams.read(last, block_ms=1, count=2):
        for name, entries in found.items():
            assert len(entries) <= 2
            seen[name] += [fields[b"b"] for _, fields in entries]
    assert seen == {"x": [b"0", b"1", b"2", b"3", b"4"], "y": [b"0", b"1", b"2", b"3", b"4"]}
    await bus._redis.delete("x", "y")


async def test_a_created_stream_is_empty_and_expires(bus: Bus) -> None:
    await bus.streams.create("s", 60)
    assert await bus.streams.entries("s") == []
    assert 0 < await bus._redis.ttl("s") <= 60
    assert await bus.streams.last_id("s") == b"0"
    assert await bus.streams.keep("s", ttl_s=120, max_age_ms=1000)
    assert await bus._redis.ttl("s") > 60
    await bus._redis.delete("s")
    assert not await bus.streams.keep("s", ttl_s=120, max_age_ms=1000)


async def test_old_entries_leave_a_kept_stream(bus: Bus) -> None:
    old = [await bus._redis.xadd("s", {"b": "old"}, id=f"{i}-1") for i in range(1, 300)]
    new = await bus._redis.xadd("s", {"b": "new"})
    await bus.streams.keep("s", ttl_s=60, max_age_ms=60_000)
    left = [entry for entry, _ in await bus.streams.entries("s")]
    assert new in left
    assert len(left) < len(old)
    assert await bus.streams.last_id("s") == new


async def test_a_stream_with_something_unseen_is_not_deleted(bus: Bus) -> None:
    await bus.streams.create("s", 60)
    await bus._redis.xadd("s", {"b": "1"})
    assert not await bus.streams.delete("s", 0)
    assert await bus.streams.delete("s", 1)
    assert not await bus._redis.exists("s")


async def test_an_order_reaches_a_worker_that_is_there(bus: Bus) -> None:
    await bus.streams.create(bus.keys.ctl("w"), 60)
    order = m.Control(kind="prefetch", digest="d")
    await bus.streams.tell([("w", order), ("gone", order)])
    assert [decode(fields[b"b"], m.Control) for _, fields in await bus.streams.entries(bus.keys.ctl("w"))] == [order]
    assert not await bus._redis.exists(bus.keys.ctl("gone"))


async def test_beats_register_and_expire_and_an_unreadable_one_hides_no_other(bus: Bus) -> None:
    for wid in ("w1", "w2", "w3"):
        raw = m.encode(m.WorkerBeat(wid=wid, name=wid, capacity=1))
        await bus.members.beat(bus.keys.worker_beat(wid), bus.keys.workers, wid, raw, 60_000)
    await bus._redis.delete(bus.keys.worker_beat("w2"))
    await bus._redis.set(bus.keys.worker_beat("w3"), b"\xc1", px=60_000)
    beats = await bus.members.worker_beats()
    assert {wid: beat is not None for wid, beat in beats.items()} == {"w1": True, "w2": False, "w3": False}
    assert await bus.members.ids(bus.keys.workers, 60_000) == ["w1", "w2", "w3"]
    await bus._redis.zadd(bus.keys.workers, {"w1": now_ms() - 120_000})
    assert await bus.members.ids(bus.keys.workers, 60_000) == ["w2", "w3"]
    await bus.members.leave("w1")
    assert set(await bus.members.worker_beats()) == {"w2", "w3"}


async def test_a_beat_renews_the_streams_its_sender_reads(bus: Bus) -> None:
    await bus.streams.create("s", 60)
    await bus.members.beat(bus.keys.worker_beat("w"), bus.keys.workers, "w", b"", 4000, ["s", "never"])
    assert 3000 < await bus._redis.ttl("s") <= 3600
    assert not await bus._redis.exists("never")


async def test_gateways_are_known_until_they_are_forgotten(bus: Bus) -> None:
    for gid in ("g1", "g2"):
        await bus.members.beat(bus.keys.gateway_beat(gid), bus.keys.gateways, gid, b"url", 5000)
    await bus._redis.delete(bus.keys.gateway_beat("g2"))
    assert await bus.members.gateways_alive() == {"g1": True, "g2": False}
    await bus.members.forget_gateway("g2")
    assert await bus.members.gateways_alive() == {"g1": True}


async def test_a_rejected_entry_is_a_dead_letter_once(bus: Bus) -> None:
    stream = bus.keys.sub("interactive")
    await bus._redis.xadd(stream, {"b": b"\xc1", "e": "0"})
    (entry,) = await bus.streams.entries(stream)
    await bus.streams.reject(stream, entry, "no message")
    assert await bus.streams.entries(stream) == []
    ((_, fields),) = await bus.streams.entries(bus.keys.dlq)
    letter = decode(fields[b"b"], m.DeadLetter)
    assert (letter.reason, letter.stream, letter.raw) == ("no message", stream, b"\xc1")
    assert await bus._redis.ttl(bus.keys.dlq) > 600_000


async def test_unreadable_work_is_rejected_and_the_rest_is_returned(bus: Bus) -> None:
    stream = bus.keys.work("w")
    await bus.streams.create(stream, 60)
    await bus._redis.xadd(stream, {"b": m.encode([m.Assigned("a", 1, "")])})
    await bus._redis.xadd(stream, {"b": b"\xc1"})
    await bus._redis.xadd(stream, {"wrong": b"field"})
    assert [item.rid for item in await bus.work_of("w")] == ["a"]
    assert await bus._redis.xlen(stream) == 1
    assert await bus._redis.xlen(bus.keys.dlq) == 2


async def test_values_and_names_are_read_back(bus: Bus) -> None:
    status = m.SchedulerStatus(queued=1, running=2, workers=3, drain_rate=0.5)
    assert await bus.get(bus.keys.status, m.SchedulerStatus) is None
    await bus.set(bus.keys.status, status, 5000)
    assert await bus.get(bus.keys.status, m.SchedulerStatus) == status
    alias = m.Alias(name="org/a", state="on_disk", digest="d")
    await bus._redis.hset(bus.keys.adapters, "org/a", m.encode(alias))
    assert await bus.adapters.alias("org/a") == alias
    assert await bus.adapters.alias("org/b") is None
    assert await bus.adapters.aliases() == [alias]
    record = m.AdapterRecord(
        digest="d", rank=8, num_bytes=9, config={}, modules=["q_proj"], source="local:a", created_ms=1
    )
    await bus.set(bus.keys.adapter("d"), record)
    assert await bus.adapters.records(["d", "unknown"]) == {"d": record}


async def test_a_log_is_read_from_any_place_with_its_end(bus: Bus) -> None:
    sub = m.RequestHead(
        rid="r", tenant="t", cls="interactive", digest="", num_prompt_tokens=1, max_new_tokens=4,
        deadline_ms=now_ms() + 3_600_000, gateway="",
    )  # fmt: skip
    await bus.submit("interactive", [(sub, m.Body(prompt=b"", sampling=m.Sampling(), max_new_tokens=4))], max_queued=9)
    await bus._redis.set(bus.keys.tok("r"), b"aaaabbbbcccc", ex=60)
    delta = await bus.read_log("r", 1)
    assert delta is not None
    assert (delta.seq0, delta.ids, delta.finish) == (1, b"bbbbcccc", "")
    await bus.finish("r", "completed", "stop")
    delta = await bus.read_log("r", 3)
    assert delta is not None
    assert (delta.ids, delta.finish) == (b"", "stop")
    assert await bus.read_log("unknown", 0) is None
    facts, unknown = await bus.requests(["r", "unknown"])
    assert facts is not None
    assert (facts.state, facts.num_output_tokens, facts.is_terminal, unknown) == ("completed", 3, True, None)
    assert await bus.owned(["unknown"]) == [None]


async def test_a_queue_that_may_evict_is_refused(bus: Bus) -> None:
    await bus.server.check()
    await bus._redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(Internal, match="allkeys-lru"):
            await bus.server.check()
    finally:
        await bus._redis.config_set("maxmemory-policy", "noeviction")


async def test_a_service_waits_for_a_queue_that_is_not_there_yet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Services start in any order: one that starts before the queue logs that it waits, and can be stopped."""
    server = EmbeddedServer(tmp_path, durable=False, guarded=False)
    bus, stop = Bus(server.url), asyncio.Event()
    waiting = asyncio.create_task(bus.server.reach(stop))
    stopped = asyncio.create_task(bus.server.reach(gone := asyncio.Event()))
    await wait_until(lambda: caplog.text.count("cannot be reached, waiting for it") == 2, "both say so")
    gone.set()
    assert await stopped is False
    await asyncio.to_thread(server.start)
    try:
        assert await waiting is True
    finally:
        await bus.close()
        await asyncio.to_thread(server.stop)
    assert caplog.text.count("cannot be reached, waiting for it") == 2, "a cause is told once"


async def test_a_service_that_waits_for_a_silent_queue_can_be_stopped(tmp_path: Path) -> None:
    """A server that accepted connections without answering delayed a stop by 25 seconds."""
    is_asked, stop = asyncio.Event(), asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            is_asked.set()
        writer.close()

    async with await asyncio.start_unix_server(silent, tmp_path / "s"):
        bus = Bus(f"unix://{tmp_path / 's'}")
        waiting = asyncio.create_task(bus.server.reach(stop))
        await is_asked.wait()
        stop.set()
        done, _ = await asyncio.wait([waiting], timeout=TIMEOUT_S)  # before the first attempt times out
        assert done
        assert waiting.result() is False
        await bus.close()


@pytest.mark.parametrize("kind", ["write", "pipeline", "script", "blocking read"])
async def test_a_cancelled_call_ends_its_task_whenever_the_cancellation_comes(bus: Bus, kind: str) -> None:
    calls = {
        "write": lambda: bus._redis.xadd("s", {"b": "1"}, maxlen=10),
        "pipeline": lambda: bus.owned(["a", "b"]),
        "script": lambda: bus.position("a"),
        "blocking read": lambda: bus.streams.read({"none": b"0"}, block_ms=1),
    }

    async def call_for_ever() -> None:
        while True:
            await calls[kind]()

    for turns in range(200):
        task = asyncio.create_task(call_for_ever())
        for _ in range(turns % 40):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=60)
        assert done, f"went on after {turns % 40} turns of the loop"
    await bus._redis.delete("s")


async def test_a_server_that_does_not_answer_is_a_lost_connection(tmp_path: Path) -> None:
    """Not a hang, neither while connecting nor while waiting for a reply."""

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1000):
            pass
        writer.close()

    silent = await asyncio.start_unix_server(swallow, tmp_path / "s")
    client = connect(f"unix://{tmp_path / 's'}", timeout_s=0.05)
    async with silent:
        with pytest.raises(CONNECTION_ERRORS):
            await client.get("x")
        await client.aclose()


def test_decode_says_what_is_wrong_and_ignores_what_it_does_not_know() -> None:
    with pytest.raises(ProtocolError, match="rid"):
        decode(m.encode({"tenant": "t"}), m.RequestHead)
    raw = m.encode({"kind": "cancel", "new_field": 1})
    assert decode(raw, m.Control) == m.Control(kind="cancel")
    assert decode(m.encode(["r", 1, "d"]), m.Assigned) == m.Assigned("r", 1, "d")


def test_fleets_with_other_names_share_no_key() -> None:
    one, two = Keys(), Keys(namespace="other")
    for key in ("req", "tok", "work", "worker_beat"):
        assert getattr(one, key)("x") != getattr(two, key)("x")
    assert one.is_permanent(one.ended)
    assert not one.is_permanent(one.req("x"))


async def test_a_restarted_server_is_noticed_once(tmp_path: Path) -> None:
    server = start_embedded(tmp_path)
    bus = Bus(server.url)
    try:
        assert [await bus.restarted() for _ in range(3)] == [False] * 3
        server.process.kill()
        server.process.wait()
        server.start()
        assert [await bus.restarted() for _ in range(3)] == [True, False, False]
    finally:
        await bus.close()
        server.stop()


async def test_a_server_that_restarts_again_within_a_call_is_a_lost_connection(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = bus._redis.script_load

    async def load_and_restart(script: str) -> str:
        sha = await load(script)
        await bus._redis.script_flush()
        return sha

    await bus._redis.script_flush()
    monkeypatch.setattr(bus._redis, "script_load", load_and_restart)
    with pytest.raises(CONNECTION_ERRORS):
        await bus.position("r")
    monkeypatch.undo()
    assert await bus.position("r") is None

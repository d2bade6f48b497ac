"""Clients that leave, streams that break, gateways that end: nothing keeps running unread, and nothing is lost."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import httpx2
import orjson
import pytest
from helpers.asgi import AsgiClient
from helpers.reported import report
from helpers.scripted_fleet import RunningGateway, Script, ScriptedFleet, gateway_client, running_gateway
from helpers.waiting import wait_until

from gateway.app.app import Envelope
from gateway.http.access import RouteTable
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire import messages as m

COMPLETION = {"model": "base", "prompt": "hi", "max_tokens": 60}
ROOT = Path(__file__).parents[3]


async def state_of(bus: Bus, rid: str) -> str:
    [facts] = await bus.requests([rid])
    return facts.state if facts else ""


async def is_in_state(bus: Bus, rid: str, state: str) -> bool:
    return await state_of(bus, rid) == state


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_is_cancelled(
    bus: Bus, fleet: ScriptedFleet, gateway: RunningGateway, stream: bool
) -> None:
    fleet.script = lambda submit, body: Script(hold_after=2)
    async with gateway.client() as http, asyncio.TaskGroup() as group:
        asked = group.create_task(http.post("/v1/completions", json={**COMPLETION, "n": 2, "stream": stream}))
        await wait_until(lambda: len(fleet.seen) == 2, "both choices run")
        asked.cancel()
    for submit, _ in fleet.seen:
        [facts] = await bus.requests([submit.rid])
        assert facts is not None

    async def both_told() -> bool:
        values = [await bus._redis.hget(bus.keys.req(submit.rid), "cancel") for submit, _ in fleet.seen]
        return values == [b"1", b"1"]

    await wait_until(both_told, "the queue knows")
    fleet.go.set()
    for submit, _ in fleet.seen:
        await wait_until(lambda rid=submit.rid: is_in_state(bus, rid, "cancelled"), "the worker has let go")


async def test_a_queued_call_whose_client_leaves_is_taken_out_of_the_queue(
    bus: Bus, fleet: ScriptedFleet, gateway: RunningGateway
) -> None:
    fleet.assigning.clear()
    async with gateway.client() as http, asyncio.TaskGroup() as group:
        asked = group.create_task(http.post("/v1/completions", json=COMPLETION))
        await wait_until(lambda: fleet.seen, "it is queued")
        asked.cancel()

    async def is_gone() -> bool:
        return await bus._redis.xlen(bus.keys.sub("interactive")) == 0

    await wait_until(is_gone, "the queue is empty")
    assert await state_of(bus, fleet.seen[0][0].rid) == "cancelled"


async def test_a_client_that_leaves_while_its_call_is_submitted_is_cancelled(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = Bus.submit

    async def submit_and_hear_nothing(self: Bus, *args: Any, **more: Any) -> Any:
        await submit(self, *args, **more)
        await asyncio.Event().wait()

    monkeypatch.setattr(Bus, "submit", submit_and_hear_nothing)
    fleet.assigning.clear()
    async with (
        gateway_client(bus, model_folder, keepalive_s=0.02) as http,
        asyncio.TaskGroup() as group,
    ):
        asked = group.create_task(http.post("/v1/completions", json={**COMPLETION, "stream": True}))
        await wait_until(lambda: fleet.seen, "the queue has it")
        asked.cancel()
        await wait_until(lambda: is_in_state(bus, fleet.seen[0][0].rid, "cancelled"), "the queue knows")


async def test_a_burst_beyond_every_pool_is_answered(fleet: ScriptedFleet, gateway: RunningGateway) -> None:
    limits = httpx2.Limits(max_connections=200)
    async with gateway.client(limits=limits) as http:
        answers = await asyncio.gather(*(http.post("/v1/completions", json=COMPLETION) for _ in range(200)))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["choices"][0]["text"] for answer in answers} == {Script().text}
    assert len({answer.json()["id"] for answer in answers}) == 200


async def test_lost_entries_are_read_from_the_log(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    """First, all deltas except the last are lost, then all of them."""
    async with (
        running_gateway(bus, model_folder, keepalive_s=0.05) as gateway,
        gateway.client() as http,
    ):
        for lost in ("all but the last", "all"):
            fleet.seen.clear()
            fleet.assigning.clear()
            async with asyncio.TaskGroup() as group:
                asked = group.create_task(http.post("/v1/completions", json=COMPLETION))
                await wait_until(lambda: fleet.seen, "it is queued")
                submit, body = fleet.seen[0]
                order = m.Assigned(submit.rid, 1, "", "base", "nobody" if lost == "all" else "")
                await bus.assign(fleet.wid, [(order, 0)])
                ids, _ = fleet.tokens(Script(), body)
                assert await fleet.step(order, 0, ids[:-1], body, end="")
                last = m.Assigned(submit.rid, 1, "", "base", "nobody" if lost == "all" else gateway.gid)
                assert await fleet.step(last, len(ids) - 1, ids[-1:], body, end="stop")
                answer = await asked
            fleet.assigning.set()
            assert answer.json()["choices"][0]["text"] == Script().text
            assert answer.json()["usage"]["completion_tokens"] == len(ids)


async def test_a_new_owner_s_overlap_is_cut(bus: Bus, fleet: ScriptedFleet, gateway: RunningGateway) -> None:
    """Around a handover, a delta is delivered twice, and one of the old owner late."""
    fleet.assigning.clear()
    async with gateway.client() as http, asyncio.TaskGroup() as group:
        asked = group.create_task(http.post("/v1/completions", json={**COMPLETION, "stream": True}))
        await wait_until(lambda: fleet.seen, "it is queued")
        submit, body = fleet.seen[0]
        first = m.Assigned(submit.rid, 1, "", "base", gateway.gid)
        await bus.assign(fleet.wid, [(first, 0)])
        ids, _ = fleet.tokens(Script(), body)
        assert await fleet.step(first, 0, ids[:4], body, end="")
        outcome = await bus.requeue(fleet.wid, [submit.rid], counts=True, max_attempts=3)
        assert outcome == {submit.rid: "requeued"}
        second = m.Assigned(submit.rid, 3, "", "base", gateway.gid)
        await bus.assign(fleet.wid, [(second, 2)])
        assert not await fleet.step(first, 4, ids[4:6], body, end="")  # the queue refuses the old owner
        out = bus.keys.out(gateway.gid)
        for delta in (
            m.Delta(submit.rid, 3, 2, m_ids(ids[2:5])),  # overlapping; its new token is not in the log yet
            m.Delta(submit.rid, 1, 4, m_ids([9, 9])),  # from the old owner, to be ignored
            m.Delta(submit.rid, 3, 2, m_ids(ids[2:5])),
        ):
            await bus._redis.xadd(out, {"b": m.encode([delta])})
        assert await fleet.step(second, 4, ids[4:], body, end="stop")
        raw = (await asked).content
    fleet.assigning.set()
    texts = [orjson.loads(frame)["choices"][0]["text"] for frame in re.findall(rb"{.*}", raw)]
    assert "".join(texts) == Script().text


def m_ids(ids: list[int]) -> bytes:
    return b"".join(id_.to_bytes(4, "little") for id_ in ids)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_lost_out_stream_comes_back(bus: Bus, fleet: ScriptedFleet, model_folder: Path, stream: bool) -> None:
    """Tokens written in the meantime are read from the log at once, not after a timeout of the stream."""
    fleet.script = lambda submit, body: Script(hold_after=2)
    async with (
        running_gateway(bus, model_folder, keepalive_s=10_000) as gateway,
        gateway.client() as http,
        asyncio.TaskGroup() as group,
    ):
        asked = group.create_task(http.post("/v1/completions", json={**COMPLETION, "stream": stream}))
        await wait_until(lambda: fleet.seen, "it runs")
        rid = fleet.seen[0][0].rid

        async def has_two_tokens() -> bool:
            [facts] = await bus.requests([rid])
            return facts is not None and facts.num_output_tokens == 2

        await wait_until(has_two_tokens, "two tokens are delivered")
        await bus._redis.delete(bus.keys.out(gateway.gid))
        fleet.go.set()
        raw = (await asked).content
        assert await bus._redis.ttl(bus.keys.out(gateway.gid)) > 0
    texts = [orjson.loads(frame)["choices"][0]["text"] for frame in re.findall(rb"{.*}", raw)]
    assert "".join(texts) == Script().text


async def test_a_request_that_the_queue_forgot_is_submitted_again(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    fleet.assigning.clear()
    async with (
        gateway_client(bus, model_folder, keepalive_s=0.05) as http,
        asyncio.TaskGroup() as group,
    ):
        asked = group.create_task(http.post("/v1/completions", json={**COMPLETION, "n": 2}))
        await wait_until(lambda: len(fleet.seen) == 2, "it is queued")
        for submit, _ in fleet.seen:
            await bus._redis.delete(*(key(submit.rid) for key in (bus.keys.req, bus.keys.call, bus.keys.body)))
        await wait_until(lambda: len(fleet.seen) == 4, "it is queued again")
        fleet.assigning.set()
        answer = await asked
    assert sorted(submit.rid for submit, _ in fleet.seen[:2]) == sorted(submit.rid for submit, _ in fleet.seen[2:])
    assert [choice["text"] for choice in answer.json()["choices"]] == [Script().text] * 2


async def test_a_forgotten_request_of_another_gateway_is_an_error_worth_a_retry(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    fleet.assigning.clear()
    key = {"idempotency-key": "k"}
    async with (
        running_gateway(bus, model_folder) as first,
        running_gateway(bus, model_folder) as second,
        first.client() as http,
        second.client() as other,
        asyncio.TaskGroup() as group,
    ):
        asked = group.create_task(http.post("/v1/completions", json=COMPLETION, headers=key))
        await wait_until(lambda: fleet.seen, "it is queued")
        reads = await _log_reads(other)  # both gateways count in this process
        again = group.create_task(other.post("/v1/completions", json=COMPLETION, headers=key))

        async def is_followed() -> bool:
            return await _log_reads(other) > reads

        await wait_until(is_followed, "the second gateway reads the request's log")
        asked.cancel()
        await bus._redis.delete(bus.keys.req(fleet.seen[0][0].rid))
        answer = await again
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "request_lost")
    assert answer.headers["x-should-retry"] == "true"


async def _log_reads(http: httpx2.AsyncClient) -> float:
    lines = (await http.get("/metrics")).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("lorafleet_gateway_log_reads_total "))


async def test_a_queue_that_lost_its_last_second_is_told_what_clients_have_seen(
    bus: Bus, fleet: ScriptedFleet, gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log, owner and epoch are older than what the client has received, and continue from there."""
    restarted = asyncio.Event()

    async def was_restarted(self: Bus) -> bool:
        was, _ = restarted.is_set(), restarted.clear()
        return was

    monkeypatch.setattr(Bus, "restarted", was_restarted)
    fleet.assigning.clear()
    raw = b""
    async with gateway.client() as http, asyncio.TaskGroup() as group:
        shown = asyncio.Event()

        async def ask() -> None:
            nonlocal raw
            body = {**COMPLETION, "stream": True}
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                async for part in answer.aiter_raw():
                    raw += part
                    if raw.count(b"data:") == 4:
                        shown.set()

        group.create_task(ask())
        await wait_until(lambda: fleet.seen, "it is queued")
        submit, body = fleet.seen[0]
        first = m.Assigned(submit.rid, 1, "", "base", gateway.gid)
        await bus.assign(fleet.wid, [(first, 0)])
        ids, _ = fleet.tokens(Script(), body)
        req, tok = bus.keys.req(submit.rid), bus.keys.tok(submit.rid)
        before = await bus._redis.hgetall(req)
        await bus.requeue(fleet.wid, [submit.rid], counts=True, max_attempts=3)
        second = m.Assigned(submit.rid, 3, "", "base", gateway.gid)
        await bus.assign(fleet.wid, [(second, 2)])
        for i in range(4):
            assert await fleet.step(second, i, ids[i : i + 1], body, end="")
        await shown.wait()
        await bus._redis.hset(req, mapping=before)
        await bus._redis.set(tok, m_ids(ids[:2]), keepttl=True)
        restarted.set()

        async def is_mended() -> bool:
            return await bus._redis.get(tok) == m_ids(ids[:4])

        await wait_until(is_mended, "the log holds what was shown")
        assert await fleet.step(first, 4, ids[4:], body, end="stop")
    fleet.assigning.set()
    texts = [orjson.loads(frame)["choices"][0]["text"] for frame in re.findall(rb"{.*}", raw)]
    assert "".join(texts) == Script().text


async def test_unreadable_messages_break_neither_the_gateway_nor_a_call(
    bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient, gateway: RunningGateway
) -> None:
    bases, _ = await bus.members.bases()
    await bus._redis.hset(bus.keys.bases, bases[0].name, b"\xc1")
    assert (await http.get("/health")).status_code == 500
    await bus._redis.xadd(bus.keys.out(gateway.gid), {"b": b"\xc1"})
    await bus._redis.xadd(bus.keys.out(gateway.gid), {"other": b"field"})
    await report(bus, *bases)
    answer = await http.post("/v1/completions", json=COMPLETION)
    assert answer.json()["choices"][0]["text"] == Script().text
    assert not gateway.task.done()


async def test_a_deadline_ends_a_call_even_without_a_scheduler(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    fleet.assigning.clear()
    async with gateway_client(bus, model_folder, keepalive_s=0.02, request_timeout_s=0.1) as http:
        answer = await http.post("/v1/completions", json=COMPLETION)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert await state_of(bus, fleet.seen[0][0].rid) == "cancelled"


async def test_draining_refuses_new_calls_and_finishes_running_ones(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    fleet.script = lambda submit, body: Script(hold_after=2)
    async with (
        running_gateway(bus, model_folder, grace_s=30) as gateway,
        gateway.client() as http,
        asyncio.TaskGroup() as group,
    ):
        asked = group.create_task(http.post("/v1/completions", json={**COMPLETION, "stream": True}))
        await wait_until(lambda: fleet.seen, "it runs")
        gateway.stop.set()

        async def refuses() -> bool:
            return (await http.get("/health")).json()["status"] == "draining"

        await wait_until(refuses, "it drains")
        answer = await http.post("/v1/completions", json=COMPLETION)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert answer.headers["x-should-retry"] == "true"
        fleet.go.set()
        assert (await asked).content.endswith(b"data: [DONE]\n\n")
        assert await gateway.task == 0
    assert await bus._redis.zscore(bus.keys.gateways, gateway.gid) is None
    assert not await bus._redis.exists(bus.keys.out(gateway.gid), bus.keys.gateway_beat(gateway.gid))


async def test_a_job_is_not_waited_for_at_a_gateway_that_ends(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    fleet.script = lambda submit, body: Script(hold_after=2)
    async with (
        running_gateway(bus, model_folder, grace_s=60) as gateway,
        gateway.client() as http,
        asyncio.TaskGroup() as group,
    ):
        job = (await http.post("/v1/completions", json={**COMPLETION, "background": True})).json()
        group.create_task(http.post("/v1/completions", json=COMPLETION))
        await wait_until(lambda: len(fleet.seen) == 2, "both run")
        gateway.stop.set()

        async def drains() -> bool:
            return (await http.get("/health")).json()["status"] == "draining"

        await wait_until(drains, "it drains")
        answer = await http.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=100"})
        assert answer.json()["status"] in ("queued", "running")
        fleet.go.set()


async def test_a_call_that_the_closing_server_drops_is_told_so_in_json() -> None:
    async def never(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    client = AsgiClient()
    scope = {"type": "http", "method": "GET", "path": "/v1/jobs/job_1", "query_string": b"", "headers": []}
    call = asyncio.create_task(Envelope(never, Settings(), RouteTable([]))(scope, client.receive, client.send))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert client.sent[0]["status"] == 503
    assert (b"x-should-retry", b"true") in client.sent[0]["headers"]
    assert orjson.loads(client.body)["error"]["code"] == "shutting_down"


async def test_what_outlasts_the_grace_is_told_and_cancelled(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    fleet.script = lambda submit, body: Script(hold_after=2)
    async with (
        running_gateway(bus, model_folder, grace_s=0.05) as gateway,
        gateway.client() as http,
        http.stream("POST", "/v1/completions", json={**COMPLETION, "stream": True}) as answer,
    ):
        raw = b""
        async for part in answer.aiter_raw():
            raw += part
            gateway.stop.set()
        assert b'"code":"shutting_down"' in raw
        assert b"[DONE]" not in raw
        assert await gateway.task == 0
    assert await bus._redis.hget(bus.keys.req(fleet.seen[0][0].rid), "cancel") == b"1"
    fleet.go.set()
    await wait_until(lambda: is_in_state(bus, fleet.seen[0][0].rid, "cancelled"), "the worker has let go")


async def test_the_process_runs_and_ends_by_signal(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    environment = {
        **os.environ, "LORAFLEET_REDIS_URL": bus.url, "LORAFLEET_MODEL": str(model_folder), "LORAFLEET_PORT": "0"
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "gateway", cwd=ROOT, env=environment)
    try:

        async def came_up() -> str:
            assert process.returncode is None
            members = await bus.members.ids(bus.keys.gateways)
            return (await bus._redis.get(bus.keys.gateway_beat(members[0]))).decode() if members else ""

        url = await wait_until(came_up, "the gateway is registered")
        async with httpx2.AsyncClient(base_url=url, timeout=60) as http:
            answer = await http.post("/v1/completions", json=COMPLETION)
        assert answer.json()["choices"][0]["text"] == Script().text
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert await bus.members.ids(bus.keys.gateways) == []

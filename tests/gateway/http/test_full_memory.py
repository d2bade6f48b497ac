"""While the queue's memory is full, new work gets 503 and running work completes; afterwards, all continues."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx2
from helpers.full_memory import full_memory
from helpers.scripted_fleet import Script, ScriptedFleet, gateway_client, playing
from helpers.waiting import wait_until

from lorafleet.launcher.embedded import start_embedded
from protocol.queue.bus import CONNECTION_ERRORS, Bus
from protocol.wire import messages as m

COMPLETION = {"model": "base", "prompt": "hi", "max_tokens": 60}


def check_refused(answer: httpx2.Response) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "queue_full")
    assert "memory" in error["message"] or "bytes" in error["message"]
    assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("5", "true")


async def test_a_full_queue_is_503_and_running_streams_end_whole(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, bus: Bus
) -> None:
    fleet.script = lambda submit, body: Script(hold_after=3)
    whole = (await http.post("/v1/completions", json={**COMPLETION, "max_tokens": 3})).json()
    async with asyncio.TaskGroup() as group:
        held = [
            group.create_task(http.post("/v1/completions", json={**COMPLETION, "stream": True, "n": 2}))
            for _ in range(3)
        ]
        await wait_until(lambda: len(fleet.seen) == 7, "the calls are let in")
        async with full_memory(bus):
            for fields in ({}, {"stream": True}, {"background": True}):
                check_refused(await http.post("/v1/completions", json={**COMPLETION, **fields}))
            check_refused(await http.post("/v1/completions", json=COMPLETION, headers={"idempotency-key": "k"}))
            assert (await http.get("/v1/jobs")).json()["data"] == []
            assert (await http.get("/health")).status_code == 200
            fleet.go.set()
            for task in held:
                answer = await task
                assert answer.text.endswith("data: [DONE]\n\n")
                assert answer.text.count('"finish_reason":"stop"') == 2
    fleet.script = lambda submit, body: Script()
    again = await http.post("/v1/completions", json={**COMPLETION, "max_tokens": 3})
    assert again.json()["choices"] == whole["choices"]


async def test_a_queue_that_restarts_with_full_memory_delays_no_answer(tmp_path: Path, model_folder: Path) -> None:
    server = start_embedded(tmp_path / "queue")
    bus = Bus(server.url)
    num_asked = 0

    async def gateway_knows() -> bool:
        """Only `Bus.restarted` asks the server for information, besides this test."""
        nonlocal num_asked
        try:
            stats = await bus._redis.info("commandstats")
        except CONNECTION_ERRORS:
            return False
        num_asked += 1
        return stats.get("cmdstat_info", {"calls": 0})["calls"] >= num_asked

    async def has_three_tokens() -> bool:
        return bool(fleet.seen) and await bus._redis.strlen(bus.keys.tok(fleet.seen[0][0].rid)) == 12

    try:
        async with playing(server.url, model_folder) as fleet, gateway_client(bus, model_folder) as http:
            fleet.script = lambda submit, body: Script(hold_after=3)
            held = asyncio.create_task(http.post("/v1/completions", json={**COMPLETION, "stream": True}))
            await wait_until(has_three_tokens, "the worker waits")
            await fleet.stop_beating()
            server.process.kill()
            server.process.wait()
            server._max_bytes = 1
            server.start()
            await wait_until(gateway_knows, "the gateway knows of the restart")
            fleet.go.set()
            answer = await asyncio.wait_for(held, 20.0)
            assert answer.text.endswith("data: [DONE]\n\n")
    finally:
        await bus.close()
        server.stop()


async def test_adapters_cannot_be_registered_while_memory_is_full(http: httpx2.AsyncClient, bus: Bus) -> None:
    async with full_memory(bus):
        answer = await http.post("/v1/adapters", json={"name": "new", "source": "hub:org/new"})
        check_refused(answer)


async def test_no_call_is_let_in_above_nine_tenths_of_the_memory(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, bus: Bus
) -> None:
    status = m.SchedulerStatus(queued=0, running=0, workers=1, drain_rate=1.0, used_bytes=95, max_bytes=100)
    await bus.set(bus.keys.status, status)

    async def answer_is(code: int) -> httpx2.Response | None:
        answer = await http.post("/v1/completions", json=COMPLETION)
        return answer if answer.status_code == code else None

    check_refused(await wait_until(lambda: answer_is(503), "the gateway has heard of it"))
    metrics = (await http.get("/metrics")).text
    assert "lorafleet_queue_used_bytes 95.0" in metrics
    assert "lorafleet_queue_max_bytes 100.0" in metrics
    assert (await http.get("/v1/jobs")).status_code == 200
    await bus._redis.delete(bus.keys.status)
    await wait_until(lambda: answer_is(200), "there is room again")


async def test_a_queue_that_jobs_have_filled_empties_again(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, bus: Bus
) -> None:
    fleet.assigning.clear()
    body = {**COMPLETION, "n": 32, "max_tokens": 1, "background": True}
    (used, _), made = await bus.memory(), []
    async with full_memory(bus, used + (1 << 20)):
        while (answer := await http.post("/v1/completions", json=body)).status_code == 202:
            made.append(answer.json()["id"])
        check_refused(answer)
        assert len(made) > 5
        fleet.assigning.set()
        for jid in made:
            done = (await http.get(f"/v1/jobs/{jid}", headers={"prefer": "wait=60"})).json()
            assert (done["status"], len(done["result"]["choices"])) == ("completed", 32)
        for jid in made:
            assert (await http.delete(f"/v1/jobs/{jid}")).status_code == 200

        async def is_served() -> bool:  # once the server has also released its clients' buffers
            return (await http.post("/v1/completions", json=COMPLETION)).status_code == 200

        await wait_until(is_served, "calls are let in again", every_s=0.1)

"""Calls without any worker are refused, or wait in the queue if workers are started on demand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
from helpers.scripted_fleet import ScriptedFleet, gateway_client

from protocol.queue.bus import Bus
from protocol.wire import messages as m

BODY: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "the quick"}], "stream": True}
PATH = "/v1/chat/completions"


async def leave(bus: Bus, fleet: ScriptedFleet) -> None:
    """Remove the only worker, also from the scheduler's status."""
    await fleet.stop_beating()
    fleet.assigning.clear()
    await bus._redis.zrem(bus.keys.workers, fleet.wid)
    await bus.set(bus.keys.status, m.SchedulerStatus(queued=0, running=0, workers=0, drain_rate=0.0), 3_600_000)


async def test_a_call_waits_in_the_queue_and_says_for_what(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    await leave(bus, fleet)
    async with (
        gateway_client(bus, model_folder, wait_for_worker_s=60.0, keepalive_s=0.05) as http,
        http.stream("POST", PATH, json=BODY) as answer,
    ):
        assert answer.status_code == 200
        lines = answer.aiter_lines()
        first = await anext(lines)
        assert first == ": queued, waiting for a worker to start"
        assert await bus._redis.xlen(bus.keys.sub("interactive")) == 1
        fleet.beating = True
        fleet.assigning.set()
        rest = [line async for line in lines]
    assert rest[-2:] == ["data: [DONE]", ""]
    assert any('"content":"' in line for line in rest)


async def test_without_the_setting_a_call_is_refused_at_once(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    await leave(bus, fleet)
    async with gateway_client(bus, model_folder) as http:
        answer = await http.post(PATH, json=BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_worker")


async def test_the_fleet_tells_how_much_it_has_to_do(bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient) -> None:
    status = m.SchedulerStatus(queued=5, running=3, workers=1, drain_rate=0.0, drain_next="w")
    await bus.set(bus.keys.status, status, 3_600_000)
    told = (await http.get("/v1/fleet")).json()
    wanted = {"object": "fleet", "workers": 1, "queued": 5, "running": 3, "demand": 8, "drain_next": "w"}
    assert wanted.items() <= told.items()

    # Without requests, and before any worker has published its model, the demand still is one worker.
    await leave(bus, fleet)
    assert (await http.get("/v1/fleet")).json()["demand"] == 0
    await bus._redis.delete(bus.keys.bases)
    assert (await http.get("/v1/fleet")).json()["demand"] == 1

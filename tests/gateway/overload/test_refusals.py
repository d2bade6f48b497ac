"""An overloaded gateway refuses calls before it reads them, and completes running ones."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.clocks import ScaledClock
from helpers.scripted_fleet import Script, ScriptedFleet, gateway_client
from helpers.waiting import wait_until

from gateway.overload.admission import OverloadLimits
from gateway.overload.heartbeat import Pace
from gateway.service import GatewayTimings
from protocol.queue.bus import Bus

COMPLETION = {"model": "base", "prompt": "hi", "max_tokens": 60}


async def post(http: httpx2.AsyncClient, path: str = "/v1/completions", body: Any = COMPLETION) -> httpx2.Response:
    return await http.post(path, json=body)


async def test_a_late_gateway_refuses_unread_calls_and_keeps_its_streams(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    fleet.script = lambda submit, body: Script(hold_after=2)
    clock = ScaledClock()
    async with (
        gateway_client(bus, model_folder, timings=GatewayTimings(pace=Pace(clock=clock))) as http,
        asyncio.TaskGroup() as group,
    ):
        held = group.create_task(post(http, body={**COMPLETION, "stream": True}))
        await wait_until(lambda: fleet.seen, "a call is let in")
        clock.speed = 100.0  # other clocks' waits seem late

        answer = httpx2.Response(400)

        async def is_refused() -> bool:
            nonlocal answer
            answer = await http.post("/v1/completions", content=b"{this is looked into on time only")
            return answer.status_code != 400

        await wait_until(is_refused, "the gateway is late")
        assert answer.status_code == 429
        assert "s behind its event loop's schedule; the limit is 2 s" in answer.json()["error"]["message"]
        assert 2 < int(answer.headers["retry-after"]) <= 60
        assert answer.headers["x-should-retry"] == "true"
        native = await http.post("/generate", json={"inputs": "hi"})
        assert (native.status_code, native.json()["error_type"]) == (429, "overloaded")
        assert (await http.get("/health")).status_code == 200
        fleet.go.set()
        assert (await held).content.endswith(b"data: [DONE]\n\n")
        clock.speed = 1.0

        async def is_let_in() -> bool:
            return (await post(http)).status_code == 200

        await wait_until(is_let_in, "it is on time again")


async def test_open_calls_are_limited(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    fleet.script = lambda submit, body: Script(hold_after=2)
    async with (
        gateway_client(bus, model_folder, max_open_calls=1) as http,
        asyncio.TaskGroup() as group,
    ):
        held = group.create_task(post(http))
        await wait_until(lambda: fleet.seen, "a call is let in")
        answer = await post(http)
        assert answer.status_code == 429
        assert answer.json()["error"]["message"] == "this gateway is answering 1 calls; the limit is 1"
        assert answer.headers["retry-after"] == "5"  # the rate at which calls end is unknown
        assert (await http.get("/v1/jobs")).status_code == 200
        fleet.go.set()
        assert (await held).status_code == 200
        assert (await post(http)).status_code == 200


async def test_calls_wait_in_the_queue_and_not_before_it(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, may_submit = Bus.submit, asyncio.Event()

    async def submit_late(self: Bus, *args: Any, **more: Any) -> Any:
        await may_submit.wait()
        return await submit(self, *args, **more)

    monkeypatch.setattr(Bus, "submit", submit_late)
    limits = OverloadLimits(max_inbound_s=0.2, min_inbound=2, inbound_span_s=0.05)
    asked = list[asyncio.Task[httpx2.Response]]()
    async with gateway_client(bus, model_folder, timings=GatewayTimings(limits)) as http:
        async with asyncio.TaskGroup() as group:

            def is_one_refused() -> bool:
                asked.append(group.create_task(post(http)))
                return any(answer.done() for answer in asked)

            await wait_until(is_one_refused, "the gateway knows how slow it is")
            may_submit.set()
        told = [answer.result() for answer in asked]
        refused = [answer for answer in told if answer.status_code != 200]
        assert {answer.status_code for answer in refused} == {429}
        assert all("calls are waiting to be queued" in answer.json()["error"]["message"] for answer in refused)
        assert len(fleet.seen) == len(told) - len(refused) >= 2
        assert (await post(http)).status_code == 200

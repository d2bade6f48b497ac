"""A tenant that floods the queue leaves room for others."""

from __future__ import annotations

from pathlib import Path

from helpers.scripted_fleet import ScriptedFleet, gateway_client

from protocol.queue.bus import Bus, now_ms
from protocol.wire import messages as m

CALL = {"model": "base", "prompt": "hi", "max_tokens": 4, "background": True}


async def test_a_flood_of_jobs_leaves_room(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    """Both before a status tells of it, and after."""
    fleet.assigning.clear()
    keys = {name: (await bus.api_keys.create(name, ("infer",)))[0] for name in ("flood", "other")}
    await bus.set(bus.keys.status, m.SchedulerStatus(queued=0, running=0, workers=1, drain_rate=0.0), 3_600_000)
    async with gateway_client(bus, model_folder, api_keys=True, max_queued=90) as http:

        async def send(name: str, n: int = 1) -> tuple[int, str]:
            headers = {"authorization": f"Bearer {keys[name]}"}
            answer = await http.post("/v1/completions", json={**CALL, "n": n}, headers=headers)
            return answer.status_code, (answer.json().get("error") or {}).get("message", "")

        seen = [await send("flood", n=8) for _ in range(12)]
        assert [code for code, _ in seen] == [202] * 10 + [429] * 2
        assert "80 of 80 waiting requests are of the same tenant" in seen[-1][1]
        assert (await send("other"))[0] == 202
        status = m.SchedulerStatus(
            queued=81, running=0, workers=1, drain_rate=0.0, sent_ms=now_ms(), queued_batch=81,
            tenants={"flood": m.TenantLoad(80, 80, 1000), "other": m.TenantLoad(1, 1, 10)},
        )  # fmt: skip
        await bus.set(bus.keys.status, status, 3_600_000)
        assert (await send("flood"))[0] == 429
        assert [(await send("other"))[0] for _ in range(8)] == [202] * 8
        assert (await send("other"))[0] == 429  # the queue is full

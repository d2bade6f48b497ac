"""How calls and workers appear in the metrics."""

from __future__ import annotations

from typing import Any

import httpx2
from helpers.scripted_fleet import RunningGateway, Script, ScriptedFleet

from protocol.queue.bus import Bus
from protocol.wire import messages as m

COMPLETION = {"model": "base", "prompt": "the dog", "max_tokens": 4}


async def test_metrics_count_by_adapter_and_by_tenant(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, gateway: RunningGateway, bus: Bus
) -> None:
    await fleet.add_adapter("my-name", "my-digest")

    async def value(line: str) -> float:
        text = (await http.get("/metrics")).text
        return next((float(row.split()[-1]) for row in text.splitlines() if row.startswith(line)), 0.0)

    lines = {
        'lorafleet_http_requests_total{method="POST",route="/v1/completions",status="200"}': 1,
        'lorafleet_generations_total{finish="stop"}': 1,
        'lorafleet_output_tokens_total{kind="adapter"}': len(fleet.tokenizer.encode("abc").ids) + 1,
        'lorafleet_time_to_first_token_seconds_count{kind="adapter"}': 1,
        'lorafleet_adapter_requests_total{adapter="my-name"}': 1,
        'lorafleet_adapter_first_token_seconds_count{adapter="my-name"}': 1,
        'lorafleet_adapter_tokens_total{adapter="my-name",kind="output"}': len(fleet.tokenizer.encode("abc").ids) + 1,
        'lorafleet_tenant_tokens_total{kind="output",tenant="public"}': len(fleet.tokenizer.encode("abc").ids) + 1,
    }
    before = {line: await value(line) for line in lines}
    fleet.script = lambda submit, body: Script(text="abc")
    await http.post("/v1/completions", json={**COMPLETION, "model": "my-name"})
    assert {line: await value(line) - before[line] for line in lines} == lines
    assert await value("lorafleet_workers ") == 1
    assert "text/plain" in (await http.get("/metrics")).headers["content-type"]


async def test_a_call_that_is_asked_again_is_timed_from_then_on(http: httpx2.AsyncClient) -> None:
    async def seconds() -> float:
        rows = (await http.get("/metrics")).text.splitlines()
        return sum(float(row.split()[-1]) for row in rows if row.startswith("lorafleet_call_seconds_sum"))

    before = await seconds()
    for _ in range(2):
        await http.post("/v1/completions", json=COMPLETION, headers={"idempotency-key": "asked-twice"})
    assert await seconds() - before < 60  # not since the start of the machine


async def test_metrics_tell_of_every_live_worker(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, gateway: RunningGateway, bus: Bus
) -> None:
    counters = m.WorkerCounters(num_steps=7, num_cached_tokens=32, num_evictions=3, plan_s=0.25, publish_s=0.5)
    facts: dict[str, Any] = {"capacity": 8, "resident": ["undisclosed"], "num_loads": 5}
    facts |= {"kv_blocks_free": 10, "kv_blocks_total": 12}
    beats = [
        m.WorkerBeat(wid="w1", name="one", sent_ms=2, counters=counters, **facts),
        m.WorkerBeat(wid="w0", name="one", sent_ms=1, **facts),  # the worker before its restart
        m.WorkerBeat(wid="w2", name="two", sent_ms=1, **facts),
    ]
    await fleet.stop_beating()
    for beat in beats:
        await bus.members.beat(bus.keys.worker_beat(beat.wid), bus.keys.workers, beat.wid, m.encode(beat), 3_600_000)

    rows = (await http.get("/metrics")).text.splitlines()
    lines = {
        'lorafleet_worker_steps_total{worker="one"}': 7,
        'lorafleet_worker_phase_seconds_total{phase="plan",worker="one"}': 0.25,
        'lorafleet_worker_phase_seconds_total{phase="publish",worker="one"}': 0.5,
        'lorafleet_worker_tokens_total{kind="cached",worker="one"}': 32,
        'lorafleet_worker_adapter_events_total{event="load",worker="one"}': 5,
        'lorafleet_worker_adapter_events_total{event="eviction",worker="one"}': 3,
        'lorafleet_worker_kv_blocks{state="used",worker="one"}': 2,
        'lorafleet_worker_resident_adapters{worker="one"}': 1,
        'lorafleet_worker_steps_total{worker="two"}': 0,
    }
    for line, value in lines.items():
        assert [float(row.split()[-1]) for row in rows if row.startswith(f"{line} ")] == [value], line
    assert not any("undisclosed" in row for row in rows)

    await bus.members.leave("w2")
    assert 'worker="two"' not in (await http.get("/metrics")).text

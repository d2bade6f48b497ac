"""Locations of adapters and metrics under vLLM's names, for dashboards and routers that expect vLLM."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
from helpers.scripted_fleet import BASE_NAME, Script, ScriptedFleet, gateway_client
from helpers.waiting import wait_until
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from gateway.adapters.residency import MAX_HOLDINGS
from protocol.metrics.fleet import RESIDENCY
from protocol.queue.bus import Bus, now_ms
from protocol.wire import messages as m

COMPLETION = {"model": "base", "prompt": "hi", "max_tokens": 3}


async def test_residency_and_vllm_s_names(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    await fleet.add_adapter("mine", "vllm-d1")
    await fleet.stop_beating()
    beat = m.WorkerBeat(
        wid="w1", name="one", capacity=8, kv_blocks_free=3, kv_blocks_total=4, resident=["vllm-d1"],
        host=["vllm-d1", *(f"h{i}" for i in range(2000))], pinned={"vllm-d1": ""}, pool_bytes_total=40,
        pool_bytes_free=30, waiting=2, waiting_adapter=1,
        sent_ms=now_ms(), counters=m.WorkerCounters(num_steps=7, num_computed_tokens=21),
    )  # fmt: skip
    await bus.members.beat(bus.keys.worker_beat("w1"), bus.keys.workers, "w1", m.encode(beat), 3_600_000)
    await told(bus, running=1, running_adapters=["vllm-d1"], waiting_adapters=["h1"])
    fleet.script = lambda submit, body: Script(hold_after=1)
    try:
        async with gateway_client(bus, model_folder, vllm_metrics=True) as http, asyncio.TaskGroup() as asked:
            for _ in range(3):
                asked.create_task(http.post("/v1/completions", json=COMPLETION))
            await wait_until(partial(shows, http, {"running": 2, "waiting": 1}), "three run, one of them waits there")
            fleet.assigning.clear()
            for _ in range(2):
                asked.create_task(http.post("/v1/completions", json=COMPLETION))
            await wait_until(partial(shows, http, {"running": 2, "waiting": 3}), "two wait for a worker")
            assert "\nvllm:num_requests_running{" in (await http.get("/metrics")).text
            text = (await http.get("/metrics", headers={"accept": "application/openmetrics-text"})).text
            fleet.assigning.set()
            fleet.go.set()
    finally:
        RESIDENCY.seen = None
    families = {family.name: family.samples for family in text_string_to_metric_families(text)}
    loaded = families["lorafleet_adapter_loaded"]
    assert len(loaded) == MAX_HOLDINGS
    first = {"worker": "one", "adapter": "mine", "level": "resident", "pinned": "true", "rank": "8"}
    assert loaded[0].labels == first
    assert families["vllm:lora_adapter_loaded"][0].labels["lora_name"] == "mine"
    values = {name: families[name][0] for name in families if name.startswith("vllm:") and name.count("_") > 1}
    assert values["vllm:num_requests_running"].value == 2
    assert values["vllm:num_requests_waiting"].value == 3
    reasons = {one.labels["reason"]: one.value for one in families["vllm:num_requests_waiting_by_reason"]}
    assert reasons == {"capacity": 2, "deferred": 1}  # their sum is the number of waiting requests, as in vLLM
    steps = {sample.name.rpartition("_")[2]: sample.value for sample in families["vllm:iteration_tokens_total"]}
    assert (steps["count"], steps["sum"]) == (7, 21)
    assert values["vllm:kv_cache_usage_perc"].value == 0.25
    assert values["vllm:kv_cache_usage_perc"].labels == {"model_name": BASE_NAME}
    info = values["vllm:lora_requests_info"]
    assert info.labels == {"running_lora_adapters": "mine", "waiting_lora_adapters": "h1", "max_lora": "4"}
    assert abs(info.value - now_ms() / 1000) < 3600


async def test_nothing_runs_or_waits_after_the_last_answer(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    """Although the scheduler publishes once a second: a benchmark waits for zero before it continues."""
    await told(bus, queued=3, running=5)
    try:
        async with gateway_client(bus, model_folder, vllm_metrics=True) as http:
            for _ in range(5):
                assert (await http.post("/v1/completions", json=COMPLETION)).status_code == 200
                page = (await http.get("/metrics")).text
                ends = {line.partition("{")[0].partition(" ")[0]: line.split()[-1] for line in page.splitlines()}
                for name in (
                    "vllm:num_requests_running", "vllm:num_requests_waiting", "lorafleet_running_requests",
                    "lorafleet_queued_requests", "lorax_batch_current_size", "lorax_queue_length",
                ):  # fmt: skip
                    assert (name, float(ends[name])) == (name, 0)
    finally:
        RESIDENCY.seen = None


async def told(bus: Bus, *, queued: int = 0, running: int = 0, **adapters: Any) -> None:
    """Publish a status as a scheduler does, and let no later one replace it."""
    status = m.SchedulerStatus(queued=queued, running=running, workers=1, drain_rate=1.0, **adapters)
    await bus.set(bus.keys.status, status, 3_600_000)


async def shows(http: httpx2.AsyncClient, nums: dict[str, int]) -> bool:
    page = (await http.get("/metrics")).text
    return all(f'vllm:num_requests_{what}{{model_name="{BASE_NAME}"}} {num}.0\n' in page for what, num in nums.items())


async def test_without_the_setting_there_are_none(http: httpx2.AsyncClient) -> None:
    assert "vllm:" not in (await http.get("/metrics")).text

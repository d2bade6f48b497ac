"""Where adapters are, and vLLM's names of a fleet, for dashboards and routers that know vLLM."""

from __future__ import annotations

from pathlib import Path

import httpx2
from helpers.scripted_fleet import BASE_NAME, ScriptedFleet, gateway_client
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from gateway.adapters.residency import MAX_HOLDINGS
from protocol.metrics.fleet import RESIDENCY
from protocol.queue.bus import Bus, now_ms
from protocol.wire import messages as m


async def test_residency_and_vllm_s_names(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    await fleet.add_adapter("mine", "vllm-d1")
    await fleet.stop_beating()
    beat = m.WorkerBeat(
        wid="w1", name="one", capacity=8, kv_blocks_free=3, kv_blocks_total=4, resident=["vllm-d1"],
        host=["vllm-d1", *(f"h{i}" for i in range(2000))], pinned={"vllm-d1": ""}, pool_bytes_total=40,
        pool_bytes_free=30, waiting=2, waiting_adapter=1,
        sent_ms=now_ms(), counters=m.WorkerCounters(num_steps=7, num_computed_tokens=21),
    )  # fmt: skip
    await bus.members.beat(bus.keys.worker_beat("w1"), bus.keys.workers, "w1", m.encode(beat), 60_000)
    status = m.SchedulerStatus(
        queued=2, running=3, workers=1, drain_rate=1.0, running_adapters=["vllm-d1"], waiting_adapters=["h1"]
    )
    await bus.set(bus.keys.status, status, 60_000)
    try:
        async with gateway_client(bus, model_folder, vllm_metrics=True) as http:
            assert "\nvllm:num_requests_running{" in (await http.get("/metrics")).text
            text = (await http.get("/metrics", headers={"accept": "application/openmetrics-text"})).text
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
    assert reasons == {"capacity": 2, "deferred": 1}  # together those that wait, as in vLLM
    steps = {sample.name.rpartition("_")[2]: sample.value for sample in families["vllm:iteration_tokens_total"]}
    assert (steps["count"], steps["sum"]) == (7, 21)
    assert values["vllm:kv_cache_usage_perc"].value == 0.25
    assert values["vllm:kv_cache_usage_perc"].labels == {"model_name": BASE_NAME}
    info = values["vllm:lora_requests_info"]
    assert info.labels == {"running_lora_adapters": "mine", "waiting_lora_adapters": "h1", "max_lora": "4"}
    assert abs(info.value - now_ms() / 1000) < 3600


async def test_without_the_setting_there_are_none(http: httpx2.AsyncClient) -> None:
    assert "vllm:" not in (await http.get("/metrics")).text

"""LoRAX's routes about the server: information, health and metrics."""

from __future__ import annotations

from typing import Any

import httpx2
from helpers.scripted_fleet import BASE_NAME, RunningGateway, Script, ScriptedFleet, gateway_client
from helpers.waiting import wait_until

from protocol.queue.bus import Bus

ADAPTER = "ab" * 32


async def test_info_and_probes(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    await fleet.add_adapter("fox", ADAPTER)
    info = (await http.get("/info")).json()
    assert (info["model_id"], info["max_total_tokens"], info["max_input_length"]) == (BASE_NAME, 256, 255)
    assert (info["max_best_of"], info["max_stop_sequences"], info["version"]) == (128, 64, "0.1.0")
    assert (info["adapters"], info["num_adapters"]) == (["fox"], 1)
    assert set(info) >= {
        "model_id", "model_sha", "model_dtype", "model_device_type", "model_pipeline_tag", "max_concurrent_requests",
        "max_best_of", "max_stop_sequences", "max_input_length", "max_total_tokens", "waiting_served_ratio",
        "max_batch_total_tokens", "max_waiting_tokens", "validation_workers", "eager_prefill", "version", "sha",
        "docker_label", "request_logger_url",
    }  # fmt: skip
    for path in ("/", "/health", "/ping", "/startup"):
        assert (await http.get(path)).status_code == 200
    for path in ("/", "/health", "/ping"):
        assert ((await http.head(path)).status_code, (await http.head(path)).content) == (200, b"")
    fleet.script = lambda submit, body: Script(text="", eos=False)
    failed = await http.get("/startup")
    assert (failed.status_code, failed.json()["error"]) == (500, "Empty generation")


async def test_no_worker_is_unhealthy(bus: Bus, model_folder: Any) -> None:
    async with gateway_client(bus, model_folder) as http:
        answer = await http.get("/ping")
        assert (answer.status_code, answer.json()["error_type"]) == (503, "healthcheck")
        answer = await http.post("/generate", json={"inputs": "the dog"})
        assert (answer.status_code, answer.json()["error_type"]) == (503, "unavailable")


async def test_metrics_as_text_and_json(http: httpx2.AsyncClient, gateway: RunningGateway) -> None:
    async def counted(name: str, key: str = "") -> float:
        found = (await http.get("/metrics", headers={"accept": "application/json"})).json()
        return next((entry["value"] for entry in found[name]["data"] if entry["key"] == key), 0.0)

    before = await counted("lorax_request_count"), await counted("lorax_request_success")
    await http.post("/generate", json={"inputs": "the dog", "parameters": {"max_new_tokens": 2}})
    await http.post("/generate", json={"inputs": "the dog", "parameters": {"max_new_tokens": 0}})

    async def are_counted() -> bool:  # once their answers have been sent, too
        now = await counted("lorax_request_count"), await counted("lorax_request_success")
        return now == (before[0] + 2, before[1] + 1)

    await wait_until(are_counted, "both are counted, and one as a success")
    assert await counted("lorax_request_failure", 'lorax_request_failure_total{err="validation"}') >= 1
    assert await counted("lorax_request_generated_tokens", "count") >= 1
    text = await http.get("/metrics", headers={"accept": "text/plain"})
    assert text.headers["content-type"].startswith("text/plain")
    assert "\n# TYPE lorax_request_count counter\n" in text.text
    assert "\nlorax_request_count " in text.text
    assert "\nlorafleet_http_requests_total{" in text.text

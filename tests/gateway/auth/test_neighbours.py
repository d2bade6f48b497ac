"""Of other tenants nothing is told: what a tenant may read does not change with what others do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx2
from helpers.scripted_fleet import Script, ScriptedFleet, running_gateway
from helpers.waiting import wait_until

from gateway.http.access import RouteTable
from gateway.http.access_table import unserved
from protocol.queue.bus import Bus
from protocol.wire import messages as m
from protocol.wire.keys import private_name

SHARED, PRIVATE = "ab" * 32, "cd" * 32
GENERATES = {"/startup"}


def read_paths() -> list[str]:
    """Return every path that a tenant's key reads, with names of adapters that all see."""
    matches = [match for method, match in RouteTable(unserved().routes).matches if method == "GET"]
    paths = [match.path for match in matches if match.scopes is None or not {"admin"} & set(match.scopes)]
    return [
        path.replace("{name:path}", "shared").replace("{", "").replace("}", "")
        for path in paths
        if path not in GENERATES
    ]


async def test_what_a_tenant_reads_does_not_change_with_what_others_do(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    heads: dict[str, dict[str, str]] = {}
    for tenant in ("quiet", "busy"):
        secret, _ = await bus.api_keys.create(tenant, ["infer", "adapters"])
        heads[tenant] = {"authorization": f"Bearer {secret}"}
    await fleet.add_adapter("shared", SHARED)
    fleet.script = lambda submit, body: Script(hold_after=1)
    async with (
        running_gateway(bus, model_folder, api_keys=True, secret="the secret of the tests") as gateway,
        httpx2.AsyncClient(base_url=gateway.url, timeout=30) as http,
    ):

        async def seen() -> dict[str, tuple[int, str]]:
            answers = {path: await http.get(path, headers=heads["quiet"]) for path in read_paths()}
            return {path: (answer.status_code, answer.text) for path, answer in answers.items()}

        before = await seen()
        assert sum(status == 200 for status, _ in before.values()) > 20, "the check would prove nothing"
        body: dict[str, Any] = {"model": "shared", "prompt": "hi", "max_tokens": 9}
        running = asyncio.create_task(http.post("/v1/completions", json=body, headers=heads["busy"]))
        for path, more in (
            ("/v1/completions", {**body, "background": True}), ("/v1/conversations", {}),
            ("/v1/responses", {"model": "shared", "input": "hi", "background": True}),
            ("/v1/webhook_endpoints", {"name": "n", "url": "https://8.8.8.8/", "event_types": ["batch.expired"]}),
        ):  # fmt: skip
            answer = await http.post(path, json=more, headers=heads["busy"])
            assert answer.status_code < 300, answer.text
        form = {"purpose": (None, "batch"), "file": ("a.jsonl", b"{}")}
        assert (await http.post("/v1/files", files=form, headers=heads["busy"])).status_code == 200
        alias = m.Alias(name="own", tenant="busy", state="on_disk", digest=PRIVATE, source="local:own", created_ms=1)
        await bus._redis.hset(bus.keys.adapters, private_name("own", "busy"), m.encode(alias))
        fleet.resident, fleet.host = [SHARED], [PRIVATE]
        await fleet.beat()

        async def is_running() -> bool:
            return len(fleet.seen) >= 3

        await wait_until(is_running, "the other tenant's requests run")
        after = await seen()
        assert {path: (before[path], after[path]) for path in before if before[path] != after[path]} == {}
        told = (await http.get("/api/ps", headers=heads["busy"])).json()["models"]
        assert [model["name"] for model in told] == ["tiny/base:latest"]  # also of what it uses itself
        admin, _ = await bus.api_keys.create("ops", ["admin"])
        told = (await http.get("/api/ps", headers={"authorization": f"Bearer {admin}"})).json()["models"]
        assert [model["name"] for model in told] == ["tiny/base:latest", "shared:latest"]
        fleet.go.set()
        assert (await running).status_code == 200

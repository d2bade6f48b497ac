"""Tenants learn nothing about each other: responses to a tenant don't depend on what others do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.scripted_fleet import Script, ScriptedFleet, gateway_client
from helpers.waiting import wait_until

from adapter_store.sources.local import LocalSource
from gateway.app.access_table import unserved
from gateway.http.access import RouteTable
from gateway.http.paths import TIMESERIES
from protocol.queue.bus import Bus
from protocol.wire import messages as m
from protocol.wire.errors import NotFound
from protocol.wire.keys import private_name

SHARED, PRIVATE = "ab" * 32, "cd" * 32
GENERATES = {"/startup"}
OF_REQUESTS = ("requests", "prompt_tokens", "output_tokens", "refused", "server_errors", "hits", "misses")


def read_paths(name: str = "shared") -> list[str]:
    """Return every path that a tenant's key may read, with the name of an adapter visible to all."""
    matches = [match for method, match in RouteTable(unserved().routes).matches if method == "GET"]
    paths = [match.path for match in matches if match.scopes is None or not {"admin"} & set(match.scopes)]
    return [
        path.replace("{name:path}", name).replace("{", "").replace("}", "") for path in paths if path not in GENERATES
    ]


def timeless(answer: httpx2.Response) -> str:
    """Return the text of an answer, but of time series only the totals of the tenant's requests, as reads fail too."""
    if answer.url.path != TIMESERIES:
        return answer.text
    told = answer.json()
    sums = {name: [sum(num or 0 for num in group[name]) for group in told["groups"]] for name in OF_REQUESTS}
    return f"{told['fleet']} {sums}"


async def test_what_a_tenant_reads_does_not_change_with_what_others_do(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    heads: dict[str, dict[str, str]] = {}
    for tenant in ("quiet", "busy"):
        secret, _ = await bus.api_keys.create(tenant, ["infer", "adapters"])
        heads[tenant] = {"authorization": f"Bearer {secret}"}
    await fleet.add_adapter("shared", SHARED)
    fleet.script = lambda submit, body: Script(hold_after=1)
    async with gateway_client(bus, model_folder, api_keys=True, secret="the secret of the tests") as http:

        async def seen() -> dict[str, tuple[int, str]]:
            answers = {path: await http.get(path, headers=heads["quiet"]) for path in read_paths()}
            return {path: (answer.status_code, timeless(answer)) for path, answer in answers.items()}

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
        assert [model["name"] for model in told] == ["tiny/base:latest"]  # its own use is not shown either
        admin, _ = await bus.api_keys.create("ops", ["admin"])
        told = (await http.get("/api/ps", headers={"authorization": f"Bearer {admin}"})).json()["models"]
        assert [model["name"] for model in told] == ["tiny/base:latest", "shared:latest"]
        fleet.go.set()
        assert (await running).status_code == 200


async def test_no_path_of_this_machine_is_told_to_tenants(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, tmp_path: Path
) -> None:
    """An adapter loaded from a further root is served by name; neither its present nor its past path is revealed."""
    place = str(tmp_path / "runs" / "step_5")
    with pytest.raises(NotFound) as gone:
        await LocalSource(None, [tmp_path]).resolve(place)
    stories: tuple[tuple[str, m.AdapterState, str], ...] = (
        ("there", "on_disk", ""), ("gone", "failed", gone.value.message)
    )  # fmt: skip
    for name, state, reason in stories:
        digest = SHARED if state == "on_disk" else ""
        alias = m.Alias(
            name=name, state=state, digest=digest, source=f"local:{place}", reason=reason, status=404 if reason else 0,
            created_ms=1,
        )  # fmt: skip
        record = m.AdapterRecord(
            digest=SHARED, rank=8, num_bytes=10, config={}, modules=["q_proj"], source=alias.source, created_ms=1
        )
        await bus.adapters.publish([(alias, record if digest else None)])
    secret, _ = await bus.api_keys.create("acme", ["infer", "adapters"])
    async with gateway_client(bus, model_folder, api_keys=True, adapter_roots=str(tmp_path), key=secret) as http:
        told = {f"GET {path}": await http.get(path) for name in ("there", "gone") for path in read_paths(name)}
        for path, body in (
            ("/api/show", {"model": "there"}), ("/api/show", {"model": "gone"}),
            ("/v1/completions", {"model": "there", "prompt": "hi", "max_tokens": 1}),
            ("/v1/completions", {"model": "gone", "prompt": "hi", "max_tokens": 1}),
            ("/generate", {"inputs": "hi", "parameters": {"adapter_id": "there", "details": True}}),
            ("/v1/adapters/gone/preload", {}), ("/v1/adapters/there/preload", {}),
            ("/v1/adapters/gone/refresh", {}), ("/v1/adapters", {"name": "gone", "source": place}),
        ):  # fmt: skip
            told[f"POST {path} {body}"] = await http.post(path, json=body)
        assert sum(answer.status_code == 200 for answer in told.values()) > 20, "the check would prove nothing"
        assert "step_5" in told["GET /v1/models/there"].text
        leaks = {name: a.text for name, a in told.items() if str(tmp_path / "runs") in f"{a.text} {a.headers}"}
        assert set(leaks) <= {f"POST /v1/adapters {{'name': 'gone', 'source': {place!r}}}"}, leaks  # it was sent


def test_no_two_schemas_of_the_api_have_one_name() -> None:
    """FastAPI would qualify both with the names of their modules."""
    names = unserved().openapi()["components"]["schemas"]
    assert {"Job", "Batch", "ChatRequest", "OllamaChatRequest"} <= names.keys()
    assert [name for name in names if "__" in name] == []

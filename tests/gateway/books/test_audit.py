"""The audit log has each operator action with caller, target and outcome; tenants can't displace the entries."""

from __future__ import annotations

import asyncio
import re
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from helpers.scripted_fleet import ScriptedFleet, gateway_client
from starlette.requests import Request
from starlette.responses import Response

from gateway.auth.callers import CALLER, EVERYBODY
from gateway.books.audit import ACTIONS, AuditedRoute, about, done
from gateway.http.access import ADMIN, Routes
from protocol.queue.books.audit import MAX_TEXT, AuditEntry, AuditLog, from_command_line
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire.errors import ModelNotFound

OPERATORS = ("/v1/adapters", "/v1/load_lora", "/v1/unload_lora", "/load_lora", "/unload_lora", "/v1/bases",
             "/v1/workers", "/v1/dead_letters", "/v1/keys", "/v1/tenants", "/v1/requests", "/v1/audit")  # fmt: skip
FAULTS: dict[str, BaseException] = {
    "gone": ModelNotFound("it"), "queue": ConnectionError("gone"), "fault": ZeroDivisionError(),
    "stop": asyncio.CancelledError(),
}  # fmt: skip
CHANGES_NOTHING = {"POST /v1/requests/{request_id}/replay"}


async def test_every_route_that_changes_something_is_an_action(http: httpx2.AsyncClient) -> None:
    page = (await http.get("/openapi.json")).json()
    found = {
        f"{method.upper()} {path}"
        for path, methods in page["paths"].items() if path.startswith(OPERATORS)
        for method in methods if method != "get"
    }  # fmt: skip
    plain = {re.sub(r":\w+}", "}", name) for name in ACTIONS}
    assert len(found) > 12, "the check would prove nothing"
    assert found - CHANGES_NOTHING == plain


async def test_it_tells_who_did_what_and_how_it_ended(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    ids: dict[str, str] = {}
    heads: dict[str, dict[str, str]] = {}
    for tenant, scope in (("ops", "admin"), ("acme", "adapters")):
        secret, key = await bus.api_keys.create(tenant, [scope])
        ids[tenant], heads[tenant] = key.id, {"authorization": f"Bearer {secret}"}
    settings: dict[str, Any] = {"api_keys": True, "console_keys": True}
    async with gateway_client(bus, model_folder, **settings) as http:

        async def told(**params: Any) -> dict[str, Any]:
            return (await http.get("/v1/audit", params=params, headers=heads["ops"])).json()

        await http.post("/v1/adapters/nobody/pin", headers=heads["ops"])
        made = (await http.post("/v1/keys", json={"tenant": "new"}, headers=heads["ops"])).json()
        await http.post("/v1/tenants/new", json={"concurrency": 3}, headers=heads["ops"])
        await http.delete(f"/v1/keys/{made['id']}", headers=heads["ops"])
        assert [(one["action"], one["target"], one["outcome"]) for one in (await told())["data"]] == [
            ("key.revoke", made["id"], "done"), ("tenant.change", "new", "done"), ("key.create", "new", "done"),
            ("adapter.pin", "nobody", "model_not_found"),
        ]  # fmt: skip
        first = (await told())["data"][-1]
        assert (first["who"], first["tenant"], first["address"]) == (ids["ops"], "ops", "127.0.0.1")
        assert made["id"] in (await told())["data"][2]["detail"]
        assert (await told())["data"][1]["detail"] == "concurrency=3"
        assert made["secret"] not in str(await told())

        await http.post("/v1/adapters/mine/preload", headers=heads["acme"])
        assert (await http.post("/v1/adapters/mine/pin", headers=heads["acme"])).status_code == 403
        assert len((await told())["data"]) == 4  # actions of tenants are in a separate list
        (theirs,) = (await told(by="tenants"))["data"]
        assert (theirs["who"], theirs["action"], theirs["outcome"]) == (
            ids["acme"], "adapter.preload", "model_not_found",
        )  # fmt: skip
        assert (await http.get("/v1/audit", headers=heads["acme"])).status_code == 403

        page = await told(limit=3)
        rest = await told(limit=3, after=page["last_id"])
        assert (page["has_more"], rest["has_more"]) == (True, False)
        assert [one["id"] for one in [*page["data"], *rest["data"]]] == [one["id"] for one in (await told())["data"]]
        assert (await http.get("/v1/audit?after=x", headers=heads["ops"])).status_code == 400


async def test_each_list_is_bounded(bus: Bus) -> None:
    log = AuditLog(bus._redis, bus.keys, bus._scripts, max_entries=100)
    await log.note(from_command_line("key.create", "first"))
    entry = AuditEntry(1, "key_1", "acme", "::1", "adapter.preload", "x", "", "done", by_operator=False)
    for _ in range(400):
        await log.note(entry)
    assert len(await log.newest(10_000, of_tenants=True)) <= 200  # a stream is trimmed by whole nodes
    ((_, kept),) = await log.newest(10)
    assert (kept.who, kept.target, kept.by_operator) == ("cli", "first", True)
    assert "@" in kept.tenant


async def test_what_was_done_is_told_though_its_answer_failed(subtests: pytest.Subtests) -> None:
    """A started action is recorded however it ends; one refused before it starts is not."""
    noted: list[AuditEntry] = []

    class Log:
        async def note(self, entry: AuditEntry) -> None:
            noted.append(entry)

    async def act(request: Request, ends: str, acts: bool = False) -> Response:
        about(request, "it")
        if acts:
            done(request)
        if ends in FAULTS:
            raise FAULTS[ends]
        return Response(status_code=int(ends))

    app = FastAPI()
    app.state.audit, app.state.settings = Log(), Settings()
    Routes(app, AuditedRoute).post("/v1/load_lora_adapter", ADMIN)(act)
    (route,) = (route for route in app.routes if isinstance(route, AuditedRoute))
    for ends, acts, outcome in [
        ("200", False, "done"), ("404", False, "404"), ("gone", False, "model_not_found"), ("gone", True, "done"),
        ("queue", False, "unknown"), ("queue", True, "done"), ("fault", False, "unknown"), ("stop", True, "done"),
        ("stop", False, "unknown"),
    ]:  # fmt: skip
        with subtests.test(ends=ends, acts=acts):
            noted.clear()
            scope = {
                "type": "http", "method": "POST", "path": route.path, "headers": [], CALLER: EVERYBODY, "app": app,
                "query_string": f"ends={ends}&acts={acts}".encode(), "path_params": {}, "router": app.router,
                **{f"fastapi_{name}_astack": AsyncExitStack() for name in ("middleware", "inner", "function")},
            }  # fmt: skip
            with suppress(*map(type, FAULTS.values())):
                await route.get_route_handler()(Request(scope))
            assert [(entry.target, entry.outcome) for entry in noted] == [("it", outcome)]


async def test_no_name_forges_an_entry(bus: Bus, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    names = ("x\naudit: key.create of all", "x\r\u2028\x00", "\n" * 2000)
    for name in names:
        await bus.audit.note(from_command_line("adapter.register", name, name))
    assert [len(record.getMessage().splitlines()) for record in caplog.records] == [1] * len(names)
    for _, entry in await bus.audit.newest(10):
        assert (entry.target.isprintable(), len(entry.target) <= MAX_TEXT) == (True, True)

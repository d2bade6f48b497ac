"""Bases that operators add and remove while gateways run: permissions, errors, and effects on calls."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from helpers.scripted_fleet import ScriptedFleet, gateway_client, make_model_folder, running_gateway
from helpers.waiting import wait_until

from protocol.queue.bus import Bus
from protocol.wire import messages as m
from tests.gateway.test_bases import add, base, chat, set_bases, speaking


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {name: speaking(tmp_path, name) for name in ("a", "b")}


@pytest_asyncio.fixture
async def http(bus: Bus, fleet: ScriptedFleet, folders: dict[str, Path]) -> AsyncIterator[httpx2.AsyncClient]:
    await set_bases(bus, base("a"), a=1)
    await add(bus, "old", "")
    async with gateway_client(bus, folders["a"]) as client:
        yield client


async def state_of(http: httpx2.AsyncClient, name: str) -> str:
    listed = (await http.get("/v1/bases")).json()["data"]
    return next((one["state"] for one in listed if one["id"] == name), "absent")


async def seen(http: httpx2.AsyncClient, name: str, *states: str) -> None:
    async def is_seen() -> bool:
        return await state_of(http, name) in states

    await wait_until(is_seen, f"the gateway has {name} as {states}")


async def test_a_base_is_added_asked_and_taken_away(
    bus: Bus, http: httpx2.AsyncClient, fleet: ScriptedFleet, folders: dict[str, Path]
) -> None:
    assert (await chat(http, "b")).status_code == 404
    made = await http.post("/v1/bases", json={"model": str(folders["b"])})
    assert made.status_code == 201
    assert (made.json()["id"], made.json()["added"]) == ("b", True)
    again = await http.post("/v1/bases", json={"model": str(folders["b"])})
    assert (again.status_code, again.json()["id"]) == (200, "b")
    await seen(http, "b", "no_worker")
    waits = await chat(http, "b")
    assert (waits.status_code, "no worker is ready to serve `b`" in waits.text) == (503, True)
    assert (await chat(http, "old")).status_code == 200, "an adapter of the only base stays the default one's"
    assert {one["name"]: one["demand"] for one in (await http.get("/v1/fleet")).json()["bases"]} == {"a": 3, "b": 1}
    await set_bases(bus, base("a"), base("b"), a=1, b=1)
    await add(bus, "own", "b")
    await seen(http, "b", "ready")
    assert (await chat(http, "b")).status_code == 200
    assert "b says the quick fox" in fleet.prompt()
    assert (await chat(http, "own")).status_code == 200
    assert {one["id"] for one in (await http.get("/v1/models")).json()["data"]} == {"a", "b", "old", "own"}
    gone = await http.delete("/v1/bases/b")
    assert (gone.status_code, gone.json()) == (200, {"id": "b", "object": "base.deleted", "deleted": True})
    await seen(http, "b", "absent")

    async def is_gone() -> bool:
        return (await chat(http, "b")).status_code == 404

    await wait_until(is_gone, "its calls are refused")
    refused = (await chat(http, "b")).json()["error"]
    assert (refused["code"], refused["message"]) == ("base_not_served", "the base `b` was removed")
    assert (await chat(http, "b:own")).json()["error"]["code"] == "base_not_served"
    assert (await chat(http, "own")).status_code == 404, "an adapter of it is served by no other base"
    assert (await chat(http, "old")).status_code == 200
    assert (await http.delete("/v1/bases/b")).status_code == 404
    entries = [(one["action"], one["target"], one["outcome"]) for one in (await http.get("/v1/audit")).json()["data"]]
    assert entries[::-1] == [
        ("base.add", "b", "done"), ("base.add", "b", "done"), ("base.remove", "b", "done"),
        ("base.remove", "b", "base_not_found"),
    ]  # fmt: skip
    assert (await http.post("/v1/bases", json={"model": str(folders["b"])})).status_code == 201
    await seen(http, "b", "ready")
    assert (await chat(http, "b")).status_code == 200, "it may come back"


async def test_a_base_that_is_being_read_is_known_already(
    bus: Bus, http: httpx2.AsyncClient, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading may take long because of the Hub; meanwhile, calls of this base and of the next are told to wait."""
    is_reading, go_on = threading.Event(), threading.Event()

    def hang(model: str) -> None:
        is_reading.set()
        assert go_on.wait(60)

    monkeypatch.setattr("gateway.fleet.bases.check_text_files", hang)
    folders["c"] = make_model_folder(folders["b"].parent / "c")
    try:
        await set_bases(bus, base("a"), base("b"), base("c"), a=1, b=1, c=1)
        await add(bus, "own", "b")
        for name in ("b", "c"):
            made = await http.post("/v1/bases", json={"model": str(folders[name])})
            assert (made.status_code, made.json()["state"]) == (201, "loading")
            assert await asyncio.to_thread(is_reading.wait, 60)
        for model in ("b", "own", "b:own", "c"):
            answer = await chat(http, model)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "base_starting"), answer.text
            assert "is still loading in this gateway" in answer.json()["error"]["message"]
        assert (await chat(http, "old")).status_code == 200, "an adapter of the only base stays the default one's"
        assert [one["state"] for one in (await http.get("/v1/bases")).json()["data"]] == ["ready", "loading", "loading"]
        assert (await http.delete("/v1/bases/c")).status_code == 200
        await seen(http, "c", "absent")
        assert (await chat(http, "c")).json()["error"]["message"] == "the base `c` was removed"
    finally:
        go_on.set()
    await seen(http, "b", "ready")
    assert [(await chat(http, model)).status_code for model in ("b", "own", "c")] == [200, 200, 404]


async def test_all_gateways_take_it_up_and_a_restart_keeps_it(
    bus: Bus, http: httpx2.AsyncClient, folders: dict[str, Path]
) -> None:
    async with gateway_client(bus, folders["a"]) as other:
        both = [client.post("/v1/bases", json={"model": str(folders["b"])}) for client in (http, other)]
        assert sorted(one.status_code for one in await asyncio.gather(*both)) == [200, 201]
        for client in (http, other):
            await seen(client, "b", "no_worker")
    async with gateway_client(bus, folders["a"]) as other:
        assert await state_of(other, "b") == "no_worker", "it is there before the gateway listens"
    async with (
        running_gateway(bus, folders["a"], more_models=str(folders["b"])) as fourth,
        fourth.client() as http,
    ):
        assert [one["id"] for one in (await http.get("/v1/bases")).json()["data"]] == ["a", "b"]
        refused = await http.delete("/v1/bases/b")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "base_in_settings")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "a"}, 400, "neither a Hub id"),
        ({"model": "../../etc"}, 400, "neither a Hub id"),
        ({"model": "/models/../etc"}, 400, "neither a Hub id"),
        ({"model": "/models//x"}, 400, "neither a Hub id"),
        ({"model": "s3://bucket/x"}, 400, "neither a Hub id"),
        ({"model": "org/x,org/y"}, 400, "neither a Hub id"),
        ({"model": "org/x\n"}, 400, "neither a Hub id"),
        ({"model": "/models/hub"}, 400, "begins the names of adapters at a source"),
        ({"model": "/models/x", "name": "base"}, 400, "means the default base"),
        ({"model": "/models/x", "name": "b:c"}, 400, "the name of a base is"),
        ({"model": "/models/x", "name": "bäse"}, 400, "the name of a base is"),
        ({"model": "/models/x", "name": "../b"}, 400, "the name of a base is"),
        ({"model": "/models/x", "name": "b\0c"}, 400, "the name of a base is"),
        ({"model": "/models/x y"}, 400, "the name of a base is"),
        ({"model": "/models/x", "name": "n" * 194}, 400, "193"),
        ({"model": "/" + "m" * 1000}, 400, "1000"),
        ({"model": "/tmp/" + "m" * 300}, 400, "the name of a base is"),
        ({"model": ""}, 400, "model"),
        ({}, 400, "model"),
        ({"model": "/models/x", "more": 1}, 400, "more"),
        ({"model": "/elsewhere/a"}, 409, "already"),
        ({"model": "/models/x", "name": "a"}, 409, "already"),
    ],
)
async def test_what_is_no_base_is_refused(
    bus: Bus, http: httpx2.AsyncClient, body: dict[str, Any], status: int, words: str
) -> None:
    answer = await http.post("/v1/bases", json=body)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]
    assert len(answer.content) < 1_000
    assert await bus.added_bases.get() == m.AddedBases()


async def test_a_base_has_one_name_one_model_and_there_is_a_bound(
    bus: Bus, http: httpx2.AsyncClient, folders: dict[str, Path]
) -> None:
    assert (await http.post("/v1/bases", json={"model": "/models/x"})).status_code == 201
    for body, words in (
        ({"model": "/models/y", "name": "x"}, "was added with the model /models/x"),
        ({"model": "/models/x", "name": "z"}, "name each base model once"),
        ({"model": str(folders["a"]), "name": "z"}, "already"),
    ):
        answer = await http.post("/v1/bases", json=body)
        assert (answer.status_code, words in answer.text) == (409, True), answer.text
    for number in range(30):
        await bus.added_bases.add(f"n{number}", f"/models/n{number}", 31)
    full = await http.post("/v1/bases", json={"model": "/models/last"})
    assert (full.status_code, full.json()["error"]["code"]) == (409, "too_many_bases")


async def test_a_fleet_whose_only_base_has_other_names_gets_no_second_one(
    bus: Bus, http: httpx2.AsyncClient, folders: dict[str, Path]
) -> None:
    """A fleet with a single base ignores names; with a second base, the first would be unknown here."""
    await set_bases(bus, base("otherwise"), otherwise=1)
    answer = await http.post("/v1/bases", json={"model": str(folders["b"])})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "base_named_otherwise")


async def test_only_admins_with_keys_or_this_machine_change_bases(
    bus: Bus, fleet: ScriptedFleet, folders: dict[str, Path], subtests: pytest.Subtests
) -> None:
    await set_bases(bus, base("a"), a=1)
    body = {"model": str(folders["b"])}
    async with gateway_client(bus, folders["a"], api_keys=True) as http:
        keys = {
            scope: (await bus.api_keys.create("acme", [scope], 0, ""))[0] for scope in ("infer", "adapters", "admin")
        }
        for scope, status in ((None, 401), ("infer", 403), ("adapters", 403), ("admin", 201)):
            with subtests.test(scope=scope):
                headers = {"authorization": f"Bearer {keys[scope]}"} if scope else {}
                assert (await http.post("/v1/bases", json=body, headers=headers)).status_code == status
                for method in ("GET", "DELETE"):
                    path = "/v1/bases" + ("/b" if method == "DELETE" else "")
                    answer = await http.request(method, path, headers=headers)
                    assert answer.status_code == (200 if scope == "admin" else status)
    async with (
        running_gateway(bus, folders["a"], host="0.0.0.0", allowed_hosts="*") as gateway,
        httpx2.AsyncClient(base_url=gateway.url.replace("0.0.0.0", "127.0.0.1"), timeout=60) as http,
    ):
        for method, path in (("POST", "/v1/bases"), ("DELETE", "/v1/bases/b")):
            answer = await http.request(method, path, json=body if method == "POST" else None)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "bases_need_keys")

"""One tenant attacks the history of another: no call, id or flood exposes or removes what belongs to someone else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest_asyncio
from helpers.scripted_fleet import gateway_client, make_model_folder, playing
from helpers.waiting import wait_until

from protocol.queue.books.api_keys import ApiKeys
from protocol.queue.bus import Bus

SECRET = "the lazy dog sleeps"
BODY = {"model": "base", "prompt": SECRET, "max_tokens": 12, "ignore_eos": True}

Heads = dict[str, dict[str, str]]


@pytest_asyncio.fixture
async def http(bus: Bus, tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a gateway with keys that stores prompts and outputs in a database."""
    folder = make_model_folder(tmp_path / "model")
    settings: dict[str, Any] = {"history": f"sqlite:///{tmp_path}/history.db", "history_text": 100, "api_keys": True}
    async with playing(bus.url, folder), gateway_client(bus, folder, **settings) as client:
        yield client


@pytest_asyncio.fixture
async def heads(bus: Bus) -> Heads:
    keys = ApiKeys(bus._redis, bus.keys)
    scopes = {"victim": ["infer"], "thief": ["infer"], "ops": ["admin"]}
    return {name: {"authorization": f"Bearer {(await keys.create(name, scopes[name]))[0]}"} for name in scopes}


async def listed(http: httpx2.AsyncClient, head: dict[str, str], num: int, **query: Any) -> list[dict[str, Any]]:
    """Return the ended requests visible to a key, once there are `num`."""
    found: list[dict[str, Any]] = []

    async def are_there() -> bool:
        answer = await http.get("/v1/requests", params={"state": "ended", **query}, headers=head)
        found[:] = answer.json()["data"] if answer.status_code == 200 else []
        return answer.status_code == 200 and len(found) >= num

    await wait_until(are_there, f"{num} are in the history")
    return found


async def text_of(http: httpx2.AsyncClient, name: str, head: dict[str, str]) -> dict[str, Any]:
    found: list[dict[str, Any]] = []

    async def is_there() -> bool:
        found[:] = [(await http.get(f"/v1/requests/{name}", headers=head)).json()["text"]]
        return found[0] is not None and found[0]["problem"] is None

    await wait_until(is_there, f"there is a text of {name}")
    return found[0]


async def test_a_call_that_is_refused_under_anothers_id_shows_nothing(
    bus: Bus, http: httpx2.AsyncClient, heads: Heads
) -> None:
    """A refused call is in the history under the id that its client sent, for example of another tenant's request."""
    done = (await http.post("/v1/completions", json=BODY, headers=heads["victim"])).json()
    [mine] = await listed(http, heads["victim"], 1)
    kept = await text_of(http, mine["id"], heads["victim"])
    assert kept["prompt"] == SECRET
    names = (mine["id"], done["id"], mine["id"].removesuffix("-0"))
    for name in names:
        refused = await http.post(
            "/v1/completions", json={**BODY, "model": "nobody"}, headers={**heads["thief"], "x-request-id": name}
        )
        assert refused.status_code == 404
    assert {one["state"] for one in await listed(http, heads["thief"], len(names))} == {"refused"}
    for is_gone in (False, True):
        if is_gone:  # as after two minutes
            await bus._redis.delete(bus.keys.req(mine["id"]))
        for name in names:
            shown = await http.get(f"/v1/requests/{name}", headers=heads["thief"])
            if shown.status_code == 200:
                assert (shown.json()["tenant"], shown.json()["text"]) == ("thief", None)
            else:
                assert shown.status_code == 404
            assert SECRET not in shown.text
            assert kept["output"] not in shown.text
        for head in (heads["victim"], heads["ops"]):  # nor does it hide the request from those who may see it
            shown = (await http.get(f"/v1/requests/{mine['id']}", headers=head)).json()
            assert (shown["tenant"], shown["state"], shown["text"]) == ("victim", "completed", kept)


async def test_ones_own_refused_call_hides_no_request(bus: Bus, http: httpx2.AsyncClient, heads: Heads) -> None:
    await http.post("/v1/completions", json=BODY, headers=heads["victim"])
    [mine] = await listed(http, heads["victim"], 1)
    kept = await text_of(http, mine["id"], heads["victim"])
    head = {**heads["victim"], "x-request-id": mine["id"]}
    await http.post("/v1/completions", json={**BODY, "model": "nobody"}, headers=head)
    await listed(http, heads["victim"], 2)
    await bus._redis.delete(bus.keys.req(mine["id"]))
    shown = (await http.get(f"/v1/requests/{mine['id']}", headers=heads["victim"])).json()
    assert (shown["state"], shown["text"]) == ("completed", kept)


async def test_nobody_reads_or_deletes_anothers_text_by_its_id(
    bus: Bus, http: httpx2.AsyncClient, heads: Heads
) -> None:
    job = (await http.post("/v1/completions", json={**BODY, "background": True}, headers=heads["victim"])).json()
    await http.get(f"/v1/jobs/{job['id']}", headers={**heads["victim"], "prefer": "wait=30"})
    [mine] = await listed(http, heads["victim"], 1)
    kept = await text_of(http, mine["id"], heads["victim"])
    for path in (f"/v1/requests/{mine['id']}", f"/v1/jobs/{job['id']}", f"/v1/requests/{job['id']}"):
        for method in ("GET", "DELETE"):
            answer = await http.request(method, path, headers=heads["thief"])
            assert answer.status_code in (404, 405), (method, path)
            assert SECRET not in answer.text
    for query in ({"tenant": "victim"}, {"q": mine["id"]}, {"q": "sleeps"}, {"model": "base"}):
        answer = await http.get("/v1/requests", params=query, headers=heads["thief"])
        assert SECRET not in answer.text
        assert mine["id"] not in answer.text
    assert await text_of(http, mine["id"], heads["victim"]) == kept
    assert not await bus._redis.exists(bus.keys.history_deleted)


async def test_a_list_of_one_tenant_goes_on_at_anothers_place_and_shows_its_own(
    http: httpx2.AsyncClient, heads: Heads
) -> None:
    for name in ("victim", "thief"):
        for _ in range(2):
            await http.post("/v1/completions", json=BODY, headers=heads[name])
        await listed(http, heads[name], 2)
    page = (await http.get("/v1/requests", params={"limit": 1, "state": "ended"}, headers=heads["victim"])).json()
    found = await http.get("/v1/requests", params={"after": page["last_id"]}, headers=heads["thief"])
    assert found.status_code == 200
    assert {one["tenant"] for one in found.json()["data"]} <= {"thief"}


async def test_odd_values_are_answered_and_break_nothing(http: httpx2.AsyncClient, heads: Heads) -> None:
    await http.post("/v1/completions", json=BODY, headers=heads["victim"])
    await listed(http, heads["victim"], 1)
    big = "9" * 18
    for query in (
        {"tenant": "\0"}, {"tenant": "'; DROP TABLE requests; --"}, {"q": "\0%_'"}, {"model": "\ud7ff\0"},
        {"after": f"ended:{big}-{big}/{'f' * 12}"}, {"after": "ended:"}, {"until": 1}, {"since": 1 << 45},
    ):  # fmt: skip
        for head in heads.values():
            answer = await http.get("/v1/requests", params=query, headers=head)
            assert answer.status_code in (200, 403), (query, answer.text)
    for name in ("%00", "'%20OR%201=1", "..%2f", "x" * 500, "%ff%fe"):
        for head in heads.values():
            answer = await http.get(f"/v1/requests/{name}", headers=head)
            assert answer.status_code in (400, 404), name
            assert SECRET not in answer.text
    assert len(await listed(http, heads["ops"], 1)) == 1

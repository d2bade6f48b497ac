"""The history of ended and refused requests: visibility, search and limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest_asyncio
from helpers.scripted_fleet import Script, ScriptedFleet, gateway_client
from helpers.waiting import wait_until

from gateway.http.errors import Outcome
from gateway.requests.refusals import MAX_OF_TENANT, Refusals
from protocol.queue.books.api_keys import ApiKeys
from protocol.queue.bus import Bus
from protocol.queue.history import MAX_REFUSALS
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, Internal

BODY = {"model": "base", "prompt": "the dog", "max_tokens": 12}


@pytest_asyncio.fixture
async def http(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> AsyncIterator[httpx2.AsyncClient]:
    async with gateway_client(bus, model_folder, history_requests=100) as client:
        yield client


async def listed(http: httpx2.AsyncClient, code: int = 200, head: dict[str, str] | None = None, **query: Any) -> Any:
    answer = await http.get("/v1/requests", params=query, headers=head)
    assert answer.status_code == code, answer.text
    return answer.json()["data"] if code == 200 else answer.json()["error"]


async def has_num(http: httpx2.AsyncClient, num: int, **query: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    async def are_there() -> bool:
        found[:] = await listed(http, **query)
        return len(found) == num

    await wait_until(are_there, f"{num} are in the history")
    return found


async def test_what_ended_is_kept_with_its_worker_and_outlives_its_record(
    bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient
) -> None:
    await fleet.add_adapter("pirate", "d7")
    done = (await http.post("/v1/completions", json={**BODY, "model": "pirate"})).json()
    (one,) = await has_num(http, 1, state="ended")
    assert (one["tenant"], one["state"], one["model"]) == ("public", "completed", "pirate")
    assert one["adapter"] == {"digest": "d7", "name": "pirate"}
    assert 0 < one["submitted_ms"] <= one["first_ms"] <= one["ended_ms"]
    assert one["output_tokens"] == done["usage"]["completion_tokens"]
    full = (await http.get(f"/v1/requests/{done['id']}")).json()
    assert full["tenant"] == "public"
    await bus._redis.delete(bus.keys.req(one["id"]))  # as after two minutes
    short = (await http.get(f"/v1/requests/{done['id']}")).json()
    assert [event["event"] for event in short["timeline"]] == ["accepted", "first_token", "ended"]
    assert {name: short[name] for name in ("id", "state", "finish", "base")} == {
        name: full[name] for name in ("id", "state", "finish", "base")
    }
    gone = (await http.get("/v1/requests/cmpl-nobody")).json()["error"]
    assert gone["code"] == "request_not_found"
    assert "24 h" in gone["message"]


async def test_failures_and_refusals_are_listed_with_their_reasons(
    fleet: ScriptedFleet, http: httpx2.AsyncClient
) -> None:
    fleet.script = lambda submit, body: Script(error=Internal("the engine stumbled"))
    assert (await http.post("/v1/completions", json=BODY)).status_code == 500
    refused = await http.post("/v1/completions", json={**BODY, "model": "nobody"})
    wrong = await http.post("/v1/completions", json={**BODY, "max_tokens": "many"})
    assert (refused.status_code, wrong.status_code) == (404, 400)
    found = await has_num(http, 3)
    by_status = {one["status"]: one for one in found}
    assert by_status[None]["state"] == "failed"
    assert by_status[None]["error"]["message"] == "the engine stumbled"
    assert by_status[404]["error"]["code"] == "model_not_found"
    assert by_status[404]["model"] == "nobody"
    assert by_status[400]["id"] == wrong.headers["x-request-id"]
    assert by_status[400]["endpoint"] == "/v1/completions"
    told = (await http.get(f"/v1/requests/{by_status[400]['id']}")).json()
    assert [event["event"] for event in told["timeline"]] == ["refused"]


async def test_a_list_is_filtered_and_read_page_by_page(fleet: ScriptedFleet, http: httpx2.AsyncClient) -> None:
    await fleet.add_adapter("pirate", "d7")
    for model in ("base", "pirate", "nobody", "pirate", "base"):
        await http.post("/v1/completions", json={**BODY, "model": model})
    found = await has_num(http, 5)
    ends = [one["ended_ms"] for one in found if one["state"] == "completed"]
    assert ends == sorted(ends, reverse=True)
    queries: tuple[tuple[dict[str, Any], list[str]], ...] = (
        ({"status": "refused"}, ["nobody"]),
        ({"status": "completed", "model": "pirate"}, ["pirate", "pirate"]),
        ({"q": "NOBOD"}, ["nobody"]),
        ({"q": found[-1]["call"]}, ["tiny/base"]),
        ({"since": ends[1]}, [one["model"] for one in found if one["ended_ms"] >= ends[1]]),
        ({"until": ends[1]}, [one["model"] for one in found if one["ended_ms"] < ends[1]]),
        ({"until": ends[-1]}, []),
        ({"status": "cancelled"}, []),
    )
    for query, wanted in queries:
        assert [one["model"] for one in await listed(http, **query)] == wanted, query
    pages, after = [], ""
    while True:
        page = (await http.get("/v1/requests", params={"limit": 2, "after": after, "state": "ended"})).json()
        pages += page["data"]
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert [one["id"] for one in pages] == [one["id"] for one in found]
    wrong: tuple[dict[str, Any], ...] = ({"since": -1}, {"status": "odd"}, {"q": "x" * 101}, {"until": 1 << 60})
    for query in wrong:
        await listed(http, 400, **query)


async def test_a_tenant_sees_its_own_and_cannot_shorten_anothers(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    keys = ApiKeys(bus._redis, bus.keys)
    heads = {
        tenant: {"authorization": f"Bearer {(await keys.create(tenant, scopes))[0]}"}
        for tenant, scopes in {"mine": ["infer"], "other": ["infer"], "ops": ["admin"]}.items()
    }
    async with gateway_client(bus, model_folder, api_keys=True, history_requests=100) as http:
        done = (await http.post("/v1/completions", json=BODY, headers=heads["mine"])).json()
        for head in ({}, {"authorization": "Bearer sk-lf-nonsense"}):
            assert (await http.post("/v1/completions", json=BODY, headers=head)).status_code == 401
        await asyncio.gather(
            *(http.post("/v1/completions", json={**BODY, "n": 20}, headers=heads["other"]) for _ in range(20))
        )
        (one,) = await listed(http, head=heads["mine"])
        assert one["tenant"] == "mine"
        assert {one["tenant"] for one in await listed(http, head=heads["ops"], limit=100)} <= {"mine", "other"}
        assert [one["tenant"] for one in await listed(http, head=heads["ops"], tenant="mine")] == ["mine"]
        await listed(http, 403, head=heads["other"], tenant="mine")
        await bus._redis.delete(bus.keys.req(one["id"]))
        seen = {
            tenant: (await http.get(f"/v1/requests/{done['id']}", headers=head)).status_code
            for tenant, head in heads.items()
        }
        assert seen == {"mine": 200, "other": 404, "ops": 200}
    assert 100 <= await bus._redis.xlen(bus.keys.history("other")) < 400  # 400 have ended; whole nodes are trimmed
    assert 0 < await bus._redis.pttl(bus.keys.history("mine")) <= 86_400_000


async def test_refusals_are_bounded_in_the_gateway_and_in_the_queue(bus: Bus) -> None:
    refusals = Refusals(bus, keep_s=60)
    outcome = Outcome(error=BadRequest("x" * 5000), model="m" * 5000)
    for _ in range(2 + MAX_REFUSALS // MAX_OF_TENANT):
        for _ in range(3 * MAX_OF_TENANT):
            refusals.note("acme", "req_1", "/v1/completions", 400, outcome)
        await refusals.flush()
    key = bus.keys.refusals("acme")
    assert await bus._redis.xlen(key) == MAX_REFUSALS
    (_, fields), *_ = await bus._redis.xrange(key, count=1)
    assert len(fields[b"b"]) < 1000
    assert 0 < await bus._redis.pttl(key) <= 60_000


async def test_an_entry_of_another_release_is_passed_over(bus: Bus, fleet: ScriptedFleet, http: Any) -> None:
    await http.post("/v1/completions", json=BODY)
    await has_num(http, 1, state="ended")
    await bus._redis.xadd(bus.keys.history("public"), {"b": m.encode({"not": "an entry"})})
    assert len(await listed(http)) == 1

"""Operators' actions over HTTP: draining workers, listing and cancelling requests, dead letters, keys."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest_asyncio
from helpers.script_queue import make_body, make_submit
from helpers.scripted_fleet import RunningGateway, Script, ScriptedFleet, gateway_client
from helpers.small_fleet import SmallFleet, small_fleet
from helpers.waiting import wait_until

from gateway.auth.callers import Caller
from gateway.requests.listing import MAX_LOOKED_AT, Filters, RequestList
from protocol.queue.books.api_keys import Tenant
from protocol.queue.bus import Bus, now_ms
from protocol.wire import messages as m
from protocol.wire.errors import WorkerLost

BODY = {"model": "base", "prompt": "the dog", "max_tokens": 12, "ignore_eos": True, "temperature": 0}


@pytest_asyncio.fixture
async def small(bus: Bus, model_folder: Path) -> AsyncIterator[SmallFleet]:
    async with small_fleet(bus, model_folder, "one", "two") as fleet:
        yield fleet


async def got(http: httpx2.AsyncClient, path: str, status: int = 200, **headers: str) -> Any:
    answer = await http.get(path, headers=headers)
    assert answer.status_code == status, answer.text
    return answer.json()


async def posted(http: httpx2.AsyncClient, path: str, status: int = 200, json: Any = None, **headers: str) -> Any:
    answer = await http.post(path, json=json, headers=headers)
    assert answer.status_code == status, answer.text
    return answer.json()


async def key_of(bus: Bus, tenant: str, *scopes: str) -> str:
    secret, _ = await bus.api_keys.create(tenant, scopes)
    return f"Bearer {secret}"


# ---------------------------------------------------------------- workers


async def test_a_drained_worker_gets_nothing_until_it_is_resumed(small: SmallFleet) -> None:
    listed = await got(small.http, "/v1/workers")
    assert [(one["name"], one["state"]) for one in listed["data"]] == [("one", "ready"), ("two", "ready")]
    assert not listed["has_more"]
    drained = await posted(small.http, "/v1/workers/one/drain?wait_s=30")
    assert (drained["state"], drained["capacity"]) == ("draining", 0)
    assert (await posted(small.http, "/v1/workers/one/drain"))["state"] == "draining"  # repeated without effect
    placed: list[str] = []

    async def gets_nothing() -> bool:  # once the scheduler has read the worker's heartbeat
        done = await posted(small.http, "/v1/completions", json=BODY)
        told = await got(small.http, f"/v1/requests/{done['id']}")
        placed.append(next(event["worker"] for event in told["timeline"] if event["event"] == "placed"))
        return placed[-8:] == ["two"] * 8

    await wait_until(gets_nothing, "all requests go to the other worker")
    assert (await posted(small.http, "/v1/workers/one/resume?wait_s=30"))["state"] == "ready"
    assert (await posted(small.http, "/v1/workers/nobody/drain", 404))["error"]["code"] == "worker_not_found"


async def test_what_a_draining_worker_has_ends_there(small: SmallFleet) -> None:
    for engine, _ in small.workers.values():
        engine.steps.clear()
    asking = asyncio.create_task(posted(small.http, "/v1/completions", json=BODY))

    async def who_has_it() -> str | None:
        listed = await got(small.http, "/v1/requests?state=running")
        return listed["data"][0]["worker"] if listed["data"] else None

    name = await wait_until(who_has_it, "the request runs")
    await posted(small.http, f"/v1/workers/{name}/drain?wait_s=30")
    for engine, _ in small.workers.values():
        engine.steps.set()
    done = await asking
    told = await got(small.http, f"/v1/requests/{done['id']}")
    assert (told["state"], told["attempts"]) == ("completed", 0)
    fleet = await got(small.http, "/v1/fleet")
    assert fleet["workers"] == 2
    assert fleet["queue"]["dead_letters"] == 0


async def test_workers_come_in_pages_and_a_silent_one_is_lost(bus: Bus, gateway: RunningGateway) -> None:
    await bus.members.beat(bus.keys.worker_beat("gone"), bus.keys.workers, "gone", b"", 1)
    async with gateway.client() as http:
        first = await got(http, "/v1/workers?limit=1")
        assert [one["id"] for one in first["data"]] == ["w1"]
        second = await got(http, f"/v1/workers?limit=1&after={first['last_id']}")
        assert [(one["id"], one["state"]) for one in second["data"]] == [("gone", "lost")]
        await got(http, "/v1/workers?after=nobody", 404)


# ---------------------------------------------------------------- requests


async def test_all_requests_are_listed_once_over_pages(fleet: ScriptedFleet, http: httpx2.AsyncClient) -> None:
    fleet.assigning.clear()
    asking = [asyncio.create_task(posted(http, "/v1/completions", json={**BODY, "n": 5})) for _ in range(5)]

    async def listed(query: str) -> list[dict[str, Any]]:
        found, after = [], ""
        while True:
            page = await got(http, f"/v1/requests?limit=7&after={after}{query}")
            found += page["data"]
            assert len(page["data"]) <= 7
            if not page["has_more"]:
                return found
            after = page["last_id"]

    async def all_wait() -> bool:
        return len(await listed("&state=queued")) == 25

    await wait_until(all_wait, "the requests wait")
    waiting = await listed("")
    assert len({one["id"] for one in waiting}) == len(waiting) == 25
    assert {one["state"] for one in waiting} == {"queued"}
    assert waiting[0]["prompt_tokens"] == 2
    assert waiting[0]["submitted_ms"] <= waiting[-1]["submitted_ms"]
    fleet.assigning.set()
    await asyncio.gather(*asking)
    for after in ("nonsense", "queued:nonsense", "ended:1-1", "running:" + "x" * 150):
        assert (await got(http, f"/v1/requests?after={after}", 400))["error"]["param"] == "after"
    assert (await got(http, "/v1/requests?state=ended&after=queued:interactive/1-1", 400))["error"]["param"] == "after"


async def test_a_page_does_not_tell_where_it_ended_among_others(bus: Bus) -> None:
    """A page that reaches its work limit ends among other tenants' requests; its cursor reveals none of their ids."""
    rids = [f"{number:032x}-0" for number in range(2 * MAX_LOOKED_AT + 10)]
    beat = m.WorkerBeat(wid="w1", name="w1", capacity=64, progress=[(rid, 1) for rid in rids])
    await bus.members.beat(bus.keys.worker_beat("w1"), bus.keys.workers, "w1", m.encode(beat), 3_600_000)
    own = rids[77]
    record = {"state": "running", "tenant": "acme", "cls": "interactive", "epoch": 1, "n_prompt": 1}
    await bus._redis.hset(bus.keys.req(own), mapping=record)
    await bus._redis.expire(bus.keys.req(own), 60)
    listed, caller, after, found, places = RequestList(bus), Caller(Tenant("acme"), ("infer",)), "", [], []
    while True:
        page = await listed.page(caller, Filters(state="running"), 100, after)
        found += [one["id"] for one in page["data"]]
        if not page["has_more"]:
            break
        places.append(after := page["last_id"])
    assert (found, len(places)) == ([own], 2)
    assert not [rid for rid in rids for place in places if rid in place or rid.partition("-")[0] in place]


async def test_ended_requests_are_listed_the_latest_first(small: SmallFleet) -> None:
    done = [await posted(small.http, "/v1/completions", json=BODY) for _ in range(3)]
    wanted = [f"{one['id'].removeprefix('cmpl-')}-0" for one in done]
    found: list[dict[str, Any]] = []

    async def are_told() -> bool:
        found[:] = (await got(small.http, "/v1/requests?state=ended"))["data"]
        return len(found) == 3

    await wait_until(are_told, "the ends are told")
    assert [one["id"] for one in found] == wanted[::-1]
    assert {(one["state"], one["output_tokens"], one["adapter"]) for one in found} == {("completed", 12, None)}
    assert {one["worker"] for one in found} <= {"one", "two"}
    page = await got(small.http, "/v1/requests?state=ended&limit=1")
    rest = await got(small.http, f"/v1/requests?state=ended&after={page['last_id']}")
    assert [one["id"] for one in page["data"] + rest["data"]] == wanted[::-1]


async def test_a_call_is_cancelled_whole_or_by_one_choice(small: SmallFleet) -> None:
    for engine, _ in small.workers.values():
        engine.steps.clear()
    asking = asyncio.create_task(posted(small.http, "/v1/completions", json={**BODY, "n": 3}))
    rids: list[str] = []

    async def run() -> bool:
        rids[:] = sorted(one["id"] for one in (await got(small.http, "/v1/requests?state=running"))["data"])
        return len(rids) == 3

    await wait_until(run, "the choices run")
    one = await posted(small.http, f"/v1/requests/{rids[1]}/cancel")
    assert [request["id"] for request in one["requests"]] == [rids[1]]
    whole = await posted(small.http, f"/v1/requests/cmpl-{rids[0].removesuffix('-0')}/cancel")
    assert [request["id"] for request in whole["requests"]] == rids
    for engine, _ in small.workers.values():
        engine.steps.set()
    await asyncio.gather(asking, return_exceptions=True)
    assert {(await got(small.http, f"/v1/requests/{rid}"))["state"] for rid in rids} == {"cancelled"}
    assert (await posted(small.http, "/v1/requests/nobody/cancel", 404))["error"]["code"] == "request_not_found"


# ---------------------------------------------------------------- dead letters


async def given_up(bus: Bus, rid: str) -> str:
    sub = make_submit(rid)
    await bus.submit("batch", [(sub, make_body())], max_queued=10)
    letter = m.DeadLetter(reason="poison", submit=sub, ms=now_ms(), deaths=[m.Death("w1", "one", 5000, 2000, 3, 1)])
    assert await bus.finish(rid, "failed", "error", WorkerLost("poison"), dead_letter=letter)
    return (await bus.streams.last_id(bus.keys.dlq)).decode()


async def test_dead_letters_are_listed_and_queued_again(
    bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient
) -> None:
    fleet.assigning.clear()
    ids = [await given_up(bus, rid) for rid in ("a", "b", "c")]
    await bus._redis.xadd(bus.keys.dlq, {"b": m.encode(m.DeadLetter(reason="unreadable", stream="s", raw=b"<\0"))})
    first = await got(http, "/v1/dead_letters?limit=2")
    assert [one["reason"] for one in first["data"]] == ["unreadable", "poison"]
    assert (first["data"][0]["raw"], first["data"][0]["request"]) == (r"b'<\x00'", None)
    rest = await got(http, f"/v1/dead_letters?limit=2&after={first['last_id']}")
    assert [one["id"] for one in rest["data"]] == ids[1::-1]
    assert not rest["has_more"]
    (death,) = rest["data"][0]["deaths"]
    assert (death["worker"], death["after_ms"], death["phase"]) == ("one", 3000, "decode")
    retried = await posted(http, f"/v1/dead_letters/{ids[0]}/retry")
    assert retried["request"] == "a"
    assert (await bus.requests(["a"]))[0].state == "queued"  # type: ignore[union-attr]
    await posted(http, f"/v1/dead_letters/{ids[0]}/retry", 404)
    await got(http, "/v1/dead_letters/nonsense", 400)
    assert (await got(http, f"/v1/dead_letters/{ids[1]}"))["request"]["id"] == "b"


# ---------------------------------------------------------------- keys and tenants


async def test_without_keys_there_are_none_to_administer(http: httpx2.AsyncClient) -> None:
    assert (await got(http, "/v1/keys", 409))["error"]["code"] == "api_keys_off"
    assert (await got(http, "/v1/tenants", 409))["error"]["code"] == "api_keys_off"


async def test_all_of_it_is_an_operator_s(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    tenant, other = await key_of(bus, "acme", "infer", "adapters"), await key_of(bus, "other", "infer")
    admin = await key_of(bus, "ops", "admin")
    letter = await given_up(bus, "a")
    fleet.script = lambda submit, body: Script(hold_after=1)
    async with gateway_client(bus, model_folder, api_keys=True) as http:
        for path in ("/v1/workers", "/v1/dead_letters", f"/v1/dead_letters/{letter}", "/v1/keys", "/v1/tenants"):
            assert (await got(http, path, 403, authorization=tenant))["error"]["code"] == "insufficient_scope"
            await got(http, path, 401)
            await got(http, path, authorization=admin)
        for path in ("/v1/workers/w1/drain", f"/v1/dead_letters/{letter}/retry", "/v1/tenants/acme", "/v1/keys"):
            refused = await posted(http, path, 403, {"tenant": "acme"}, authorization=tenant)
            assert refused["error"]["code"] == "insufficient_scope"
        asking = asyncio.create_task(posted(http, "/v1/completions", json=BODY, authorization=tenant))

        async def is_seen() -> bool:
            listed = await got(http, "/v1/requests?state=queued", authorization=admin)
            return any(one["tenant"] == "acme" for one in listed["data"]) or bool(fleet.seen)

        await wait_until(is_seen, "the request is there")
        await fleet.beat()
        rid = fleet.seen[-1][0].rid if fleet.seen else ""
        assert (await got(http, "/v1/requests", authorization=other))["data"] == []
        await posted(http, f"/v1/requests/{rid}/cancel", 404, authorization=other)
        await got(http, "/v1/requests?tenant=acme", 403, authorization=other)
        fleet.go.set()
        await asking


async def test_keys_are_made_limited_and_revoked(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    admin = await key_of(bus, "ops", "admin")
    async with gateway_client(bus, model_folder, api_keys=True, console_keys=True) as http:
        wanted = {"tenant": "acme", "scopes": ["infer", "adapters"], "expires_in_s": 3600, "note": "<b>"}
        made = await posted(http, "/v1/keys", 201, wanted, authorization=admin)
        theirs = f"Bearer {made['secret']}"
        assert (await posted(http, "/v1/completions", json=BODY, authorization=theirs))["object"] == "text_completion"
        listed = await got(http, "/v1/keys?tenant=acme", authorization=admin)
        assert [(key["id"], key["note"], "secret" in key) for key in listed["data"]] == [(made["id"], "<b>", False)]
        assert listed["writable"]
        changed = await posted(
            http, "/v1/tenants/acme", 200, {"requests_per_minute": 1, "adapters": ["a-*"]}, authorization=admin
        )
        assert (changed["requests_per_minute"], changed["adapters"], changed["weight"]) == (1, ["a-*"], 1.0)
        changed = await posted(http, "/v1/tenants/acme", 200, {"weight": 2}, authorization=admin)
        assert (changed["requests_per_minute"], changed["weight"]) == (1, 2.0)
        assert [one["id"] for one in (await got(http, "/v1/tenants", authorization=admin))["data"]] == ["acme", "ops"]
        refused = await posted(http, "/v1/keys", 403, {"tenant": "ops", "scopes": ["admin"]}, authorization=admin)
        assert refused["error"]["code"] == "admin_keys_by_command"
        for wrong in ({"tenant": "public"}, {"tenant": "a b"}, {"tenant": "a", "scopes": ["root"]}, {"scopes": []}):
            await posted(http, "/v1/keys", 400, wrong, authorization=admin)
        gone = await http.delete(f"/v1/keys/{made['id']}", headers={"authorization": admin})
        assert gone.json() == {"id": made["id"], "object": "api_key", "deleted": True}
        await got(http, "/v1/models", 401, authorization=theirs)


async def test_keys_are_the_command_s_unless_the_setting_says_so(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    admin = await key_of(bus, "ops", "admin")
    async with gateway_client(bus, model_folder, api_keys=True) as http:
        assert not (await got(http, "/v1/keys", authorization=admin))["writable"]
        for path, body in (("/v1/keys", {"tenant": "acme"}), ("/v1/tenants/acme", {"weight": 2})):
            refused = await posted(http, path, 403, body, authorization=admin)
            assert refused["error"]["code"] == "keys_by_command"
        gone = await http.delete("/v1/keys/key_1", headers={"authorization": admin})
        assert gone.status_code == 403

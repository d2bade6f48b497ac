"""Adapters named by their source: a real gateway and store with a Hub stub and a scripted worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
import pytest_asyncio
from helpers.adapter_files import BASE, adapter_bytes
from helpers.hub_stub import HubStub, Repo, run_hub
from helpers.reported import report
from helpers.scripted_fleet import BASE_NAME, Script, ScriptedFleet, gateway_client
from helpers.waiting import wait_until

from adapter_store.service import serve
from adapter_store.sources.retry import Retries
from adapter_store.timings import StoreTimings
from gateway.service import GatewayTimings
from peft_adapters.format import WEIGHTS_FILE
from protocol.queue.books.api_keys import Tenant
from protocol.queue.bus import Bus, now_ms
from protocol.runtime.backoff import Backoff
from protocol.runtime.fleet_secret import FleetSecret, owner_of
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.keys import private_name
from protocol.wire.records import AdapterUse

SECRET = "a secret of the tests"
# A confirmation of a right that is as old as this is not believed any more, however soon the next request comes.
NOT_EVEN_A_MS = 0.0001  # seconds


@pytest_asyncio.fixture
async def hub(bus: Bus, fleet: ScriptedFleet, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HubStub]:
    """A Hub with a valid adapter, and a fleet whose base model fits it."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (base,), _ = await bus.members.bases()
    await report(bus, msgspec.structs.replace(base, sites=BASE.sites))
    async with run_hub() as stub:
        stub.repos["org/a"] = Repo()
        stub.repos["org/a"].commit(adapter_bytes())
        yield stub


@asynccontextmanager
async def running(
    bus: Bus, hub: HubStub, model: Path, data: Path, timings: StoreTimings | None = None, **changes: Any
) -> AsyncIterator[httpx2.AsyncClient]:
    """Yield a client of a gateway that runs along with a store with the same settings."""
    timings = timings or StoreTimings(retries=Retries(max_tries=1))
    settings = {"hub_endpoint": hub.url, "request_sources": "hub", "secret": SECRET, **changes}
    stop = asyncio.Event()
    mine = Settings(redis_url=bus.url, data=data, scan_interval_s=0.05, **settings)
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(mine, stop, timings))
        try:
            async with gateway_client(bus, model, **settings) as http:
                yield http
        finally:
            stop.set()


@pytest.fixture
def timings() -> StoreTimings:
    """The timings of the store behind `http`, which tests may change."""
    return StoreTimings(retries=Retries(max_tries=1))


@pytest_asyncio.fixture
async def http(
    bus: Bus, hub: HubStub, model_folder: Path, tmp_path: Path, timings: StoreTimings
) -> AsyncIterator[httpx2.AsyncClient]:
    async with running(bus, hub, model_folder, tmp_path, timings) as client:
        yield client


async def ask(http: httpx2.AsyncClient, model: str, token: str = "", **more: Any) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return await http.post(
        "/v1/completions", json={"model": model, "prompt": "fox", "max_tokens": 64, **more}, headers=headers
    )


async def test_a_request_brings_an_adapter_from_the_hub(
    hub: HubStub, fleet: ScriptedFleet, http: httpx2.AsyncClient
) -> None:
    """By its id, a branch, a commit, or with the base as prefix: all mean the same content, downloaded once."""
    commit = hub.repos["org/a"].refs["main"]
    for name in ("org/a", "org/a@main", f"org/a@{commit}", "hub:org/a", f"{BASE_NAME}:org/a"):
        answer = await ask(http, name)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == Script().text
    assert len({submit.digest for submit, _ in fleet.seen} - {""}) == 1
    assert len(hub.requests(WEIGHTS_FILE)) == 1


async def test_by_default_only_what_is_registered(bus: Bus, hub: HubStub, model_folder: Path, tmp_path: Path) -> None:
    async with running(bus, hub, model_folder, tmp_path, request_sources="") as http:
        for name in ("org/a", "s3://bucket/a"):
            answer = await ask(http, name)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
            assert "register it first" in answer.json()["error"]["message"]
    assert hub.seen == []
    assert await bus.adapters.registrations() == {}


async def test_policy_is_kept(bus: Bus, hub: HubStub, model_folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"request_sources": "hub,s3", "hub_orgs": "acme", "s3_buckets": "ours"}
    async with running(bus, hub, model_folder, tmp_path, **settings) as http:
        for name, part in (("org/a", "organisation org"), ("s3://theirs/a", "bucket theirs")):
            answer = await ask(http, name)
            assert answer.status_code == 403
            assert part in answer.json()["error"]["message"]
    assert hub.seen == []


@pytest.mark.parametrize(
    ("name", "status", "part"),
    [("org/none", 404, "does not exist"), ("org/a@nope", 404, "no revision"), ("org/dora", 422, "use_dora"),
     ("org/gated", 403, "gated"), ("a/b/c", 404, "does not exist"), ("../x", 404, "does not exist")],
)  # fmt: skip
async def test_what_cannot_be_served_says_why(
    hub: HubStub, fleet: ScriptedFleet, http: httpx2.AsyncClient, name: str, status: int, part: str
) -> None:
    hub.repos["org/dora"] = Repo()
    hub.repos["org/dora"].commit(adapter_bytes(use_dora=True, layers_pattern=7))
    hub.repos["org/gated"] = Repo(gated=True)
    hub.repos["org/gated"].commit(adapter_bytes())
    answer = await ask(http, name)
    assert answer.status_code == status, answer.text
    assert part in answer.json()["error"]["message"] or part == "use_dora"
    assert fleet.seen == []


async def test_failures_are_remembered_and_tried_again_later(
    hub: HubStub, http: httpx2.AsyncClient, timings: StoreTimings
) -> None:
    """Thirty concurrent and thirty later requests share one lookup and its error; after a pause, a new one follows."""
    timings.refusal = Backoff(3600.0, 3600.0)
    answers = await asyncio.gather(*(ask(http, "org/late") for _ in range(30)))
    answers += [await ask(http, "org/late") for _ in range(30)]
    assert {answer.status_code for answer in answers} == {404}
    assert len(hub.requests("org/late")) == 1
    timings.refusal = Backoff(0.01, 0.01)
    assert (await ask(http, "org/soon")).status_code == 404
    hub.repos["org/soon"] = Repo()
    hub.repos["org/soon"].commit(adapter_bytes(3))

    async def is_served() -> bool:
        return (await ask(http, "org/soon")).status_code == 200

    await wait_until(is_served, "it is looked at again")


async def test_trouble_is_a_503_with_a_time(hub: HubStub, http: httpx2.AsyncClient) -> None:
    hub.down = True
    answer = await ask(http, "org/a")
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert "the Hub answered 503" in answer.json()["error"]["message"]


async def test_private_is_for_those_whose_token_opens_it(
    bus: Bus, hub: HubStub, fleet: ScriptedFleet, http: httpx2.AsyncClient
) -> None:
    """Later requests without the token are refused, and Redis stores nothing from which the token could be read."""
    hub.repos["org/p"] = Repo(private=True)
    hub.repos["org/p"].commit(adapter_bytes(5))
    hub.tokens = {"hf_mine": {"org/p"}, "hf_other": set()}
    assert (await ask(http, "org/p")).status_code == 404
    assert (await ask(http, "org/p", "hf_mine")).status_code == 200
    for token in ("", "hf_other", "sk-not-for-the-hub"):
        assert (await ask(http, "org/p", token)).status_code == 404
    assert len(fleet.seen) == 1
    listed = (await http.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed if model.get("state") == "on_disk"] == []
    dump = [await bus._redis.hgetall(key) for key in (bus.keys.registrations, bus.keys.adapters)]
    assert b"hf_" not in repr(dump).encode()


async def test_a_token_that_is_revoked_opens_nothing_any_more(
    bus: Bus, hub: HubStub, model_folder: Path, tmp_path: Path
) -> None:
    hub.repos["org/p"] = Repo(private=True)
    commit = hub.repos["org/p"].commit(adapter_bytes(5))
    hub.tokens = {"hf_mine": {"org/p"}}
    async with running(bus, hub, model_folder, tmp_path, refresh_s=0.01) as http:
        for name in ("org/p", f"org/p@{commit}"):
            assert (await ask(http, name, "hf_mine")).status_code == 200
        hub.tokens["hf_mine"] = set()
        for name in ("org/p", f"org/p@{commit}"):
            assert (await ask(http, name, "hf_mine")).status_code == 404


async def test_what_a_token_opened_is_closed_to_others_at_every_door(
    bus: Bus, hub: HubStub, fleet: ScriptedFleet, http: httpx2.AsyncClient, timings: StoreTimings
) -> None:
    """By commit, by a registered name, in a merge and by digest, the adapter appears not to exist."""
    timings.refusal = Backoff(0.001, 0.001)
    hub.repos["org/p"] = Repo(private=True)
    place = f"org/p@{hub.repos['org/p'].commit(adapter_bytes(5))}"
    hub.tokens = {"hf_mine": {"org/p"}, "hf_other": set()}
    mine = await ask(http, place, "hf_mine")
    assert mine.status_code == 200
    digest = fleet.seen[0][0].digest
    for _ in range(3):  # the refusal expires in between
        for token in ("", "hf_other"):
            refused = await ask(http, place, token)
            missing = await ask(http, place.replace("org/p", "org/q"), token)
            assert refused.status_code == missing.status_code == 404
            assert refused.text.replace("org/p", "org/q") == missing.text
    for body in ({}, {"token": "hf_other"}):
        taken = await http.post("/v1/adapters", json={"name": "stolen", "source": place, **body})
        assert taken.status_code == 404, taken.text
    merged = {"ids": [place, "org/a"], "weights": [1, 1]}
    assert (await ask(http, "base", merged_adapters=merged)).status_code == 404
    for name in (digest, f"base:{digest}", f"hub:{digest}"):
        assert (await ask(http, name)).status_code == 404
    assert (await http.post(f"/v1/adapters/{place}/preload")).status_code == 404
    assert {submit.digest for submit, _ in fleet.seen} == {digest}
    assert len(fleet.seen) == 1


async def test_rights_are_asked_again_within_the_time_that_is_set(
    bus: Bus, hub: HubStub, model_folder: Path, tmp_path: Path
) -> None:
    """Even if content is rarely looked up again, and also by a registered name; public commits need no request."""
    hub.repos["org/p"] = Repo(private=True)
    commit = hub.repos["org/p"].commit(adapter_bytes(5))
    hub.tokens = {"hf_mine": {"org/p"}}
    public = f"org/a@{hub.repos['org/a'].refs['main']}"
    changes = {"refresh_s": 3600.0, "access_check_s": NOT_EVEN_A_MS, "api_keys": True}
    secret, _ = await bus.api_keys.create("acme", ["infer", "adapters"])
    async with running(bus, hub, model_folder, tmp_path, **changes) as http:
        http.headers["x-api-key"] = secret
        body = {"name": "mine", "source": f"org/p@{commit}", "token": "hf_mine"}
        assert (await http.post("/v1/adapters", json=body)).status_code == 201
        names = {"mine": "", "org/p": "hf_mine", f"org/p@{commit}": "hf_mine", public: ""}
        for name, token in names.items():
            assert (await ask(http, name, token)).status_code == 200
        hub.tokens["hf_mine"] = set()
        hub.seen.clear()
        for name, token in names.items():
            assert (await ask(http, name, token)).status_code == (200 if name == public else 404)
        assert hub.requests("org/a") == []


async def test_rights_hold_while_the_hub_is_away_but_not_for_ever(
    bus: Bus, hub: HubStub, model_folder: Path, tmp_path: Path
) -> None:
    hub.repos["org/p"] = Repo(private=True)
    hub.repos["org/p"].commit(adapter_bytes(5))
    hub.tokens = {"hf_mine": {"org/p"}}
    for seconds, status in ((3600.0, 200), (NOT_EVEN_A_MS, 503)):
        hub.down = False
        async with running(bus, hub, model_folder, tmp_path, access_check_s=seconds) as http:
            assert (await ask(http, "org/p", "hf_mine")).status_code == 200
            hub.down = True
            assert (await ask(http, "org/p", "hf_mine")).status_code == status
            assert (await ask(http, "org/p", "hf_mine")).status_code == status


async def test_a_name_in_use_is_confirmed_before_its_time_is_over(
    bus: Bus, hub: HubStub, model_folder: Path, tmp_path: Path
) -> None:
    """The name is confirmed in the background: no request waits for the Hub, which does not answer here."""
    hub.repos["org/p"] = Repo(private=True)
    hub.repos["org/p"].commit(adapter_bytes(5))
    hub.tokens = {"hf_mine": {"org/p"}}
    owner = owner_of("hf_mine", FleetSecret(SECRET))
    async with running(bus, hub, model_folder, tmp_path, access_check_s=3600.0, refresh_s=36_000.0) as http:
        assert (await ask(http, "org/p", "hf_mine")).status_code == 200
        hub.seen.clear()
        assert (await ask(http, "org/p", "hf_mine")).status_code == 200
        assert hub.seen == []
        alias = await bus.adapters.alias("org/p", owner)
        assert alias is not None
        older = msgspec.structs.replace(alias, confirmed_ms=alias.confirmed_ms - 2_000_000)
        await bus._redis.hset(bus.keys.adapters, private_name("org/p", owner), m.encode(older))
        hub.down = True
        assert (await ask(http, "org/p", "hf_mine")).status_code == 200
        await wait_until(lambda: hub.requests("org/p"), "the Hub is asked")


async def test_the_fleets_token_is_not_for_tenants(
    bus: Bus, hub: HubStub, fleet: ScriptedFleet, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Except for adapters that an operator registers, and for repositories in the settings that the tenant sees."""
    monkeypatch.setenv("HF_TOKEN", "hf_fleet")
    for name in ("org/p", "lent/p", "lent/hidden"):
        hub.repos[name] = Repo(private=True)
        hub.repos[name].commit(adapter_bytes(5))
    hub.tokens = {"hf_fleet": {"org/p", "lent/p", "lent/hidden"}}
    await bus.api_keys.set_tenant(Tenant(name="acme", adapters=("lent/p", "org/*", "shared")))
    keys = {
        name: (await bus.api_keys.create(name, scopes))[0]
        for name, scopes in (("acme", ["infer", "adapters"]), ("ops", ["admin"]))
    }
    settings = {"api_keys": True, "tenant_places": "lent", "request_sources": "hub,s3", "s3_buckets": "ours"}
    async with running(bus, hub, model_folder, tmp_path, **settings) as http:
        acme, ops = ({"Authorization": f"Bearer {keys[name]}"} for name in ("acme", "ops"))

        async def register(headers: dict[str, str], name: str, source: str) -> int:
            answer = await http.post("/v1/adapters", json={"name": name, "source": source}, headers=headers)
            return answer.status_code

        async def status(model: str) -> int:
            body = {"model": model, "prompt": "fox", "max_tokens": 2}
            return (await http.post("/v1/completions", json=body, headers=acme)).status_code

        assert await register(ops, "shared", "org/p") == 201
        assert [await status(name) for name in ("shared", "lent/p", "org/p", "lent/hidden")] == [200, 200, 404, 404]
        sources = ("lent/p", "org/p", "lent/hidden", "s3://ours/a")
        assert [await register(acme, f"n{i}", source) for i, source in enumerate(sources)] == [201, 404, 404, 403]
        assert await status("s3://ours/a") in (403, 404)


async def test_a_tenant_hears_nothing_of_others_with_the_same_content(
    bus: Bus, hub: HubStub, fleet: ScriptedFleet, model_folder: Path, tmp_path: Path
) -> None:
    """An adapter shown or unloaded looks the same whether or not another tenant has or uses the same content."""
    keys = {name: (await bus.api_keys.create(name, ["infer", "adapters"]))[0] for name in ("acme", "corp")}
    async with running(bus, hub, model_folder, tmp_path, api_keys=True) as http:
        acme, corp = ({"x-api-key": key} for key in keys.values())

        async def seen_by_acme() -> list[Any]:
            body = {"name": "mine", "source": "org/a"}
            shown = (await http.post("/v1/adapters", json=body, headers=acme)).json()
            gone = await http.delete("/v1/adapters/mine?force=true&blob=true", headers=acme)
            return [{key: value for key, value in shown.items() if not key.endswith("_ms")}, gone.json()]

        alone = await seen_by_acme()
        await http.post("/v1/adapters", json={"name": "theirs", "source": "org/a"}, headers=corp)
        used = await http.post("/v1/completions", json={"model": "theirs", "prompt": "fox"}, headers=corp)
        assert used.status_code == 200
        digest = fleet.seen[-1][0].digest
        await bus.adapters.note_use({digest: AdapterUse(hits=3, last_ms=now_ms())})
        assert await seen_by_acme() == alone
        assert (await http.get("/v1/adapters/theirs", headers=corp)).status_code == 200


async def test_without_a_secret_no_token_is_kept(bus: Bus, hub: HubStub, model_folder: Path, tmp_path: Path) -> None:
    async with running(bus, hub, model_folder, tmp_path, secret="") as http:
        answer = await ask(http, "org/a", "hf_mine")
        assert answer.status_code == 400
        assert "no secret" in answer.json()["error"]["message"]
        assert (await ask(http, "org/a")).status_code == 200


async def test_a_moved_branch_is_seen_when_it_is_asked_for(
    bus: Bus, hub: HubStub, fleet: ScriptedFleet, model_folder: Path, tmp_path: Path
) -> None:
    """However long ago the last request was; there are no lookups in between."""
    async with running(bus, hub, model_folder, tmp_path, refresh_s=0.01) as http:
        assert (await ask(http, "org/a")).status_code == 200
        seen = len(hub.requests("/api/models/org/a"))
        hub.repos["org/a"].commit(adapter_bytes(9))
        assert (await ask(http, "org/a")).status_code == 200
        assert len(hub.requests("/api/models/org/a")) == seen + 1
    assert len({submit.digest for submit, _ in fleet.seen}) == 2


async def test_a_slow_one_keeps_its_client_company_and_nobody_else_waiting(
    bus: Bus, hub: HubStub, fleet: ScriptedFleet, model_folder: Path, tmp_path: Path
) -> None:
    hub.gate = asyncio.Event()
    async with (
        running(bus, hub, model_folder, tmp_path, keepalive_s=0.05) as http,
        asyncio.TaskGroup() as group,
    ):
        body = {"model": "org/a", "prompt": "fox", "stream": True}
        waiting = group.create_task(ask(http, "org/a"))
        async with http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.aiter_lines()
            assert await anext(lines) == ": its adapter is being fetched"
            assert (await ask(http, "base")).status_code == 200
            assert [submit.digest for submit, _ in fleet.seen] == [""]
            hub.gate.set()
            text = "".join([line async for line in lines])
        assert "data: [DONE]" in text
        assert (await waiting).status_code == 200


async def test_a_stream_that_has_begun_to_wait_gets_its_error_as_an_event(
    bus: Bus, hub: HubStub, model_folder: Path, tmp_path: Path
) -> None:
    hub.gate, hub.drop_gated = asyncio.Event(), True
    async with running(bus, hub, model_folder, tmp_path, keepalive_s=0.05) as http:
        body = {"model": "org/a", "prompt": "fox", "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.aiter_lines()
            assert await anext(lines) == ": its adapter is being fetched"
            hub.gate.set()
            text = "\n".join([line async for line in lines])
    assert '"code":"adapter_unavailable"' in text
    assert "[DONE]" not in text


async def test_a_client_that_leaves_while_its_adapter_comes_submits_nothing(
    bus: Bus, hub: HubStub, fleet: ScriptedFleet, model_folder: Path, tmp_path: Path
) -> None:
    hub.gate = asyncio.Event()
    async with running(bus, hub, model_folder, tmp_path, keepalive_s=0.02) as http:
        async with http.stream("POST", "/v1/completions", json={"model": "org/a", "prompt": "f", "stream": True}) as s:
            assert await anext(s.aiter_lines()) == ": its adapter is being fetched"
        hub.gate.set()
        assert (await ask(http, "org/a")).status_code == 200
    assert len(fleet.seen) == 1


async def test_without_a_store_nobody_waits_for_ever(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    async with gateway_client(bus, model_folder, GatewayTimings(alias_poll_s=0.05), request_sources="hub") as http:
        answer = await ask(http, "org/a")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_store")


async def test_a_refused_registration_answers_once_its_name_is_removed(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    """The test plays the store: it refuses the name, and later removes it."""
    await bus._redis.zadd(bus.keys.stores, {"store": now_ms()})
    async with (
        gateway_client(bus, model_folder, GatewayTimings(alias_poll_s=0.02)) as http,
        asyncio.TaskGroup() as group,
    ):
        body = {"name": "new", "source": "hub:org/none"}
        asked = group.create_task(http.post("/v1/adapters", json=body))
        registration = await wait_until(lambda: bus.adapters.registration("new"), "the name is registered")
        refused = m.Alias(
            name="new", state="failed", reason="org/none does not exist", status=404, source=registration.source,
            asked_ms=registration.asked_ms, created_ms=1,
        )  # fmt: skip
        await bus._redis.hset(bus.keys.adapters, "new", m.encode(refused))

        async def is_unregistered() -> bool:
            return await bus.adapters.registration("new") is None

        await wait_until(is_unregistered, "the gateway takes the registration back")
        assert (await http.get("/v1/adapters/new")).json()["state"] == "failed"
        assert not asked.done()
        await bus._redis.hdel(bus.keys.adapters, "new")
        answer = await asked
        assert (answer.status_code, "org/none does not exist" in answer.text) == (404, True)
        assert (await http.get("/v1/adapters/new")).status_code == 404
    await bus._redis.delete(bus.keys.stores)

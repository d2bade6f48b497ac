"""API keys: authentication, what each tenant sees, and how limits are reported."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import msgspec
import pytest
import pytest_asyncio
from helpers.scripted_fleet import BASE_NAME, RunningGateway, Script, ScriptedFleet, gateway_client, running_gateway
from helpers.waiting import wait_until
from openai import AsyncOpenAI, AuthenticationError, PermissionDeniedError, RateLimitError

from gateway.auth.limits import duration
from protocol.queue.books.api_keys import ApiKeys, Tenant, hash_of
from protocol.queue.bus import Bus, now_ms
from protocol.wire import messages as m

CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


@pytest.fixture
def keys(bus: Bus) -> ApiKeys:
    return bus.api_keys


@pytest_asyncio.fixture
async def gateway(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> AsyncIterator[RunningGateway]:
    async with running_gateway(bus, model_folder, api_keys=True) as running:
        yield running


async def key_of(keys: ApiKeys, tenant: str, *scopes: str, **limits: object) -> dict[str, str]:
    """Create a key; return the headers with it."""
    if limits:
        await keys.set_tenant(msgspec.structs.replace(await keys.tenant(tenant), **limits))
    secret, _ = await keys.create(tenant, scopes or ("infer",))
    return {"authorization": f"Bearer {secret}"}


async def test_only_a_good_key_gets_in(http: httpx2.AsyncClient, keys: ApiKeys) -> None:
    for headers in ({}, {"authorization": "Bearer hf_none"}, {"authorization": "Bearer sk-lf-wrong"}):
        refused = await http.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert refused.json()["error"]["type"] == "invalid_request_error"
        assert refused.headers["x-should-retry"] == "false"
        assert refused.headers["x-request-id"]
    native = await http.post("/generate", json={"inputs": "hi"})
    assert (native.status_code, native.json()["error_type"]) == (401, "authentication")
    for path in ("/health", "/ping", "/"):
        assert (await http.get(path)).status_code == 200
    for path in ("/metrics", "/openapi.json", "/info", "/v1/models", "/startup", "/v1/jobs", "/nowhere"):
        assert (await http.get(path)).status_code == 401
    good = await key_of(keys, "acme")
    assert (await http.post("/v1/chat/completions", json=CHAT, headers=good)).status_code == 200
    assert (await http.get("/v1/models", headers={"x-api-key": good["authorization"].split()[1]})).status_code == 200


async def test_metrics_are_an_admin_s_unless_the_pages_are_open(
    bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient, keys: ApiKeys, model_folder: Path
) -> None:
    tenant, admin = await key_of(keys, "acme"), await key_of(keys, "ops", "admin")
    assert (await http.get("/metrics", headers=tenant)).status_code == 403
    assert (await http.get("/v1/fleet", headers=tenant)).status_code == 403
    assert (await http.get("/v1/fleet", headers=admin)).json()["object"] == "fleet"
    assert (await http.get("/openapi.json", headers=tenant)).status_code == 200
    await fleet.add_adapter("secret-name", "d1")
    body = {**CHAT, "model": "secret-name"}
    assert (await http.post("/v1/chat/completions", json=body, headers=tenant)).status_code == 200
    shown = await http.get("/metrics", headers=admin)
    assert shown.status_code == 200
    assert 'lorafleet_adapter_requests_total{adapter="secret-name"} 1.0' in shown.text
    assert 'tenant="acme"' in shown.text
    async with gateway_client(bus, model_folder, api_keys=True, open_pages=True) as other:
        for path in ("/metrics", "/openapi.json", "/v1/fleet"):
            page = await other.get(path)
            assert page.status_code == 200
            assert "secret-name" not in page.text
            assert "acme" not in page.text


async def test_openai_s_client_understands_the_refusals(gateway: RunningGateway, keys: ApiKeys) -> None:
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="sk-lf-wrong", max_retries=0) as openai:
        with pytest.raises(AuthenticationError):
            await openai.chat.completions.create(**CHAT)
    secret, _ = await keys.create("acme", ["adapters"])
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=secret, max_retries=0) as openai:
        with pytest.raises(PermissionDeniedError, match="scope infer; the one given has adapters"):
            await openai.chat.completions.create(**CHAT)


async def test_a_revoked_or_expired_key_is_refused_at_once_by_every_gateway(
    bus: Bus, gateway: RunningGateway, model_folder: Path, http: httpx2.AsyncClient, keys: ApiKeys
) -> None:
    secret, key = await keys.create("acme", ["infer"])
    headers = {"authorization": f"Bearer {secret}"}
    async with gateway_client(bus, model_folder, api_keys=True) as other:
        for client in (http, other):
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
        await bus._redis.hset(
            bus.keys.api_keys, hash_of(secret), m.encode(msgspec.structs.replace(key, expires_ms=now_ms()))
        )
        assert (await other.get("/v1/models", headers=headers)).status_code == 401
        await bus._redis.hset(bus.keys.api_keys, hash_of(secret), m.encode(key))
        assert (await other.get("/v1/models", headers=headers)).status_code == 200
        await keys.revoke(key.id)
        for client in (http, other):
            assert (await client.get("/v1/models", headers=headers)).status_code == 401


async def test_orders_about_adapters_need_their_scope(http: httpx2.AsyncClient, keys: ApiKeys) -> None:
    infer, adapters = await key_of(keys, "acme"), await key_of(keys, "acme", "adapters")
    for method, path in (
        ("POST", "/v1/adapters"),
        ("DELETE", "/v1/adapters/a"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/load_lora_adapter"),
    ):
        refused = await http.request(method, path, json={}, headers=infer)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
        assert (await http.request(method, path, json={}, headers=adapters)).status_code in (400, 404)
    for what in ("pin", "unpin", "evict"):
        refused = await http.post(f"/v1/adapters/a/{what}", headers=adapters)
        assert refused.json()["error"]["message"] == "this needs a key with the scope admin; the one given has adapters"
    assert (await http.post("/v1/adapters/a/pin", headers=await key_of(keys, "ops", "admin"))).status_code == 404
    assert (await http.get("/v1/adapters", headers=adapters)).status_code == 200
    refused = await http.get("/v1/adapters?tenant=other", headers=adapters)
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")


async def test_pages_of_adapters_part_two_of_one_name(
    bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient, keys: ApiKeys
) -> None:
    for name in ("common", "common2"):
        await fleet.add_adapter(name, "d2")
    own = m.Alias(name="common", state="failed", source="hub:a/b", tenant="acme")
    await bus.adapters.publish([(own, None)])
    acme, seen, after, more = await key_of(keys, "acme"), list[tuple[str, str | None]](), "", True
    while more and len(seen) < 4:
        page = (await http.get(f"/v1/adapters?limit=1&after={after}", headers=acme)).json()
        seen += [(shown["name"], shown["tenant"]) for shown in page["data"]]
        after, more = page["last_id"], page["has_more"]
    assert seen == [("common", None), ("common", "acme"), ("common2", None)]
    page = (await http.get("/v1/adapters?after=common", headers=acme)).json()
    assert [shown["name"] for shown in page["data"]] == ["common2"], "a name alone stands for all of that name"


async def test_tenants_see_their_own_adapters_and_those_that_are_for_them(
    bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient, keys: ApiKeys
) -> None:
    for name, content in (("acme-de", "d1"), ("common", "d2"), ("secret", "d3")):
        await fleet.add_adapter(name, content)
    own = m.Alias(name="common", state="on_disk", digest="d4", source="hub:a/b", tenant="acme")
    await bus.adapters.publish([(own, None)])
    record = m.AdapterRecord(
        digest="d4", rank=8, num_bytes=10, config={}, modules=["q_proj"], source=own.source, created_ms=1
    )
    await bus.set(bus.keys.adapter("d4"), record)
    acme = await key_of(keys, "acme", adapters=("acme-*",))
    other = await key_of(keys, "other", adapters=("common", "acme-*"))
    ops = await key_of(keys, "ops", "admin", adapters=())

    async def names(headers: dict[str, str], path: str = "/v1/models") -> list[str]:
        return [model.get("id") or model["name"] for model in (await http.get(path, headers=headers)).json()["data"]]

    assert await names(acme) == [BASE_NAME, "acme-de", "common"]
    assert await names(acme, "/v1/adapters") == ["acme-de", "common"]
    assert await names(other) == [BASE_NAME, "acme-de", "common"]
    assert await names(ops) == [BASE_NAME, "acme-de", "common", "secret"]
    assert await names(ops, "/v1/adapters?tenant=acme") == ["common"]
    assert (await http.get("/info", headers=acme)).json()["adapters"] == ["acme-de", "common"]

    async def digest(headers: dict[str, str], name: str) -> str | int:
        body = {**CHAT, "model": name}
        answer = await http.post("/v1/chat/completions", json=body, headers=headers)
        if answer.status_code != 200:
            assert answer.json()["error"]["code"] == "model_not_found"
            return answer.status_code
        shown = (await http.get(f"/v1/models/{name}", headers=headers)).json()
        submit, request = fleet.seen[-1]
        assert shown["digest"] == submit.digest
        assert request.salt == submit.tenant  # prefix caches and fair shares are separate
        return submit.digest

    assert [await digest(acme, name) for name in ("acme-de", "common", "secret")] == ["d1", "d4", 404]
    assert [await digest(headers, "acme\0common") for headers in (acme, other, ops)] == [404, 404, 404]
    assert [await digest(other, name) for name in ("acme-de", "common", "secret")] == ["d1", "d2", 404]
    assert {submit.tenant for submit, _ in fleet.seen} == {"acme", "other"}
    assert (await http.get("/v1/models/secret", headers=acme)).status_code == 404
    assert (await http.get("/v1/adapters/secret", headers=acme)).status_code == 404
    native = {"inputs": "hi", "parameters": {"adapter_id": "secret", "max_new_tokens": 2}}
    assert (await http.post("/generate", json=native, headers=acme)).status_code == 424
    native["parameters"] = {"adapter_id": "common", "max_new_tokens": 2}
    assert (await http.post("/generate", json=native, headers=acme)).status_code == 200
    assert fleet.seen[-1][0].digest == "d4"


async def test_a_tenant_registers_names_of_its_own_only(bus: Bus, http: httpx2.AsyncClient, keys: ApiKeys) -> None:
    acme, ops = await key_of(keys, "acme", "adapters"), await key_of(keys, "ops", "admin")
    await keys.set_tenant(Tenant(name="acme", adapters=("open",)))
    body = {"name": "mine", "source": "org/a", "wait_s": 0}
    assert (await http.post("/v1/adapters", json={**body, "tenant": "other"}, headers=acme)).status_code == 403
    assert (await http.post("/v1/adapters", json={**body, "pin": True}, headers=acme)).status_code == 400
    refused = await http.post("/v1/adapters", json={"name": "x", "source": "local:hidden"}, headers=acme)
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "source")
    await http.post("/v1/adapters", json=body, headers=acme)
    registered = await bus.adapters.registration("mine", "acme")
    assert registered is not None
    assert registered.source == "hub:org/a"
    assert await bus.adapters.registration("mine") is None
    await http.post("/v1/adapters", json={**body, "tenant": "other"}, headers=ops)
    assert await bus.adapters.registration("mine", "other") is not None
    await http.post("/v1/adapters", json=body, headers=ops)
    assert await bus.adapters.registration("mine") is not None
    assert (await http.delete("/v1/adapters/mine?tenant=other", headers=acme)).status_code == 403


async def test_jobs_and_idempotency_keys_belong_to_their_tenant(http: httpx2.AsyncClient, keys: ApiKeys) -> None:
    acme, other = await key_of(keys, "acme"), await key_of(keys, "other")
    body = {**CHAT, "background": True}
    job = (await http.post("/v1/chat/completions", json=body, headers={**acme, "idempotency-key": "k"})).json()
    again = (await http.post("/v1/chat/completions", json=body, headers={**acme, "idempotency-key": "k"})).json()
    assert again["id"] == job["id"]
    theirs = (await http.post("/v1/chat/completions", json=body, headers={**other, "idempotency-key": "k"})).json()
    assert theirs["id"] != job["id"]
    for path in (f"/v1/jobs/{job['id']}", f"/v1/jobs/{job['id']}/cancel"):
        refused = await http.request("POST" if "cancel" in path else "GET", path, headers=other)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "job_not_found")
    assert [shown["id"] for shown in (await http.get("/v1/jobs", headers=other)).json()["data"]] == [theirs["id"]]


async def test_a_bearer_beside_an_x_api_key_is_the_source_s_token(
    bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient, keys: ApiKeys
) -> None:
    """Otherwise, it is the key, which must never be sent to a Hub."""
    key = (await key_of(keys, "acme"))["authorization"].split()[1]
    for headers, scopes in (
        ({"authorization": f"Bearer {key}"}, 200),
        ({"authorization": "Bearer any-token", "x-api-key": key}, 200),
        ({"authorization": f"Bearer {key}", "x-api-key": "sk-lf-wrong"}, 401),
    ):
        answer = await http.post("/generate", json={"inputs": "hi"}, headers=headers)
        assert answer.status_code == scopes


# ---------------------------------------------------------------- limits


async def test_answers_tell_what_is_left(fleet: ScriptedFleet, http: httpx2.AsyncClient, keys: ApiKeys) -> None:
    headers = await key_of(keys, "acme", requests_per_minute=5, tokens_per_minute=1000)
    whole = await http.post("/v1/chat/completions", json=CHAT, headers=headers)
    streamed = await http.post("/v1/chat/completions", json={**CHAT, "stream": True}, headers=headers)
    native = await http.post("/generate", json={"inputs": "hi", "parameters": {"max_new_tokens": 2}}, headers=headers)
    for i, answer in enumerate((whole, streamed, native)):
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "5"
        assert answer.headers["x-ratelimit-remaining-requests"] == str(4 - i)
        assert answer.headers["x-ratelimit-reset-requests"].endswith("s")
        assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
        assert 900 < int(answer.headers["x-ratelimit-remaining-tokens"]) < 1000
    free = await http.post("/v1/chat/completions", json=CHAT, headers=await key_of(keys, "free"))
    assert not [name for name in free.headers if name.startswith("x-ratelimit")]


async def test_what_exceeds_a_limit_is_told_when_to_come_back(gateway: RunningGateway, keys: ApiKeys) -> None:
    secret, _ = await keys.create("acme", ["infer"])
    await keys.set_tenant(Tenant(name="acme", requests_per_minute=1))
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=secret, max_retries=0) as openai:
        await openai.chat.completions.create(**CHAT)
        with pytest.raises(RateLimitError) as refused:
            await openai.chat.completions.create(**CHAT)
    assert refused.value.code == "rate_limit_exceeded"
    assert "0 requests are left and the call needs 1; the limit of tenant acme is 1 requests a minute" in str(
        refused.value
    )
    headers = refused.value.response.headers
    assert 50 <= int(headers["retry-after"]) <= 60
    assert headers["x-should-retry"] == "true"
    assert headers["x-ratelimit-remaining-requests"] == "0"


async def test_what_no_limit_could_ever_let_in_is_the_client_s_fault(http: httpx2.AsyncClient, keys: ApiKeys) -> None:
    headers = await key_of(keys, "acme", tokens_per_minute=60, concurrency=2)
    for change, param, said in (
        ({"n": 3}, "n", "the call makes 3 choices; the limit of tenant acme is 2 at once"),
        ({"max_tokens": 60}, "max_tokens", "the limit of tenant acme is 60 a minute: set max_tokens"),
    ):
        refused = await http.post("/v1/chat/completions", json={**CHAT, **change}, headers=headers)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        assert said in refused.json()["error"]["message"]
        assert "retry-after" not in refused.headers


async def test_virtual_tokens_of_an_adapter_count_against_its_tenant_s_limit(
    fleet: ScriptedFleet, http: httpx2.AsyncClient, keys: ApiKeys
) -> None:
    await fleet.add_adapter("soft", "d-soft", num_virtual=100)
    headers = await key_of(keys, "acme", tokens_per_minute=150)
    body = {"model": "soft", "prompt": [5] * 10, "max_tokens": 5}
    answer = await http.post("/v1/completions", json=body, headers=headers)
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(150 - 115)
    refused = await http.post("/v1/completions", json={**body, "max_tokens": 50}, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "limit_exceeded")
    base = await http.post("/v1/completions", json={**body, "model": "base", "max_tokens": 20}, headers=headers)
    assert base.status_code == 200


async def test_what_a_tenant_keeps_in_the_queue_is_limited(
    fleet: ScriptedFleet, http: httpx2.AsyncClient, keys: ApiKeys
) -> None:
    small, other = await key_of(keys, "small", kept_bytes=20_000), await key_of(keys, "other")
    job = {**CHAT, "background": True}
    made: list[str] = []
    while True:
        answer = await http.post("/v1/chat/completions", json=job, headers=small)
        if answer.status_code != 202:
            break
        made.append(answer.json()["id"])
        await http.get(f"/v1/jobs/{made[-1]}", headers={**small, "prefer": "wait=30"})
    assert 2 <= len(made) <= 8
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (429, "rate_limit_exceeded")
    assert "tenant small keeps" in error["message"]
    assert "its limit is 20000" in error["message"]
    assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("5", "true")
    assert (await http.post("/v1/chat/completions", json=job, headers=other)).status_code == 202
    assert (await http.delete(f"/v1/jobs/{made[0]}", headers=other)).status_code == 404
    assert (await http.delete(f"/v1/jobs/{made[0]}", headers=small)).status_code == 200
    assert (await http.post("/v1/chat/completions", json=job, headers=small)).status_code == 202
    answer = await http.post("/v1/chat/completions", json={**CHAT, "n": 20}, headers=small)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "limit_exceeded")
    assert "the limit of tenant small is 20000" in answer.json()["error"]["message"]


async def test_every_tenant_has_the_fleet_s_limit_of_bytes(
    bus: Bus, fleet: ScriptedFleet, keys: ApiKeys, model_folder: Path
) -> None:
    headers = await key_of(keys, "acme")
    async with gateway_client(bus, model_folder, api_keys=True, tenant_bytes=1000) as http:
        answer = await http.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "limit_exceeded")
        await keys.set_tenant(Tenant(name="acme", kept_bytes=100_000))
        assert (await http.post("/v1/chat/completions", json=CHAT, headers=headers)).status_code == 200


async def test_a_call_counts_while_it_runs_and_until_its_client_leaves(
    bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient, keys: ApiKeys
) -> None:
    headers = await key_of(keys, "acme", concurrency=1, tokens_per_minute=200)
    fleet.script = lambda submit, body: Script(hold_after=1)
    async with http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}, headers=headers) as stream:
        async for line in stream.aiter_lines():
            if "content" in line:
                break
        refused = await http.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert refused.status_code == 429
        assert "1 choices are queued or running, the call adds 1" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"] == "1"
    fleet.go.set()

    async def settled() -> bool:
        return not await bus._redis.zcard(bus.keys.running("acme"))

    await wait_until(settled, "its place is free again")
    assert (await http.post("/v1/chat/completions", json=CHAT, headers=headers)).status_code == 200


@pytest.mark.parametrize(("host", "loud"), [("127.0.0.1", False), ("0.0.0.0", True)])
async def test_a_gateway_that_others_reach_without_keys_says_so_loudly(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, host: str, loud: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "gateway.service"):
        async with running_gateway(bus, model_folder, host=host):
            pass
    assert ("API KEYS ARE OFF" in caplog.text) == loud


@pytest.mark.parametrize(
    ("ms", "shown"), [(0, "0ms"), (999, "999ms"), (1001, "2s"), (60_000, "1m0s"), (361_000, "6m1s")]
)
def test_durations_are_openai_s(ms: int, shown: str) -> None:
    assert duration(ms) == shown

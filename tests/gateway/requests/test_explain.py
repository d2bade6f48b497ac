"""The exact timeline of a request, even if a worker died, and its replay."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from helpers.scripted_fleet import ScriptedFleet, gateway_client
from helpers.small_fleet import SmallFleet, small_fleet
from prometheus_client import REGISTRY

from gateway.requests.replay import compared
from gateway.requests.timeline import timeline
from lorafleet.__main__ import main
from protocol.queue.books.api_keys import ApiKeys, Tenant
from protocol.queue.bus import Bus
from protocol.wire import messages as m
from protocol.wire.records import Assignment, RequestFacts, RequestRecord

BODY = {"model": "base", "prompt": "the dog", "max_tokens": 12, "ignore_eos": True, "temperature": 0}


def events(told: dict[str, Any]) -> list[str]:
    return [event["event"] for event in told["timeline"]]


async def explained(http: httpx2.AsyncClient, request: str) -> dict[str, Any]:
    answer = await http.get(f"/v1/requests/{request}")
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest_asyncio.fixture
async def small(bus: Bus, model_folder: Path) -> AsyncIterator[SmallFleet]:
    async with small_fleet(bus, model_folder, "one", keep_prompts=True) as fleet:
        yield fleet


async def test_a_request_is_told_from_its_acceptance_to_its_end(small: SmallFleet) -> None:
    done = (await small.http.post("/v1/completions", json={**BODY, "n": 2})).json()
    told = await explained(small.http, done["id"])
    wanted = ["accepted", "placed", "taken", "begun", "token", "first_token", "done", "ended"]
    assert sorted(events(told)) == sorted(wanted)  # events in the same ms are in any order
    assert events(told)[:2] == wanted[:2]
    assert [event["ms"] for event in told["timeline"]] == sorted(event["ms"] for event in told["timeline"])
    assert (told["state"], told["finish"]) == ("completed", "length")
    assert (told["output_tokens"], told["prompt_tokens"]) == (12, 2)
    placed = next(event for event in told["timeline"] if event["event"] == "placed")
    assert (placed["worker"], placed["because"], placed["assignment"]) == ("one", "only_place", 1)
    assert [option["worker"] for option in placed["options"]] == ["one"]
    assert not placed["yields"], "a tenant without others is not over its share"
    second = await explained(small.http, f"{done['id']}-1")
    assert second["timeline"][0]["ahead"] == 1  # after the first choice of its call
    assert second["call"] == told["id"]


@pytest.mark.parametrize(
    ("cls", "why"), [("batch", "batch work"), ("interactive", "its tenant has more than its fair share")]
)
def test_why_a_request_has_a_lower_priority_is_said(cls: str, why: str) -> None:
    facts = RequestFacts("running", 1, "", "", "", 1, 0, 0, submitted_ms=1, first_ms=0, ended_ms=0)
    placed = m.Placed(2, "w", "least_wait", [m.Option("w", 1, "")], yields=True)
    record = RequestRecord(facts, "t", cls, "", "base", "c", 0, 3, 9, [Assignment(placed)])
    first, second = timeline(record)
    assert first["text"] == "queued, 3 ahead of it"
    assert second["text"].endswith(f"; lower priority: {why}")


async def test_an_answer_of_a_converted_adapter_says_so(
    bus: Bus, small: SmallFleet, capsys: pytest.CaptureFixture[str]
) -> None:
    alias = m.Alias(name="near", state="on_disk", digest="d-near", source="local:near", created_ms=1)
    converted = m.Converted(kind="C3A", keep=0.999, errors={"q_proj": 0.031, "v_proj": 0.01})
    record = m.AdapterRecord(
        digest="d-near", rank=8, num_bytes=10, config={}, modules=["q_proj"], source="local:near", created_ms=1,
        converted=converted,
    )  # fmt: skip
    await bus.adapters.publish([(alias, record)])
    done = (await small.http.post("/v1/completions", json={**BODY, "model": "near"})).json()
    told = await explained(small.http, done["id"])
    assert told["adapter"]["converted"] == {"peft_type": "C3A", "keep": 0.999, "errors": {"q_proj": 0.031}}
    assert await asyncio.to_thread(main, ["explain", done["id"], "--url", str(small.http.base_url)]) == 0
    assert "approximates C3A by LoRA: at most 0.031 of a layer's norm off, at q_proj" in capsys.readouterr().out


async def test_a_death_is_in_the_timeline_and_the_replay_is_the_same(
    bus: Bus, small: SmallFleet, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, _ = small.workers["one"]
    async with small.http.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 400, "stream": True}) as answer:
        lines = answer.aiter_lines()
        first = await anext(lines)
        engine.steps.clear()
        small.start("two")
        await small.kill("one")
        rest = [line async for line in lines]
    assert rest[-1] == "" or "[DONE]" in rest[-1] or "[DONE]" in rest[-2]
    call = json.loads(first.removeprefix("data: "))["id"]
    told = await explained(small.http, call)
    happened = events(told)
    assert happened.count("placed") == happened.count("token") == 2
    assert happened.count("worker_died") == 1
    assert told["timeline"][-1]["event"] in ("ended", "done")
    assert told["output_tokens"] == 400
    again = next(event for event in told["timeline"] if event["event"] == "placed" and event["assignment"] == 2)
    assert (again["worker"], again["because"]) == ("two", "resumed")

    flags = ["explain", call, "--url", str(small.http.base_url)]
    assert await asyncio.to_thread(main, [*flags, "--replay"]) == 0
    shown = capsys.readouterr().out
    assert "one died; requeued" in shown
    assert "the same 400 tokens" in shown
    assert await asyncio.to_thread(main, [*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "completed"


async def test_records_fit_what_is_counted_for_a_request(bus: Bus, small: SmallFleet) -> None:
    done = (await small.http.post("/v1/completions", json=BODY)).json()
    rid = (await explained(small.http, done["id"]))["id"]
    sub = await bus._redis.hget(bus.keys.req(rid), "sub")
    # samples=0 measures each field; by default, the server extrapolates from the mean of five.
    size = await bus._redis.memory_usage(bus.keys.req(rid), samples=0)
    assert size < 2048 + 2 * len(sub)


async def test_prompts_are_kept_only_where_that_is_asked_for(bus: Bus, model_folder: Path) -> None:
    async with small_fleet(bus, model_folder, "one") as fleet:
        done = (await fleet.http.post("/v1/completions", json=BODY)).json()
        answer = await fleet.http.post(f"/v1/requests/{done['id']}/replay")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "prompt_not_kept")
    assert not await bus._redis.keys(bus.keys.body("*"))


async def test_kept_prompts_are_counted_and_expire(bus: Bus, small: SmallFleet) -> None:
    done = (await small.http.post("/v1/completions", json=BODY)).json()
    told = await explained(small.http, done["id"])
    left_ms = await bus._redis.pttl(bus.keys.body(told["call"]))
    assert 0 < left_ms <= 120_000


def test_the_first_difference_is_found() -> None:
    def ids(*values: int) -> bytes:
        return b"".join(value.to_bytes(4, "little") for value in values)

    assert compared("a", "b", ids(1, 2), ids(1, 2))["equal"]
    told = compared("a", "b", ids(1, 2, 3), ids(1, 5))
    assert (told["equal"], told["first_difference"], told["before"], told["now"]) == (False, 1, [2, 3], [5])
    assert compared("a", "b", ids(1), ids(1, 2))["first_difference"] == 1


@pytest.mark.parametrize("usage_days", [0, 62])
async def test_a_request_is_told_by_the_name_that_it_used(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, usage_days: int
) -> None:
    for name in ("first", "second"):
        await fleet.add_adapter(name, "d7")
    async with gateway_client(bus, model_folder, usage_days=usage_days) as http:
        for name in ("first", "second"):
            done = (await http.post("/v1/completions", json={**BODY, "model": name})).json()
            told = await explained(http, done["id"])
            assert told["adapter"] == {"digest": "d7", "name": name}
            listed = (await http.get("/v1/requests")).json()["data"]
            assert {one["adapter"]["name"] for one in listed if one["id"] == told["id"]} <= {name}
    assert bool(await bus._redis.keys(bus.keys.usage("*", "*"))) == bool(usage_days)


async def test_only_the_tenant_and_operators_are_told(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    keys = ApiKeys(bus._redis, bus.keys)
    names = {"mine": ["infer"], "other": ["infer"], "ops": ["admin"]}
    heads = {
        tenant: {"authorization": f"Bearer {(await keys.create(tenant, scopes))[0]}"}
        for tenant, scopes in names.items()
    }
    async with gateway_client(bus, model_folder, api_keys=True) as http:
        done = (await http.post("/v1/completions", json=BODY, headers=heads["mine"])).json()
        statuses = {
            tenant: (await http.get(f"/v1/requests/{done['id']}", headers=head)).status_code
            for tenant, head in heads.items()
        }
        assert statuses == {"mine": 200, "other": 404, "ops": 200}
        replay = await http.post(f"/v1/requests/{done['id']}/replay", headers=heads["other"])
        assert replay.status_code == 404
        assert (await http.get("/v1/requests/nothing-of-the-kind", headers=heads["ops"])).status_code == 404


async def test_a_replay_counts_against_the_limits_of_who_asks(bus: Bus, model_folder: Path) -> None:
    keys = ApiKeys(bus._redis, bus.keys)
    await keys.set_tenant(Tenant(name="mine", requests_per_minute=1))
    head = {"authorization": f"Bearer {(await keys.create('mine', ['infer']))[0]}"}
    async with small_fleet(bus, model_folder, "one", keep_prompts=True, api_keys=True) as fleet:
        done = (await fleet.http.post("/v1/completions", json=BODY, headers=head)).json()
        answer = await fleet.http.post(f"/v1/requests/{done['id']}/replay", headers=head)
        assert answer.status_code == 429
    assert REGISTRY.get_sample_value("lorafleet_tenant_refused_total", {"tenant": "mine", "reason": "requests"}) == 1


async def test_many_assignments_leave_the_first_and_the_last(bus: Bus) -> None:
    submit = m.RequestHead(
        rid="r", tenant="t", cls="interactive", digest="", num_prompt_tokens=1, max_new_tokens=9, deadline_ms=1 << 42,
        gateway="",
    )  # fmt: skip
    body = m.Body(prompt=b"\0\0\0\0", sampling=m.Sampling(), max_new_tokens=9)
    await bus.submit("interactive", [(submit, body)], max_queued=9)
    for i in range(40):
        await bus.streams.create(bus.keys.work(f"w{i}"), 60)
        placed = m.Placed(i, f"w{i}", "least_wait", [m.Option("w", 1, "")])
        order = m.Assigned("r", 2 * i + 1, "")
        assert (await bus.assign(f"w{i}", [(order, 2 * i)], placed={"r": placed}))[0] == "ok"
        assert await bus.requeue(f"w{i}", ["r"], counts=False, max_attempts=3) == {"r": "requeued"}
    record = await bus.record("r")
    assert record is not None
    assert [one.placed.ms for one in record.assignments] == [*range(8), *range(32, 40)]
    assert {one.left_how for one in record.assignments} == {"handed back"}
    assert await bus._redis.memory_usage(bus.keys.req("r"), samples=0) < 8192

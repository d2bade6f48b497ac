"""Errors of Anthropic's routes: their shape and headers, and the reasons why each parameter is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
import pytest_asyncio
from helpers.anthropic_events import held_to
from helpers.scripted_fleet import RunningGateway, Script, ScriptedFleet, gateway_client, running_gateway
from helpers.waiting import wait_until

from gateway.bodies.parameter_check import MAX_ENTRIES
from gateway.bodies.parameters import PARAMETERS_OF
from protocol.queue.bus import Bus

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
BODY: dict[str, Any] = {"model": "base", "max_tokens": 8, "messages": [{"role": "user", "content": "hi"}]}
ASKED = {key: value for key, value in BODY.items() if key != "max_tokens"}
TOOL = {"name": "add", "input_schema": {"type": "object"}}
CALLED = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "add", "input": {}}]},
]


def refused(answer: httpx2.Response, status: int, kind: str) -> dict[str, Any]:
    """Return the error of an answer, after a check of its shape."""
    body = answer.json()
    assert (answer.status_code, body["type"], body["error"]["type"]) == (status, "error", kind), answer.text
    assert set(body) == {"type", "error", "request_id"}
    assert body["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
    assert set(body["error"]) <= {"type", "message", "details"}
    if kind not in ("request_too_large", "conflict_error"):  # the client has no types for these
        held_to("error", body)
    return body["error"]


@pytest_asyncio.fixture
async def keyed(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> AsyncIterator[RunningGateway]:
    async with running_gateway(bus, model_folder, api_keys=True) as running:
        yield running


# ---------------------------------------------------------------- statuses


async def test_errors_of_the_request(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    error = refused(await http.post(PATH, json={**BODY, "model": "nobody"}), 404, "not_found_error")
    assert error["details"] == {"error_code": "model_not_found", "param": "model"}
    assert "nobody" in error["message"]
    refused(await http.post(COUNT, json={**ASKED, "model": "nobody"}), 404, "not_found_error")
    error = refused(await http.post(f"{PATH}/batches", json={}), 404, "not_found_error")
    assert "send each to" in error["message"]
    refused(await http.get(PATH), 405, "invalid_request_error")
    error = refused(await http.post(PATH, content=b"{", headers={"content-type": "application/json"}), 400,
                    "invalid_request_error")  # fmt: skip
    assert error["details"]["error_code"] == "invalid_json"
    refused(await http.post(PATH, content=b"x", headers={"content-type": "text/plain"}), 415, "invalid_request_error")
    large = {**BODY, "system": "x" * (5 << 20)}
    error = refused(await http.post(PATH, json=large), 413, "request_too_large")
    assert error["details"]["error_code"] == "body_too_large"
    assert fleet.seen == []


async def test_a_prompt_that_is_too_long_is_told_in_anthropic_s_words(http: httpx2.AsyncClient) -> None:
    words = {**BODY, "messages": [{"role": "user", "content": "the quick " * 200}]}
    error = refused(await http.post(PATH, json=words), 400, "invalid_request_error")
    assert error["message"].startswith("prompt is too long: ")
    assert error["message"].endswith(" tokens > 255 maximum")
    assert error["details"] == {"error_code": "context_length_exceeded", "param": "messages"}


async def test_no_worker_is_529(bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient) -> None:
    await fleet.stop_beating()
    await bus._redis.delete(bus.keys.worker_beat(fleet.wid))

    async def answer() -> httpx2.Response | None:
        one = await http.post(PATH, json=BODY)
        return one if one.status_code != 200 else None

    last = await wait_until(answer, "the gateway has seen that no worker is there")
    error = refused(last, 529, "overloaded_error")
    assert error["details"]["error_code"] == "no_worker"
    assert last.headers["retry-after"] == "2"
    assert last.headers["x-should-retry"] == "true"


async def test_a_full_queue_is_429(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    fleet.script = lambda submit, body: Script(hold_after=1)
    async with (
        gateway_client(bus, model_folder, max_queued=1) as http,
        asyncio.TaskGroup() as group,
    ):
        fleet.assigning.clear()
        group.create_task(http.post(PATH, json=BODY))
        await wait_until(lambda: fleet.seen, "a call is in the queue")
        last = await http.post(PATH, json=BODY)
        refused(last, 429, "rate_limit_error")
        assert int(last.headers["retry-after"]) > 0
        fleet.go.set()
        fleet.assigning.set()


async def test_keys_come_in_either_header(bus: Bus, keyed: RunningGateway) -> None:
    async with keyed.client() as http:
        for headers in ({}, {"x-api-key": "sk-lf-wrong"}, {"authorization": "Bearer sk-lf-wrong"}):
            for path, body in ((PATH, BODY), (COUNT, ASKED)):
                error = refused(await http.post(path, json=body, headers=headers), 401, "authentication_error")
                assert error["details"]["error_code"] == "invalid_api_key"
        version = {"anthropic-version": "2026-10-21"}
        refused(await http.get("/v1/models", headers=version), 401, "authentication_error")
        secret, _ = await bus.api_keys.create("acme", ["adapters"])
        refused(await http.post(PATH, json=BODY, headers={"x-api-key": secret}), 403, "permission_error")
        secret, _ = await bus.api_keys.create("acme", ["infer"])
        for headers in ({"x-api-key": secret}, {"authorization": f"Bearer {secret}"}):
            assert (await http.post(PATH, json=BODY, headers={**headers, **version})).status_code == 200


async def test_limits_are_told_in_anthropic_s_headers(bus: Bus, keyed: RunningGateway) -> None:
    tenant = await bus.api_keys.tenant("acme")
    await bus.api_keys.set_tenant(msgspec.structs.replace(tenant, requests_per_minute=1, tokens_per_minute=5000))
    secret, _ = await bus.api_keys.create("acme", ["infer"])
    async with keyed.client(headers={"x-api-key": secret}) as http:
        first, second = await http.post(PATH, json=BODY), await http.post(PATH, json=BODY)
    error = refused(second, 429, "rate_limit_error")
    assert "requests a minute" in error["message"]
    assert int(second.headers["retry-after"]) > 0
    for answer in (first, second):
        assert answer.headers["anthropic-ratelimit-requests-limit"] == "1"
        assert answer.headers["anthropic-ratelimit-tokens-limit"] == "5000"
        assert int(answer.headers["anthropic-ratelimit-tokens-remaining"]) < 5000
        for what in ("requests", "tokens"):
            reset = datetime.fromisoformat(answer.headers[f"anthropic-ratelimit-{what}-reset"])
            assert reset.utcoffset() is not None
        assert not any(name.startswith("x-ratelimit") for name in answer.headers)


# ---------------------------------------------------------------- idempotency


async def test_an_idempotency_key_answers_once(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    headers = {"idempotency-key": "k1"}
    first = await http.post(PATH, json=BODY, headers=headers)
    again = await http.post(PATH, json=BODY, headers=headers)
    (message, usage), (same, usage_again) = ((body, body.pop("usage")) for body in (first.json(), again.json()))
    assert message == same
    inputs = ("input_tokens", "cache_read_input_tokens")  # the number of cached tokens is not stored
    assert sum(usage[name] for name in inputs) == sum(usage_again[name] for name in inputs)
    assert len(fleet.seen) == 1
    error = refused(await http.post(PATH, json={**BODY, "max_tokens": 9}, headers=headers), 422,
                    "invalid_request_error")  # fmt: skip
    assert error["details"]["error_code"] == "idempotency_key_reused"
    chat = {"model": "base", "messages": BODY["messages"]}
    assert (await http.post("/v1/chat/completions", json=chat, headers=headers)).status_code == 422
    refused(await http.post(PATH, json=BODY, headers={"idempotency-key": "k" * 256}), 400, "invalid_request_error")


# ---------------------------------------------------------------- refused parameters


@pytest.mark.parametrize("path", [PATH, COUNT])
async def test_what_is_refused_says_why_unless_it_has_no_effect(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str
) -> None:
    kind, good = ("messages", BODY) if path == PATH else ("count_tokens", ASKED)
    known = [parameter for parameter in PARAMETERS_OF[kind].values() if parameter.fate == "refused"]
    assert {"mcp_servers", "context_management"} <= {parameter.name for parameter in known}
    for parameter in known:
        answer = await http.post(path, json={**good, parameter.name: "certainly not neutral"})
        error = refused(answer, 400, "invalid_request_error")
        assert error["message"] == f"`{parameter.name}` {parameter.why}."
        code = "thread_unsupported_request" if parameter.name == "thread" else "unsupported_parameter"
        assert error["details"] == {"error_code": code, "param": parameter.name}
        for value in (None, *parameter.neutral):
            answer = await http.post(path, json={**good, parameter.name: value})
            assert answer.status_code == 200, (parameter.name, value, answer.text)


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


def result(**fields: Any) -> dict[str, Any]:
    block = {"type": "tool_result", "tool_use_id": "t1", "content": "3", **fields}
    return {"messages": [*CALLED, {"role": "user", "content": [block]}]}


IMAGE = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (user(IMAGE), "messages[0].content[0]", "blocks of type 'image' are not supported: this model accepts text only"),
    (user({"type": "document", "source": {}}), "messages[0].content[0]", "this model accepts text only"),
    (user({"type": "web_search_tool_result", "content": []}), "messages[0].content[0]", "runs at Anthropic"),
    (user({"type": "nonsense"}), "messages[0].content[0]", "there may be text, tool_result here"),
    (user({"type": ["text"]}), "messages[0].content[0]", "the type of a block is a string"),
    (user({"type": "text", "text": 3}), "messages[0].content[0].text", "must be a string"),
    (user({"type": "text", "text": "x", "txt": 1}), "messages[0].content[0].txt", "Unknown parameter"),
    (user({"type": "text", "text": "x", "citations": [1]}), "messages[0].content[0].citations", "documents"),
    (user({"type": "tool_use", "id": "a", "name": "b", "input": {}}), "messages[0].content[0]", "'tool_use'"),
    (user(), "messages[0].content", "is empty"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "a string or a list of blocks"),
    ({"messages": [{"role": "user", "content": {"type": "text"}}]}, "messages[0].content", "or a list of blocks"),
    ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]", "'int' are not supported"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "one of user, assistant, system"),
    ({"messages": [{"role": "user", "content": "x", "nam": 1}]}, "messages[0].nam", "Unknown parameter"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": CALLED}, "messages[1]", "the calls of the last message have no results yet"),
    (result(tool_use_id="t2"), "messages[2].content[0].tool_use_id", "'t2' is not the id of an earlier tool_use block"),
    (result(content=[{"type": "search_result"}]), "messages[2].content[0].content[0]", "this model accepts text only"),
    (result(is_error="x"), "messages[2].content[0].is_error", "true or false"),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": "{}"}]}]},
        "messages[0].content[0].input",
        "must be an object",
    ),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}]},
        "messages[0].content[0]",
        "it is encrypted",
    ),
    ({"system": [IMAGE]}, "system[0]", "this model accepts text only"),
    ({"tools": [{"type": "house_20250305", "name": "house"}]}, "tools[0].type", "at Anthropic"),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name", "1 to 128 letters"),
    ({"tools": [{"name": "a"}]}, "tools[0].input_schema", "it is missing"),
    ({"tools": [{"name": "a", "input_schema": {"type": "string"}}]}, "tools[0].input_schema", "must be object"),
    ({"tools": [TOOL, TOOL]}, "tools[1].name", "defined twice"),
    ({"tools": [{**TOOL, "parameters": {}}]}, "tools[0].parameters", "Unknown parameter"),
    ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading", "a search among tools"),
    ({"tools": [{**TOOL, "description": 3}]}, "tools[0].description", "must be a string"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name", "needs it"),
    ({"tools": [TOOL], "tool_choice": {"type": "any", "name": "add"}}, "tool_choice.name", "belongs to the type tool"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice", "not among the tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "required"}}, "tool_choice", "'auto', 'any', 'tool' or 'none'"),
    ({"tool_choice": {"type": "any"}}, "tool_choice", "needs tools"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type", "'enabled', 'disabled' or 'adaptive'"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens", "it is missing"),
    ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens", "1024"),
    (
        {"thinking": {"type": "adaptive", "budget_tokens": 1024}},
        "thinking.budget_tokens",
        "belongs to the type enabled",
    ),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "has no effect"),
    ({"output_config": {"effort": "huge"}}, "output_config.effort", "'low', 'medium', 'high'"),
    ({"output_config": {"task_budget": {}}}, "output_config.task_budget", "only the whole answer"),
]
OF_ANSWERS: list[tuple[dict[str, Any], str, str]] = [
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens", "less than max_tokens"),
    ({"output_config": {"format": {"type": "json_object"}}}, "output_config.format.type", "must be json_schema"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema", "must be an object"),
    ({"output_format": {"type": "json_schema"}}, "output_format.schema", "must be an object"),
    ({"output_config": {"format": {}}, "output_format": {}}, "output_format", "give one of them"),
    ({"stop_sequences": ["x"] * 100}, "stop_sequences", "100 strings"),
    ({"temperature": 1.5}, "temperature", "less than or equal to 1"),
    ({"max_tokens": None}, "max_tokens", "must be an integer"),
]


async def test_what_is_wrong_is_named(
    subtests: pytest.Subtests, http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    for fields, param, words in [*REFUSED, *OF_ANSWERS]:
        with subtests.test(fields=fields, param=param, words=words):
            error = refused(await http.post(PATH, json={**BODY, **fields}), 400, "invalid_request_error")
            assert error["details"]["param"] == param, error
            assert words in error["message"]
            assert fleet.seen == []
            if (fields, param, words) in REFUSED:
                asked = {**ASKED, **{name: value for name, value in fields.items() if name != "max_tokens"}}
                counted = refused(await http.post(COUNT, json=asked), 400, "invalid_request_error")
                assert counted == error


async def test_there_may_not_be_more_blocks_than_are_looked_into(http: httpx2.AsyncClient) -> None:
    blocks = [{"type": "text", "text": "x"}] * (MAX_ENTRIES + 1)
    error = refused(await http.post(PATH, json={**BODY, **user(*blocks)}), 400, "invalid_request_error")
    assert error["message"] == f"messages[0].content has {MAX_ENTRIES + 1} blocks; the limit is {MAX_ENTRIES}"


# ---------------------------------------------------------------- models


async def test_models_have_anthropic_s_shape_for_who_asks_so(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    for name in ("ant", "bee", "cat"):
        await fleet.add_adapter(name, f"{name}-digest", num_virtual=100 if name == "bee" else 0)
    await fleet.add_adapter("gone", state="failed", reason="broken")
    http.headers["anthropic-version"] = "2026-10-21"
    page = (await http.get("/v1/models")).json()
    names = [held_to("model", model)["id"] for model in page["data"]]
    assert names == ["tiny/base", "ant", "bee", "cat"]
    assert (page["has_more"], page["first_id"], page["last_id"]) == (False, "tiny/base", "cat")
    # Virtual tokens of an adapter reduce the room for a prompt.
    assert [model["max_input_tokens"] for model in page["data"]] == [255, 255, 155, 255]
    assert (await http.get("/v1/models/bee")).json()["max_input_tokens"] == 155
    pages = []
    after: dict[str, str] = {}
    while True:
        page = (await http.get("/v1/models", params={"limit": "2", **after})).json()
        pages.append([model["id"] for model in page["data"]])
        if not page["has_more"]:
            break
        after = {"after_id": page["last_id"]}
    assert pages == [["tiny/base", "ant"], ["bee", "cat"]]
    page = (await http.get("/v1/models", params={"limit": "1", "before_id": "cat"})).json()
    assert ([model["id"] for model in page["data"]], page["has_more"]) == (["bee"], True)
    for stages, num in ((["active", "retired"], 4), (["retired"], 0)):
        assert len((await http.get("/v1/models", params={"lifecycle[]": stages})).json()["data"]) == num
    assert held_to("model", (await http.get("/v1/models/bee")).json())["id"] == "bee"
    assert (await http.get("/v1/models/base")).json()["max_input_tokens"] == 255
    for name in ("gone", "nobody"):
        refused(await http.get(f"/v1/models/{name}"), 404, "not_found_error")
    for query in ({"limit": "0"}, {"after_id": "nobody"}, {"after_id": "ant", "before_id": "cat"}):
        refused(await http.get("/v1/models", params=query), 400, "invalid_request_error")
    del http.headers["anthropic-version"]
    assert (await http.get("/v1/models")).json()["object"] == "list"
    assert (await http.get("/v1/models/nobody")).json()["error"]["code"] == "model_not_found"

"""Errors in requests are reported in OpenAI's format with the name of the field, before anything is queued."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from helpers.good_bodies import CHAT, COMPLETION
from helpers.scripted_fleet import MAX_MODEL_LEN, ScriptedFleet, gateway_client, running_gateway
from helpers.waiting import wait_until
from openai import AsyncOpenAI

from gateway.http.errors import retry_headers
from protocol.queue.bus import Bus
from protocol.wire.errors import BadRequest, Overloaded

GOOD = {
    "chat": ("/v1/chat/completions", CHAT),
    "completions": ("/v1/completions", COMPLETION),
    "embeddings": ("/v1/embeddings", {"model": "base", "input": "hi"}),
}
TOOL = {"type": "function", "function": {"name": "look"}}
TEXTS = {"completions": "prompt", "embeddings": "input"}
WRONG_TEXTS: list[Any] = [[5, "a"], ["a", 5], [[5], "a"], [[5], [True]], [None], {}, 5, None, [[]], [], [[[]]]]

DEEP = "[" * 200_000


def called(arguments: str) -> dict[str, Any]:
    """Return the field of a chat whose model has called a tool with arguments that are no JSON."""
    call = {"function": {"name": "f", "arguments": arguments}}
    return {"messages": [{"role": "assistant", "tool_calls": [call]}]}


BAD_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {"model": 5}, "model"),
    ("chat", {"messages": []}, "messages"),
    ("chat", {"messages": "hi"}, "messages"),
    ("chat", {"messages": ["hi"]}, "messages"),
    ("chat", {"messages": [{"content": "x"}]}, "messages[0].role"),
    ("chat", {"messages": [{"role": 5, "content": "x"}]}, "messages[0].role"),
    ("chat", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("chat", {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    ("chat", {"messages": [{"role": "tool", "content": None}]}, "messages[0].content"),
    ("chat", {"temperature": "hot"}, "temperature"),
    ("chat", {"temperature": 2.1}, "temperature"),
    ("chat", {"temperature": -0.1}, "temperature"),
    ("chat", {"temperature": True}, "temperature"),
    ("chat", {"top_p": 0}, "top_p"),
    ("chat", {"top_p": 1.5}, "top_p"),
    ("chat", {"top_k": -2}, "top_k"),
    ("chat", {"top_k": 1.5}, "top_k"),
    ("chat", {"min_p": 1.1}, "min_p"),
    ("chat", {"seed": "x"}, "seed"),
    ("chat", {"seed": 1 << 64}, "seed"),
    ("chat", {"n": 0}, "n"),
    ("chat", {"n": 1000}, "n"),
    ("chat", {"max_tokens": 0}, "max_tokens"),
    ("chat", {"max_completion_tokens": 0}, "max_completion_tokens"),
    ("chat", {"min_tokens": 20, "max_tokens": 10}, "min_tokens"),
    ("chat", {"presence_penalty": 3}, "presence_penalty"),
    ("chat", {"frequency_penalty": -3}, "frequency_penalty"),
    ("chat", {"repetition_penalty": 0}, "repetition_penalty"),
    ("chat", {"logit_bias": {"5": 101}}, "logit_bias"),
    ("chat", {"logit_bias": {"x": 1}}, "logit_bias"),
    ("chat", {"logit_bias": {"100000": 1}}, "logit_bias"),
    ("chat", {"logit_bias": [1]}, "logit_bias"),
    ("chat", {"stop": 3}, "stop"),
    ("chat", {"stop": ["a", 3]}, "stop"),
    ("chat", {"stop": ["a"] * 65}, "stop"),
    ("chat", {"stop": "a" * 1025}, "stop"),
    ("chat", {"stop_token_ids": [100000]}, "stop_token_ids"),
    ("chat", {"logprobs": 5}, "logprobs"),
    ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("chat", {"top_logprobs": 2}, "top_logprobs"),
    ("chat", {"stream": "yes"}, "stream"),
    ("chat", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("chat", {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ("chat", {"stream": True, "stream_options": 1}, "stream_options"),
    ("chat", {"merged_adapters": {"ids": ["a"]}}, "merged_adapters.weights"),
    ("chat", {"merged_adapters": {"ids": ["a"], "weights": [1e308]}}, "merged_adapters.weights"),
    ("chat", {"stream": True, "background": True}, "stream"),
    ("chat", {"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
    ("chat", {"response_format": {"type": "xml"}}, "response_format"),
    ("chat", {"response_format": {}}, "response_format"),
    ("chat", {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ("chat", {"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
    ("completions", {"structured_outputs": {}}, "structured_outputs"),
    ("completions", {"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs"),
    ("completions", {"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
    ("completions", {"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
    ("completions", {"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice"),
    ("completions", {"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
    ("completions", {"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ("completions", {"structured_outputs": {"grammar": "start: ("}}, "structured_outputs"),
    ("completions", {"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ("completions", {"structured_outputs": {"json": {"a": "b" * 70_000}}}, "structured_outputs.json"),
    (
        "completions",
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
    ),
    ("chat", {"modalities": ["audio"]}, "modalities"),
    ("chat", {"metadata": {"a": 1}}, "metadata"),
    ("chat", {"tools": [TOOL] * 129}, "tools"),
    ("completions", {"prompt": ""}, "prompt"),
    *((route, {name: wrong}, name) for route, name in TEXTS.items() for wrong in WRONG_TEXTS),
    ("completions", {"prompt": [1.5]}, "prompt"),
    ("completions", {"prompt": [100000]}, "prompt"),
    ("completions", {"prompt": [-1]}, "prompt"),
    ("completions", {"prompt": ["a"] * 100, "n": 2}, "n"),
    ("completions", {"logprobs": 21}, "logprobs"),
    ("completions", {"logprobs": True}, "logprobs"),
    ("completions", {"max_tokens": 0}, "max_tokens"),
    ("completions", {"best_of": 1, "n": 2}, "best_of"),
    ("completions", {"best_of": 129}, "best_of"),
    ("completions", {"best_of": 2, "stream": True}, "best_of"),
    ("completions", {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ("chat", {"messages": [{"role": "user", "content": "hi"}] * 2049}, "messages"),
    ("completions", {"suffix": "x"}, "suffix"),
    ("completions", {"echo": True, "max_tokens": 0, "background": True}, "max_tokens"),
    *(
        ("chat", called(wrong), "messages[0].tool_calls[0].function.arguments")
        for wrong in (DEEP, "[NaN]", '"\\ud800"')
    ),
    *(("chat", {"messages": [{"role": role, "content": "x"}]}, "messages[0].role") for role in (["user"], {"a": 1})),
    ("chat", {"messages": [{"role": "x" * 100_000, "content": "x"}]}, "messages[0].role"),
    ("chat", {"structured_outputs": {"json": DEEP}}, "structured_outputs.json"),
    ("chat", {"stop_token_ids": [5] * 500_000}, "stop_token_ids"),
    ("chat", {"logit_bias": {str(i): 999 for i in range(50_000)}}, "logit_bias"),
    *(("chat", {name: [5] * 500_000}, name) for name in ("model", "stop", "tools")),
    ("chat", {"merged_adapters": {"ids": [5] * 100_000, "weights": []}}, "merged_adapters.ids"),
]


async def test_browsers_are_let_in_from_the_origins_that_are_set(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    ours, other = {"origin": "https://ours.example"}, {"origin": "https://other.example"}
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    async with gateway_client(bus, model_folder, cors_origins="https://ours.example, https://too.example") as http:
        asked = await http.options("/v1/chat/completions", headers={**ours, **preflight})
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "https://ours.example"
        refused = await http.options("/v1/chat/completions", headers={**other, **preflight})
        assert "access-control-allow-origin" not in refused.headers
        for body, status in ((CHAT, 200), ({}, 400)):
            answer = await http.post("/v1/chat/completions", json=body, headers=ours)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == "https://ours.example"
            assert "x-request-id" in answer.headers["access-control-expose-headers"]


async def test_no_origin_is_let_in_by_default(http: httpx2.AsyncClient) -> None:
    answer = await http.post("/v1/chat/completions", json=CHAT, headers={"origin": "https://ours.example"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_a_wrong_field_is_400_with_its_name(http: httpx2.AsyncClient, fleet: ScriptedFleet, bus: Bus) -> None:
    wrong: list[str] = []
    for route, fields, param in BAD_FIELDS:
        path, good = GOOD[route]
        answer = await http.post(path, json={**good, **fields})
        assert answer.status_code == 400, (route, str(fields)[:200])
        error = answer.json()["error"]
        if (answer.status_code, error["type"], error["param"]) != (400, "invalid_request_error", param):
            wrong.append(f"{route} {str(fields)[:200]}: {answer.status_code} {error}")
        assert len(answer.content) < 4000
        assert answer.headers["x-should-retry"] == "false"
        assert answer.headers["x-request-id"]
    assert not wrong, "\n".join(wrong)
    assert fleet.seen == []
    assert await bus._redis.xlen(bus.keys.sub("interactive")) == 0


async def test_what_is_out_of_range_is_told_with_its_limit(subtests: pytest.Subtests, http: httpx2.AsyncClient) -> None:
    for fields, message in [
        ({"temperature": 2.5}, "temperature: input should be less than or equal to 2, not 2.5"),
        ({"n": 0}, "n: input should be greater than or equal to 1, not 0"),
        ({"seed": 1 << 90}, f"seed: it must be an integer from {-(1 << 63)} to {(1 << 63) - 1}, not 1.23794e+27"),
        ({"logit_bias": {"x": 1, "5": 1, "9y": 2}}, "the keys of logit_bias must be token ids, not 'x', '9y'"),
        ({"logit_bias": {"9" * 5000: 1}}, f"the keys of logit_bias must be token ids, not '{'9' * 30}"),
        ({"model": "x" * 2000}, "model: string should have at most 1100 characters, not 2000"),
    ]:
        with subtests.test(fields=fields, message=message):
            answer = await http.post("/v1/completions", json={**COMPLETION, **fields})
            assert answer.status_code == 400
            assert answer.json()["error"]["message"].startswith(message)


async def test_a_long_number_in_a_query_is_told_in_part(http: httpx2.AsyncClient) -> None:
    answer = await http.get(f"/v1/adapters?limit=1{'0' * 300}")
    message = f"limit: input should be less than or equal to 1000, not 1{'0' * 39}"
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({str(i): "" for i in range(17)}, "metadata has 17 entries; the limit is 16"),
        ({"k" * 65: ""}, "a key of metadata has 65 characters; the limit is 64"),
        ({"k": "v" * 513}, "a value of metadata has 513 characters; the limit is 512"),
    ],
)
async def test_metadata_has_openai_s_limits(http: httpx2.AsyncClient, metadata: dict[str, str], message: str) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        for background in (False, True):
            answer = await http.post(path, json={**body, "metadata": metadata, "background": background})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["message"]) == (400, "metadata", message)
    most = {f"{i:064}": "v" * 512 for i in range(16)}
    assert (await http.post("/v1/completions", json={**COMPLETION, "metadata": most})).status_code == 200


async def test_a_broken_body_is_a_client_error(subtests: pytest.Subtests, http: httpx2.AsyncClient) -> None:
    for body, content_type, status, word in [
        (b"{", "application/json", 400, "valid JSON"),
        (b'{"model": }', "application/json", 400, "character"),
        (b"", "application/json", 400, "JSON object"),
        (b"[]", "application/json", 400, "JSON object"),
        (b"null", "application/json", 400, "JSON object"),
        (b"\xff\xfe", "application/json", 400, ""),
        (b"[" * 100_000, "application/json", 400, ""),
        (b'{"model":"base","prompt":"hi","temperature":NaN}', "application/json", 400, "valid JSON"),
        (b'{"model":"base","prompt":"hi","temperature":1e999}', "application/json", 400, "infinity"),
        (b'{"model":"base","prompt":"\\ud800"}', "application/json", 400, "surrogate"),
        (b'{"model":"base","prompt":"hi","seed":' + b"9" * 5000 + b"}", "application/json", 400, ""),
        (b"model=base&prompt=hi", "application/x-www-form-urlencoded", 415, "must be JSON"),
        (b'{"model":"base","prompt":"hi"}', "text/plain", 415, "text/plain"),
    ]:
        with subtests.test(body=body, content_type=content_type, status=status, word=word):
            answer = await http.post("/v1/completions", content=body, headers={"content-type": content_type})
            error = answer.json()["error"]
            assert (answer.status_code, error["type"]) == (status, "invalid_request_error")
            assert word in error["message"]
            assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "unknown_url"),
        ("POST", "/v1/moderations", 404, "unknown_url"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("GET", "/v1/models/none/such", 404, "model_not_found"),
        ("GET", "/v1/jobs/job_none", 404, "job_not_found"),
        ("POST", "/v1/jobs/job_none/cancel", 404, "job_not_found"),
    ],
)
async def test_every_status_has_the_error_shape(
    http: httpx2.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    answer = await http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer.headers["x-request-id"].startswith("req_")


async def test_null_is_the_default(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fields = {"user": "me", "store": True, "prompt_cache_key": "k", "stop": None, "n": None, "temperature": None,
              "logprobs": None, "stream": None, "seed": None, "max_tokens": None}  # fmt: skip
    for path, good in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        assert (await http.post(path, json={**good, **fields})).status_code == 200
    assert [body.sampling.temperature for _, body in fleet.seen] == [1.0, 1.0]
    assert [body.max_new_tokens for _, body in fleet.seen] == [MAX_MODEL_LEN - fleet.seen[0][0].num_prompt_tokens, 16]


async def test_virtual_tokens_of_an_adapter_take_room_in_the_context(
    client: AsyncOpenAI, http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    """They use context and count for the scheduler, but not in usage; the base model keeps its whole context."""
    await fleet.add_adapter("soft", "d-soft", num_virtual=100)
    ids, room = [5] * 10, MAX_MODEL_LEN - 100
    answer = await client.completions.create(model="soft", prompt=ids, max_tokens=room - 10)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 10
    assert fleet.seen[-1][1].max_new_tokens == room - 10
    assert (fleet.seen[-1][0].num_virtual, fleet.seen[-1][0].num_prompt_tokens) == (100, 10)
    with pytest.raises(
        openai.BadRequestError, match=rf"{room} tokens. However, you requested {room + 1} tokens"
    ) as caught:
        await client.completions.create(model="soft", prompt=ids, max_tokens=room - 9)
    assert caught.value.code == "context_length_exceeded"
    await client.completions.create(model="base", prompt=ids, max_tokens=room - 9)
    assert fleet.seen[-1][0].num_virtual == 0
    with pytest.raises(openai.BadRequestError, match=f"context length is {room} tokens"):
        await client.chat.completions.create(model="soft", messages=[{"role": "user", "content": "q" * room}])
    shown = (await http.get("/v1/adapters/soft")).json()
    assert shown["virtual_tokens"] == 100


async def test_the_context_s_length_is_told_with_both_numbers(client: AsyncOpenAI, fleet: ScriptedFleet) -> None:
    ids = [5] * MAX_MODEL_LEN
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="base", prompt=ids)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "prompt"
    assert str(MAX_MODEL_LEN) in caught.value.message
    with pytest.raises(openai.BadRequestError, match="context length is 256 tokens") as caught:
        await client.chat.completions.create(model="base", messages=[{"role": "user", "content": "q" * 300}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError, match=r"260 tokens \(10 in the prompt, 250 in the completion\)"):
        await client.completions.create(model="base", prompt=[5] * 10, max_tokens=250)
    messages: Any = [{"role": "user", "content": "hi"}]
    for most in (256, 100_000, 1 << 31, (1 << 63) - 1):  # above the context length, any prompt gets the same message
        said = f"256 tokens, those of the prompt among them. However, max_tokens is {most}."
        with pytest.raises(openai.BadRequestError, match=re.escape(said)) as caught:
            await client.completions.create(model="base", prompt="hi", max_tokens=most)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")
        with pytest.raises(openai.BadRequestError, match=re.escape(said)):
            await client.chat.completions.create(model="base", messages=messages, max_completion_tokens=most)
    for least in (0, -1):
        with pytest.raises(openai.BadRequestError, match=f"max_tokens: input .* or equal to 1, not {least}"):
            await client.chat.completions.create(model="base", messages=messages, max_tokens=least)
    assert fleet.seen == []
    await client.completions.create(model="base", prompt=ids[1:])  # with room for a single token, the default is one
    assert fleet.seen[0][1].max_new_tokens == 1


async def test_unknown_models_and_refused_adapters(client: AsyncOpenAI, fleet: ScriptedFleet) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        await client.completions.create(model="nobody", prompt="hi")
    assert (not_found.value.code, not_found.value.param) == ("model_not_found", "model")
    await fleet.add_adapter("broken", state="failed", reason="rank 0")
    with pytest.raises(openai.UnprocessableEntityError, match="rank 0") as refused:
        await client.completions.create(model="broken", prompt="hi")
    assert refused.value.code == "adapter_refused"


async def test_a_downloading_adapter_is_waited_for(client: AsyncOpenAI, fleet: ScriptedFleet) -> None:
    await fleet.add_adapter("coming", state="downloading")
    async with asyncio.TaskGroup() as group:
        asked = group.create_task(client.completions.create(model="coming", prompt="hi"))
        await fleet.add_adapter("coming", "d9")
        await asked
    assert [submit.digest for submit, _ in fleet.seen] == ["d9"]


async def test_a_body_too_large_is_413(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    async with gateway_client(bus, model_folder, max_body_bytes=1000) as http:
        body = b'{"model":"base","prompt":"' + b"x" * 2000 + b'"}'

        async def parts() -> AsyncIterator[bytes]:
            for at in range(0, len(body), 100):
                yield body[at : at + 100]

        headers = {"content-type": "application/json"}
        for content in (body, parts()):
            answer = await http.post("/v1/completions", content=content, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert (await http.post("/v1/completions", json=COMPLETION)).status_code == 200


async def test_a_full_queue_is_429_with_a_time(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    fleet.assigning.clear()
    async with (
        running_gateway(bus, model_folder, max_queued=2) as gateway,
        AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="k", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError, match="the call makes 3 choices; the queue takes 2"):
            await client.completions.create(model="base", prompt="hi", n=3)
        waiting = asyncio.create_task(client.completions.create(model="base", prompt="hi"))

        async def is_queued() -> bool:
            return await bus._redis.xlen(bus.keys.sub("interactive")) == 1

        await wait_until(is_queued, "one request waits")
        with pytest.raises(openai.RateLimitError) as caught:
            await client.completions.create(model="base", prompt="hi", n=2)
        assert caught.value.code == "rate_limit_exceeded"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        assert caught.value.response.headers["x-should-retry"] == "true"
        assert await bus._redis.xlen(bus.keys.sub("interactive")) == 1
        fleet.assigning.set()
        assert (await waiting).choices[0].finish_reason
        jobs = await client.get("/jobs", cast_to=dict)  # type: ignore[type-var]
        assert jobs["data"] == []


def test_nobody_is_told_to_wait_for_longer_than_clients_do() -> None:
    assert [retry_headers(Overloaded("", wait_s))["retry-after"] for wait_s in (0.1, 59.5, 600.0)] == ["1", "60", "60"]
    assert "retry-after" not in retry_headers(BadRequest(""))


async def test_without_a_worker_calls_get_503(bus: Bus, model_folder: Path) -> None:
    async with gateway_client(bus, model_folder) as http:
        for method, path, body in (("POST", "/v1/chat/completions", CHAT), ("GET", "/v1/models", None)):
            answer = await http.request(method, path, json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_worker")
            assert answer.headers["retry-after"] == "2"
            assert answer.headers["x-should-retry"] == "true"
        assert (await http.get("/health")).status_code == 503


async def test_health_follows_the_workers(bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient) -> None:
    assert (await http.get("/health")).json() == {"status": "ready", "workers": 1}
    await bus._redis.delete(bus.keys.bases)

    async def is_down() -> bool:
        return (await http.get("/health")).status_code == 503

    await wait_until(is_down, "health says that nothing is served")

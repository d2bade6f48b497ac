"""Errors of `/v1/responses` name the parameter, and nothing is created."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from helpers.scripted_fleet import ScriptedFleet

from gateway.bodies.parameters import PARAMETERS_OF

PATH = "/v1/responses"
BODY: dict[str, Any] = {"model": "base", "input": "hi"}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c", "output": "1"}

REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({"input": None}, "input", None),
    ({"input": []}, "input", None),
    ({"input": [{"role": "king", "content": "x"}]}, "input[0].role", None),
    ({"input": [{"role": "user", "content": 1}]}, "input[0].content", None),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content", None),
    ({"input": [{"role": "user", "content": [{"type": {}}]}]}, "input[0].content", None),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", None),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type", None),
    ({"input": [{"type": "compaction", "encrypted_content": "x"}]}, "input[0].type", None),
    ({"input": [{"type": 5}]}, "input[0].type", None),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id", None),
    ({"input": [{"type": "item_reference", "id": f"msg_{'0' * 36}"}]}, "input", "item_not_found"),
    ({"input": [{"type": "item_reference", "id": f"msg_{i:032x}0000"} for i in range(17)]}, "input", "limit_exceeded"),
    ({"input": [CALL]}, "input", None),
    ({"input": [RESULT]}, "input", None),
    ({"input": [{**CALL, "arguments": "[1]"}, RESULT]}, "input[0].arguments", None),
    ({"input": [{**CALL, "arguments": "{"}, RESULT]}, "input[0].arguments", None),
    ({"input": [{**CALL, "nam": "g"}, RESULT]}, "input[0].nam", "unknown_parameter"),
    ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input[0].encrypted_content",
     "unsupported_parameter"),
    ({"input": [{"role": "user", "content": "x"}] * 2049}, "input", None),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "previous_response_not_found"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt", "unsupported_parameter"),
    ({"background": True, "store": False}, "store", None),
    ({"include": ["web_search_call.results"]}, "include", None),
    ({"top_logprobs": 3}, "top_logprobs", None),
    ({"include": ["message.output_text.logprobs"], "top_logprobs": 21}, "top_logprobs", None),
    ({"max_output_tokens": 0}, "max_output_tokens", None),
    ({"truncation": "some"}, "truncation", None),
    ({"service_tier": "priority"}, "service_tier", None),
    ({"metadata": {"a": "x" * 513}}, "metadata", None),
    ({"tools": [{"type": "house_search"}]}, "tools[0].type", None),
    ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0].type", None),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", None),
    ({"tools": [{"type": "function", "name": "f", "parameters": {"type": "array"}}]}, "tools[0].parameters", None),
    ({"tools": [{"type": "function", "name": "f", "function": {}}]}, "tools[0].function", "unknown_parameter"),
    ({"tool_choice": "required"}, "tool_choice", None),
    ({"tool_choice": "f"}, "tool_choice", None),
    ({"tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice.server_label", "unknown_parameter"),
    ({"tool_choice": {"type": "web_search"}}, "tool_choice.type", None),
    ({"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice",
     None),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type", None),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema", None),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "unsupported_parameter"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort", None),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", None),
    ({"model": "nobody"}, "model", "model_not_found"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_wrong_is_named(http: httpx2.AsyncClient, fleet: ScriptedFleet, stream: bool) -> None:
    for fields, param, code in REFUSED:
        answer = await http.post(PATH, json={**BODY, **fields, "stream": stream})
        assert answer.status_code == (404 if code == "model_not_found" else 400), (fields, answer.text)
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == (param, code), (fields, error)
    assert fleet.seen == []


async def test_neutral_values_of_what_is_refused_are_taken(http: httpx2.AsyncClient) -> None:
    neutral = {
        parameter.name: parameter.neutral[0] for parameter in PARAMETERS_OF["response"].values() if parameter.neutral
    }
    accepted = [name for name, parameter in PARAMETERS_OF["response"].items() if parameter.fate == "accepted"]
    answer = await http.post(PATH, json={**BODY, **neutral, **dict.fromkeys(accepted, "x"), "max_output_tokens": 3})
    assert answer.status_code == 200, answer.text


async def test_what_a_call_may_contain_is_taken_on_every_route(http: httpx2.AsyncClient) -> None:
    body = {**BODY, "max_output_tokens": 3, "include": ["reasoning.encrypted_content"]}
    given = [{"type": None, "role": "user", "content": "hi"}]
    made = await http.post(PATH, json={**body, "input": given})
    assert made.status_code == 200, made.text
    for path in ("", "/input_items"):
        asked = {"include[]": body["include"]}
        answer = await http.get(f"{PATH}/{made.json()['id']}{path}", params=asked)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "param"),
    [("?starting_after=3", "starting_after"), ("?include[]=file_search_call.results", "include"),
     ("?stream=true&starting_after=-1", "starting_after"), ("/input_items?limit=0", "limit"),
     ("/input_items?order=up", "order")],
)  # fmt: skip
async def test_wrong_questions_are_named(http: httpx2.AsyncClient, path: str, param: str) -> None:
    response = (await http.post(PATH, json={**BODY, "max_output_tokens": 3})).json()
    answer = await http.get(f"{PATH}/{response['id']}{path}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_a_stream_of_its_job_is_told_where_it_is(http: httpx2.AsyncClient) -> None:
    response = (await http.post(PATH, json={**BODY, "max_output_tokens": 3})).json()
    answer = await http.get(f"/v1/jobs/{response['id']}/stream")
    assert answer.status_code == 400
    assert f"{PATH}/{response['id']}?stream=true" in answer.json()["error"]["message"]

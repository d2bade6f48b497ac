"""Functions in namespaces: one name for models, two for clients, in whole answers, streams and stored items."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from helpers import response_events
from helpers.scripted_fleet import Script, ScriptedFleet

from gateway.bodies.parameter_check import IGNORED_HEADER
from gateway.openai.openai_bodies import MAX_TOOLS
from gateway.responses.tools import MAX_NAME

PATH = "/v1/responses"
SCHEMA = {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"], "additionalProperties": False}


def function(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "name": name, "description": "acts", "strict": False, "parameters": SCHEMA, **more}


def namespace(name: str, *tools: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "namespace", "name": name, "description": "Tools of a server.", "tools": list(tools), **more}


TOOLS = [
    function("act"),
    namespace("crm", function("act", defer_loading=True), function("list")),
    namespace("mcp__x__", function("act")),
]
CALLS = {
    "act": ("", "act"),
    "crm__act": ("crm", "act"),
    "crm__list": ("crm", "list"),
    "mcp__x__act": ("mcp__x__", "act"),
}
"""Name of a function for the model -> namespace and name in calls."""

BODY: dict[str, Any] = {"model": "base", "input": "hi", "tools": TOOLS}


def calls(fleet: ScriptedFleet, name: str) -> None:
    """Let the model call a function."""
    written = json.dumps({"name": name, "arguments": {"x": "y"}})
    fleet.script = lambda submit, body: Script(f"<tool_call>\n{written}\n</tool_call>", chunk=7)


async def test_calls_name_the_namespace_beside_the_function(agent: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    for flat, (space, name) in CALLS.items():
        calls(fleet, flat)
        whole = await agent.post(PATH, json=BODY)
        assert whole.status_code == 200, whole.text
        assert IGNORED_HEADER not in whole.headers
        response = response_events.held_to(whole.json())
        [call] = response["output"]
        assert (call.get("namespace", ""), call["name"], call["arguments"]) == (space, name, '{"x": "y"}')
        assert [tool["type"] for tool in response["tools"]] == ["function", "namespace", "namespace"]
        assert "namespace" not in call or space
        streamed = await agent.post(PATH, json={**BODY, "stream": True})
        [of_stream] = response_events.built(response_events.events_of(streamed.content))["output"]
        assert (of_stream.get("namespace", ""), of_stream["name"]) == (space, name)
        # Whoever reads it later finds the same, and may go on with it.
        assert (await agent.get(f"{PATH}/{response['id']}")).json()["output"] == response["output"]
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "done"}
        fleet.script = lambda submit, body: Script("Thanks.")
        for more in ({"previous_response_id": response["id"], "input": [result]}, {"input": [call, result]}):
            answer = await agent.post(PATH, json={**BODY, **more})
            assert answer.status_code == 200, answer.text
            assert fleet.prompt().count(flat) > fleet.prompt(0).count(flat)  # as written by the model


async def test_the_model_is_shown_every_function_and_once_the_namespace(
    agent: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    fleet.script = lambda submit, body: Script("Hello.")
    assert (await agent.post(PATH, json=BODY)).status_code == 200
    assert all(f'"{flat}"' in fleet.prompt() for flat in CALLS)
    assert fleet.prompt().count("Tools of a server.") == 2
    forced = {**BODY, "tool_choice": {"type": "function", "name": "crm__list"}}
    calls(fleet, "crm__list")
    [call] = (await agent.post(PATH, json=forced)).json()["output"]
    assert (call["namespace"], call["name"]) == ("crm", "list")
    none = {**BODY, "tools": [namespace("empty")]}
    fleet.script = lambda submit, body: Script("Hello.")
    assert (await agent.post(PATH, json=none)).status_code == 200


REFUSED: list[tuple[list[dict[str, Any]], str]] = [
    ([namespace("a b", function("f"))], "tools[0].name"),
    ([namespace("n" * (MAX_NAME + 1), function("f"))], "tools[0].name"),
    ([namespace("", function("f"))], "tools[0].name"),
    ([namespace("n", function("f" * (MAX_NAME + 1)))], "tools[0].tools[0].name"),
    ([function("f" * (MAX_NAME + 1))], "tools[0].name"),
    ([function("f"), namespace("n", function("a"), function("b c"))], "tools[1].tools[1].name"),
    ([namespace("n", function("a"), function("a"))], "tools[0].tools[1].name"),
    ([namespace("n", function("a__b")), namespace("n__a", function("b"))], "tools[1].tools[0].name"),
    ([function("n__a"), namespace("n", function("a"))], "tools[1].tools[0].name"),
    ([namespace("n", namespace("m", function("a")))], "tools[0].tools[0].type"),
    ([namespace("n", {"type": "custom", "name": "c"})], "tools[0].tools[0].type"),
    ([namespace("n", {"type": "web_search"})], "tools[0].tools[0].type"),
    ([namespace("n", function("a", parameters={"type": "array"}))], "tools[0].tools[0].parameters"),
    ([namespace("n", function("a", nam="b"))], "tools[0].tools[0].nam"),
    ([namespace("n", function("a"), nam="b")], "tools[0].nam"),
    ([namespace("n", function("a"), description=3)], "tools[0].description"),
    ([{"type": "namespace", "name": "n"}], "tools[0].tools"),
    ([{"type": "namespace", "name": "n", "tools": 3}], "tools[0].tools"),
    ([{"type": "namespace", "name": "n", "tools": {"a": 1}}], "tools[0].tools"),
    ([{"type": "namespace", "name": "n", "tools": [3]}], "tools[0].tools[0]"),
    ([namespace("n", *(function(f"f{i}") for i in range(MAX_TOOLS + 1)))], "tools"),
    ([namespace(f"n{j}", *(function(f"f{i}") for i in range(50))) for j in range(3)], "tools"),
    ([namespace("n", function("a", description="d" * 2_000_000))], "tools"),
    ([namespace("n", function("a"), description="d" * 2_000_000)], "tools"),
]


async def test_what_is_wrong_in_a_namespace_is_named(
    subtests: pytest.Subtests, agent: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    for tools, param in REFUSED:
        with subtests.test(param=param, tools=str(tools)[:60]):
            answer = await agent.post(PATH, json={**BODY, "tools": tools})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "namespace": 3}
    answer = await agent.post(PATH, json={**BODY, "input": [call]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[0].namespace")
    assert fleet.seen == []


async def test_as_many_functions_as_there_may_be(agent: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script("Hello.")
    most = [namespace("n", *(function(f"f{i}") for i in range(MAX_TOOLS)))]
    answer = await agent.post(PATH, json={**BODY, "tools": most})
    assert answer.status_code == 200, answer.text
    assert fleet.prompt().count("Tools of a server.") == 1

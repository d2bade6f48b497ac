"""Anthropic's client-side tools: shown to any model as functions, called by name, and constrained by a schema."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from helpers import anthropic_events
from helpers.scripted_fleet import Script, ScriptedFleet

from gateway.anthropic.client_tools import CLIENT_TOOLS
from gateway.bodies.parameter_check import IGNORED_HEADER
from gateway.bodies.parameters import CLIENT_TOOL_TYPES

PATH = "/v1/messages"
BODY: dict[str, Any] = {"model": "base", "max_tokens": 300, "messages": [{"role": "user", "content": "hi"}]}

CALLS: list[tuple[str, str, dict[str, Any]]] = [
    ("bash_20250124", "bash", {"command": "ls"}),
    ("bash_20241022", "bash", {"restart": True}),
    ("text_editor_20241022", "str_replace_editor", {"command": "undo_edit", "path": "/a"}),
    ("text_editor_20241022", "str_replace_editor",
     {"command": "insert", "path": "/a", "new_str": "x", "insert_line": 0}),
    ("text_editor_20250124", "str_replace_editor", {"command": "view", "path": "/a", "view_range": [1, -1]}),
    ("text_editor_20250429", "str_replace_based_edit_tool", {"command": "create", "path": "/a", "file_text": "x\n"}),
    ("text_editor_20250728", "str_replace_based_edit_tool",
     {"command": "str_replace", "path": "/a", "old_str": "helo", "new_str": "hello"}),
    ("text_editor_20250728", "str_replace_based_edit_tool",
     {"command": "insert", "path": "/a", "insert_line": 3, "insert_text": "x"}),
    ("memory_20250818", "memory", {"command": "rename", "old_path": "/memories/a", "new_path": "/memories/b"}),
]  # fmt: skip
"""Type and name of a tool, and the arguments of a call in the order of the schema."""


def calls(fleet: ScriptedFleet, name: str, given: dict[str, Any]) -> None:
    """Let the model call a tool."""
    written = json.dumps({"name": name, "arguments": given})
    fleet.script = lambda submit, body: Script(f"<tool_call>\n{written}\n</tool_call>", chunk=7)


def test_every_type_that_is_taken_is_known() -> None:
    assert sorted(CLIENT_TOOLS) == sorted(CLIENT_TOOL_TYPES)


async def test_a_model_calls_them_and_reads_their_results(
    subtests: pytest.Subtests, agent: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    assert {kind for kind, _, _ in CALLS} == set(CLIENT_TOOLS)
    for kind, name, given in CALLS:
        with subtests.test(tool=kind, given=given):
            body = {**BODY, "tools": [{"type": kind, "name": name, "cache_control": {"type": "ephemeral"}}]}
            calls(fleet, name, given)
            whole = await agent.post(PATH, json=body)
            assert whole.status_code == 200, whole.text
            assert IGNORED_HEADER not in whole.headers
            message = whole.json()
            [block] = message["content"]
            assert (block["type"], block["name"], block["input"]) == ("tool_use", name, given)
            assert message["stop_reason"] == "tool_use"
            assert str(CLIENT_TOOLS[kind]["description"])[:40] in fleet.prompt()
            streamed = await agent.post(PATH, json={**body, "stream": True})
            built = anthropic_events.built(anthropic_events.events_of(streamed.content))
            assert built["content"][0]["input"] == given
            result = {"type": "tool_result", "tool_use_id": block["id"], "content": "it is done"}
            turns = [{"role": "assistant", "content": [block]}, {"role": "user", "content": [result]}]
            fleet.script = lambda submit, body: Script("Thanks.")
            answer = await agent.post(PATH, json={**body, "messages": [*BODY["messages"], *turns]})
            assert answer.status_code == 200, answer.text
            assert "it is done" in fleet.prompt()


async def test_calls_are_held_to_what_is_documented(agent: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    """If a call is forced, the grammar of the request only allows the editor's documented commands."""
    tool = {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool", "max_characters": 10_000}
    calls(fleet, "str_replace_based_edit_tool", {"command": "view", "path": "/a"})
    answer = await agent.post(PATH, json={**BODY, "tools": [tool], "tool_choice": {"type": "any"}})
    assert answer.status_code == 200, answer.text
    grammar = json.dumps(fleet.seen[-1][1].grammar)
    assert all(word in grammar for word in ("str_replace", "insert_text", "view_range"))
    assert "undo_edit" not in grammar


async def test_a_client_may_say_itself_what_they_take(agent: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    tool = {
        "type": "bash_20250124",
        "name": "bash",
        "description": "Runs it on the moon.",
        "input_schema": {"type": "object", "properties": {"script": {"type": "string"}}},
    }
    calls(fleet, "bash", {"script": "ls"})
    answer = await agent.post(PATH, json={**BODY, "tools": [tool]})
    assert answer.status_code == 200, answer.text
    assert "Runs it on the moon." in fleet.prompt()
    assert "restart" not in fleet.prompt()


async def test_what_is_wrong_with_one_is_named(agent: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    bash = {"type": "bash_20250124", "name": "bash"}
    for tools, param in (
        ([{"type": "bash_20250124"}], "tools[0].name"),
        ([{**bash, "name": "a b"}], "tools[0].name"),
        ([bash, bash], "tools[1].name"),
        ([{**bash, "comand": 1}], "tools[0].comand"),
        ([{**bash, "defer_loading": True}], "tools[0].defer_loading"),
        ([{**bash, "input_schema": {"type": "array"}}], "tools[0].input_schema"),
        ([{**bash, "description": 3}], "tools[0].description"),
    ):
        answer = await agent.post(PATH, json={**BODY, "tools": tools})
        error = answer.json()["error"]
        assert (answer.status_code, error["details"]["param"]) == (400, param), answer.text
    assert fleet.seen == []

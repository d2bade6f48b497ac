"""Tools with schemas that grammars can't enforce, and hosted tools: served with a notice, or refused if strict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers import examples
from helpers.scripted_fleet import Script, ScriptedFleet, gateway_client, make_model_folder
from llguidance import LLMatcher

from gateway.bodies.parameter_check import IGNORED_HEADER
from gateway.grammars.schemas import STYLE
from gateway.tools.definitions import tools_of
from gateway.tools.loose import FORMATS, LOOSE_STYLE, MAX_LOOKED_AT, NOT_HELD, not_held, outline
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

# Keywords other than types that tools of users have, written by zod, pydantic or by hand.
KEYWORDS: dict[str, Any] = {
    "propertyNames": {"pattern": "^[a-z]+$"},
    "not": {"required": ["x"]},
    "if": {"required": ["x"]},
    "then": {},
    "else": {},
    "dependentRequired": {"x": ["y"]},
    "dependentSchemas": {"x": {}},
    "unevaluatedProperties": False,
}
BEYOND: list[dict[str, Any]] = [
    {"properties": {"x": {"type": "string", "pattern": "(?=a)b"}}},
    {"properties": {"x": {"type": "string", "pattern": "((a{1000}){1000}){1000}"}}},
    {"properties": {"x": {"$ref": "https://example.com/schema.json"}}},
    {"properties": {"x": {"type": "weird"}}},
    {"properties": {"x": {"type": "integer", "minimum": 5, "maximum": 3}}, "required": ["x"]},
    {"properties": {"x": {"enum": [f"choice {i}" for i in range(10_001)]}}},
    {"properties": {"x": {"description": "d" * 70_000}}},
    {"properties": {"x": {"x-guidance": {"lenient": True}}}, "x-guidance": {}},
    {"properties": 5},
    {"required": "x"},
    {"oneOf": [{"required": ["x"]}, {"required": ["y"]}], "properties": {"x": {}, "y": {}}},
    {"$schema": "http://json-schema.org/draft-07/schema#", "properties": {"x": {"exclusiveMinimum": 0, "const": 3}}},
]
CALL = '<tool_call>\n{"name": "act", "arguments": {"x": "y"}}\n</tool_call>'
USER = [{"role": "user", "content": "hi"}]


def body_of(path: str, schema: dict[str, Any], choice: str | None, **more: Any) -> dict[str, Any]:
    """Return a body for one of the routes with tools, with a tool of a schema. choice: auto, forced."""
    name = {"name": "act", "description": "acts"}
    if path == "/v1/messages":
        forced = {"type": "any" if choice == "forced" else choice}
        chosen = {} if choice is None else {"tool_choice": forced}
        return {"model": "base", "max_tokens": 200, "messages": USER, **chosen,
                "tools": [{**name, "input_schema": schema, **more}]}  # fmt: skip
    chosen = {} if choice is None else {"tool_choice": "required" if choice == "forced" else choice}
    if path == "/v1/responses":
        tool = {"type": "function", **name, "parameters": schema, **more}
        return {"model": "base", "input": "hi", "max_output_tokens": 60, "tools": [tool], **chosen}
    tool = {"type": "function", "function": {**name, "parameters": schema, **more}}
    if path == "/api/chat":
        return {"model": "base", "messages": USER, "tools": [tool], "stream": False}
    return {"model": "base", "messages": USER, "max_tokens": 200, "tools": [tool], **chosen}


ROUTES = ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/chat")


@pytest.mark.parametrize("path", examples.some(ROUTES, "/v1/chat/completions"))
async def test_no_keyword_of_a_schema_refuses_a_call(
    subtests: pytest.Subtests, agent: httpx2.AsyncClient, fleet: ScriptedFleet, path: str
) -> None:
    fleet.script = lambda submit, body: Script(CALL)
    where = "tools[0].input_schema" if path == "/v1/messages" else "tools[0].parameters"
    if path in ("/v1/chat/completions", "/api/chat"):
        where = "tools[0].function.parameters"
    for choice in (None, "auto", "forced"):
        for keyword, value in KEYWORDS.items():
            with subtests.test(choice=choice, keyword=keyword):
                schema = {"type": "object", "properties": {"x": {"type": "string"}}, keyword: value}
                answer = await agent.post(path, json=body_of(path, schema, choice))
                assert answer.status_code == 200, answer.text
                assert '"act"' in answer.text
                assert answer.headers[IGNORED_HEADER] == f"{where}: {keyword}"


@pytest.mark.parametrize("path", examples.some(ROUTES, "/v1/responses"))
async def test_no_schema_refuses_a_call(
    subtests: pytest.Subtests, agent: httpx2.AsyncClient, fleet: ScriptedFleet, path: str
) -> None:
    fleet.script = lambda submit, body: Script(CALL)
    for number, fields in enumerate(BEYOND):
        with subtests.test(number=number):
            answer = await agent.post(path, json=body_of(path, {"type": "object", **fields}, "forced"))
            assert answer.status_code == 200, answer.text
            told = answer.headers.get(IGNORED_HEADER, "")
            assert bool(told) == (number < 10), told


@pytest.mark.parametrize("path", examples.some([path for path in ROUTES if path != "/api/chat"], "/v1/responses"))
async def test_strict_tools_are_refused_by_keyword(
    subtests: pytest.Subtests, agent: httpx2.AsyncClient, fleet: ScriptedFleet, path: str
) -> None:
    for choice in (None, "auto", "forced"):
        for keyword, value in KEYWORDS.items():
            with subtests.test(choice=choice, keyword=keyword):
                schema = {"type": "object", "properties": {"x": {"type": "string"}}, keyword: value}
                answer = await agent.post(path, json=body_of(path, schema, choice, strict=True))
                assert answer.status_code == 400, answer.text
                message = answer.json()["error"]["message"]
                assert keyword in message
                assert "args_0" not in message  # no detail of the grammar made from the schema
    assert fleet.seen == []


def keywords(schema: dict[str, Any]) -> list[str]:
    return not_held(schema, MAX_LOOKED_AT)[0]


def test_keywords_are_looked_for_within_a_limit() -> None:
    """All tools share the limit, whatever their number and size; schemas beyond it are enforced where possible."""
    wide = {"anyOf": [{"not": {}} for _ in range(4 * MAX_LOOKED_AT)]}
    assert not_held(wide, MAX_LOOKED_AT) == (["not"], MAX_LOOKED_AT)
    assert not_held(wide, 0) == ([], 0)
    deep: dict[str, Any] = {"if": {}}
    for _ in range(50):
        deep = {"items": deep}
    assert not_held(deep, MAX_LOOKED_AT) == (["if"], 51)


def test_keywords_are_known_as_the_compiler_knows_them() -> None:
    """The list of unsupported keywords equals the compiler's."""

    def refused(schema: dict[str, Any]) -> bool:
        return LLMatcher.validate_grammar_with_warnings(
            LLMatcher.grammar_from_json_schema({**schema, STYLE: {"lenient": False}})
        )[0]  # fmt: skip

    for keyword in NOT_HELD:
        assert refused({keyword: {}}), keyword
        assert keywords({"items": {"properties": {"a": {keyword: {}}, "not": {}}}}) == [keyword]
    for form in FORMATS:
        assert not refused({"format": form}), form
        assert keywords({"format": form}) == []
    assert refused({"format": "regex"})
    assert keywords({"anyOf": [{"format": "regex"}]}) == ["format"]
    assert keywords({"enum": [{"not": 1}], "default": {"if": 1}, "properties": {"if": {}, "format": {}}}) == []


def test_what_is_left_of_a_schema_can_always_be_held() -> None:
    for fields in (*BEYOND, KEYWORDS, {"properties": {"a>b": {}, "": 5}}):
        made = outline({"type": "object", **fields})
        assert LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(made)) == "", fields
        assert made[STYLE] == LOOSE_STYLE
    kept = outline({"properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["b", "c", 3]})
    assert kept["properties"] == {"a": {"type": "string"}, "b": {}, "c": {}}
    assert (kept["required"], kept["additionalProperties"]) == (["b", "c"], False)


def test_tools_stay_bounded_whatever_their_schemas() -> None:
    function = {"name": "f", "parameters": {"type": "object", "not": {"description": "d" * (1 << 20)}}}
    with pytest.raises(BadRequest, match=r"tools has \d+ bytes; the limit is 1048576"):
        tools_of([{"type": "function", "function": function}], "auto", None, Settings())


async def test_arguments_in_tags_of_a_schema_that_tags_cannot_say(
    bus: Bus, fleet: ScriptedFleet, tmp_path: Path
) -> None:
    """A model that writes arguments in tags: strings stay strings, the rest is JSON."""
    template = Path(__file__).parent.parent / "templates" / "qwen_coder.jinja"
    folder = make_model_folder(tmp_path / "model", template.read_text())
    fleet.max_model_len = 4096
    await fleet.register()
    values = "<parameter=x>\ny\n</parameter>\n<parameter=z>\n3\n</parameter>\n"
    text = f"<tool_call>\n<function=act>\n{values}</function>\n</tool_call>"
    fleet.script = lambda submit, body: Script(text)
    schema = {"type": "object", "properties": {"x": {"type": "string"}, "z": {"type": "integer"}}, "not": {}}
    async with gateway_client(bus, folder) as http:
        answer = await http.post(ROUTES[0], json=body_of(ROUTES[0], schema, "forced"))
    [call] = answer.json()["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"x": "y", "z": 3}


# ---------------------------------------------------------------- hosted tools

OF_RESPONSES = ({"type": "web_search"}, {"type": "tool_search"}, {"type": "mcp"})
OF_MESSAGES = (
    {"type": "web_search_20250305", "name": "web_search"},
    {"type": "code_execution_20250825", "name": "c"},
    {"type": "computer_20250124", "name": "computer", "display_width_px": 1024},
    {"type": "bash_20991231", "name": "bash"},  # with unknown parameters
)


def num_read(usage: dict[str, int]) -> int:
    """Return the number of prompt tokens, including cached ones."""
    return usage["input_tokens"] + usage.get("cache_read_input_tokens", 0)


async def test_hosted_tools_are_left_out_and_told(agent: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "string"}}}
    for path, hosted in (("/v1/responses", OF_RESPONSES), ("/v1/messages", OF_MESSAGES)):
        alone = body_of(path, schema, None)
        prompt = num_read((await agent.post(path, json=alone)).json()["usage"])
        for tool in hosted:
            body = {**alone, "tools": [tool, *alone["tools"]]}
            answer = await agent.post(path, json=body)
            assert answer.status_code == 200, answer.text
            assert answer.headers[IGNORED_HEADER] == f"tools[0] ({tool['type']})"
            assert num_read(answer.json()["usage"]) == prompt
            if path == "/v1/responses":
                assert [shown["type"] for shown in answer.json()["tools"]] == ["function"]
            nothing = await agent.post(path, json={**body, "tools": [tool]})
            assert nothing.status_code == 200, nothing.text
            forced = {**body, "tools": [tool], "tool_choice": body_of(path, schema, "forced")["tool_choice"]}
            assert (await agent.post(path, json=forced)).json()["error"]["message"] == "tool_choice needs tools"
        # A wrong tool next to them is named by its own index.
        wrong = await agent.post(path, json={**alone, "tools": [hosted[0], {**alone["tools"][0], "name": "a b"}]})
        assert "tools[1].name" in wrong.json()["error"]["message"]


async def test_hosted_tools_are_refused_where_the_setting_says_so(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    async with gateway_client(bus, model_folder, hosted_tools="refuse") as http:
        for path, tool, why in (
            ("/v1/responses", OF_RESPONSES[0], "it runs at OpenAI"),
            ("/v1/messages", OF_MESSAGES[0], "it runs at Anthropic"),
            ("/v1/messages", OF_MESSAGES[2], "only Anthropic's models are trained on its parameters"),
            ("/v1/messages", OF_MESSAGES[3], "only Anthropic's models are trained on its parameters"),
        ):
            answer = await http.post(path, json={**body_of(path, {}, None), "tools": [tool]})
            assert answer.status_code == 400
            assert f"tools of type '{tool['type']}' are not supported: {why}" in answer.text


# ---------------------------------------------------------------- requests of agents


async def test_a_body_of_codex(agent: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    schema = {"type": "object", "properties": {"command": {"type": "array", "items": {"type": "string"}}},
              "required": ["command"], "additionalProperties": False}  # fmt: skip
    body = {
        "model": "base",
        "instructions": "You are a coding agent.",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "be brief"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        ],
        "tools": [
            {"type": "function", "name": "shell", "description": "runs", "strict": False, "parameters": schema},
            {"type": "tool_search", "execution": "client", "description": "finds", "parameters": {}},
            {"type": "web_search", "external_web_access": False},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01995c2c",
        "client_metadata": {"x-codex-installation-id": "01995c2c"},
        "text": {"verbosity": "low"},
    }
    answer = await agent.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers[IGNORED_HEADER] == "tools[1] (tool_search), tools[2] (web_search)"
    assert "response.completed" in answer.text


async def test_a_body_of_claude_code(agent: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(CALL)
    cached = {"type": "ephemeral", "ttl": "1h"}
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "x": {"type": "string", "description": "a path"},
            "limit": {"type": "integer", "exclusiveMinimum": 0, "maximum": 9007199254740991},
            "mode": {"anyOf": [{"const": "a"}, {"type": "string", "enum": ["b"]}, {"type": "null"}]},
            "answers": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {}},
            "url": {"type": "string", "format": "uri"},
        },
        "required": ["x"],
        "additionalProperties": False,
    }
    body = {
        "model": "base",
        "max_tokens": 200,
        "stream": True,
        "betas": ["interleaved-thinking-2025-05-14"],
        "metadata": {"user_id": "user_1_account__session_2"},
        "system": [
            {"type": "text", "text": "You are an agent."},
            {"type": "text", "text": "More.", "cache_control": cached},
        ],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": cached}]}],
        "tools": [
            {"name": "act", "description": "acts", "input_schema": schema, "eager_input_streaming": True},
            {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
        ],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "medium"},
    }
    body["max_tokens"] = 2000
    answer = await agent.post("/v1/messages?beta=true", json=body, headers={"anthropic-beta": "claude-code-20250219"})
    assert answer.status_code == 200, answer.text
    told = answer.headers[IGNORED_HEADER]
    assert told == "tools[1] (web_search_20250305), tools[0].input_schema: propertyNames, thinking"
    assert "input_json_delta" in answer.text
    counted = await agent.post("/v1/messages/count_tokens", json={k: body[k] for k in ("model", "messages", "tools")})
    assert counted.status_code == 200, counted.text
    assert (await agent.head("/")).status_code == 200

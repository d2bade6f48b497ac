"""Converts tools of the Responses API, including functions in namespaces, to those of chats. Pure.

A namespace is a group of functions; a call names both. Chat templates do not know namespaces: there the function's name
joins both, and calls are split again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from gateway.grammars.limits import check_num
from gateway.grammars.schemas import is_strict
from gateway.openai.openai_bodies import MAX_TOOLS
from gateway.responses.response_bodies import PromptRequest
from gateway.tools.definitions import Tools, ToolWords, check_name, tools_of
from protocol.runtime.settings import Settings
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest

HOSTED = frozenset(
    {
        "web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11", "file_search",
        "code_interpreter", "image_generation", "mcp", "computer", "computer_use_preview", "local_shell", "shell",
        "apply_patch", "tool_search",
    }
)  # fmt: skip
"""Types of tools that OpenAI runs, or that only its models are trained to call."""

MAX_NAME = 64
"""Maximum characters of the name of a function or namespace."""

_BETWEEN = "__"
WORDS = ToolWords(name=".name", schema=".parameters", max_name=2 * MAX_NAME + len(_BETWEEN))


def flat_name(namespace: str, name: str) -> str:
    """Return the name of a namespace's function in templates and model outputs."""
    return f"{namespace}{name}" if namespace.endswith(_BETWEEN) else f"{namespace}{_BETWEEN}{name}"


def is_hosted(tool: Mapping[str, Any]) -> bool:
    """Return whether a tool is one that clients do not run."""
    kind = tool.get("type")
    return isinstance(kind, str) and kind in HOSTED


def shown_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool as repeated in the response."""
    if tool.get("type") == "namespace":
        return {**tool, "description": tool.get("description") or ""}
    return {"description": None, "strict": None, "parameters": None, **tool}


def tools_in(request: PromptRequest, settings: Settings) -> Tools | None:
    """Return the functions that may be called, None if none. Raises BadRequest for unsupported tools."""
    check_num(len(request.tools or ()), MAX_TOOLS, "entries", "tools")
    spaces = [tool for tool in request.tools or () if tool.get("type") == "namespace"]
    within = sum(len(space["tools"]) for space in spaces if isinstance(space.get("tools"), list))
    num = len(request.tools or ()) - len(spaces) + within
    check_num(num, MAX_TOOLS, "entries, including those in namespaces", "tools")
    given: list[dict[str, Any]] = []
    places: list[str] = []
    namespaces: dict[str, tuple[str, str]] = {}
    for i, tool in enumerate(request.tools or ()):
        if settings.hosted_tools == "leave_out" and is_hosted(tool):
            continue
        if tool.get("type") != "namespace":
            given.append(_definition(tool, f"tools[{i}]"))
            places.append(f"tools[{i}]")
            continue
        for place, name, definition in _within(tool, f"tools[{i}]"):
            given.append(definition)
            places.append(place)
            namespaces.setdefault(definition["function"]["name"], (tool["name"], name))
    tools = tools_of(given, _choice(request.tool_choice), request.parallel_tool_calls, settings, WORDS, places)
    return replace(tools, namespaces=namespaces) if tools is not None else None


def _within(namespace: Mapping[str, Any], place: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the functions of a namespace: body path, name in the namespace, and definition for chats.

    Only the first one's description contains the namespace's description: repeated in each, it would use many tokens.
    """
    tools, about = namespace.get("tools"), namespace.get("description")
    check_name(namespace.get("name"), f"{place}.name", MAX_NAME)
    if not isinstance(about, str | None):
        raise BadRequest(f"{place}.description must be a string", param=f"{place}.description")
    if not isinstance(tools, list):
        raise BadRequest(f"{place}.tools must be a list of functions", param=f"{place}.tools")
    for i, tool in enumerate(tools):
        where = f"{place}.tools[{i}]"
        if not isinstance(tool, dict):
            raise BadRequest(f"{where} must be an object", param=where)
        definition = _definition(tool, where)
        function, name = definition["function"], tool["name"]
        function["name"] = flat_name(namespace["name"], name)
        if about and i == 0:
            intro = f"[{namespace['name']}: {about}]"
            function["description"] = "\n\n".join(filter(None, [intro, function.get("description")]))
        yield where, name, definition


def _definition(tool: dict[str, Any], place: str) -> dict[str, Any]:
    """Return a tool's definition for chats. Raises BadRequest."""
    kind = tool.get("type")
    if kind != "function":
        why = "it runs at OpenAI"
        if kind == "custom":
            why = "tools of this type are not allowed in a namespace: use a function"
        elif kind == "namespace":
            why = "a namespace has functions, and no other namespaces"
        raise BadRequest(f"{place}: tools of type {brief(kind)} are not supported: {why}", param=f"{place}.type")
    check_name(tool.get("name"), f"{place}.name", MAX_NAME)
    if not isinstance(tool.get("description"), str | None):
        raise BadRequest(f"{place}.description must be a string", param=f"{place}.description")
    is_strict(tool, place)
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


def _choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """Return a `tool_choice` in the form of chats. Raises BadRequest."""
    if isinstance(choice, str) and choice not in ("none", "auto", "required"):
        text = f"tool_choice must be none, auto or required, or name a function, not {brief(choice)}"
        raise BadRequest(text, param="tool_choice")
    if not isinstance(choice, dict):
        return choice
    kind = choice.get("type")
    if kind == "function":
        return {"type": kind, "function": {"name": choice.get("name")}}
    if kind == "allowed_tools":
        tools = choice.get("tools")
        named = [_choice(tool) if isinstance(tool, dict) else tool for tool in tools] if isinstance(tools, list) else []
        return {"type": kind, "allowed_tools": {"mode": choice.get("mode"), "tools": named}}
    text = f"tool_choice of type {brief(kind)} is not supported; there is function, and allowed_tools"
    raise BadRequest(text, param="tool_choice.type")

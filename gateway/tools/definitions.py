"""The tools of a request: their definitions, and which of them may or must be called. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.grammars.limits import MAX_TIMES, check_num
from gateway.grammars.structured import checked_schema, is_strict
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

_NAME = re.compile(r"[a-zA-Z0-9_-]+")


@dataclass(frozen=True, slots=True)
class ToolWords:
    """What an API calls the parts of a tool that is refused, and how long its name may be."""

    name: str = ".function.name"
    schema: str = ".function.parameters"
    max_name: int = 64


OPENAI_WORDS = ToolWords()


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools that a request may call."""

    definitions: list[dict[str, Any]]  # as the client sent them, for the template
    schemas: dict[str, dict[str, Any]]  # of the arguments, by name
    required: bool  # at least one call must come
    parallel: bool  # more than one may
    num_bytes: int  # of all definitions as JSON

    @property
    def names(self) -> list[str]:
        """The names, in the client's order."""
        return list(self.schemas)


def tools_of(
    tools: Sequence[dict[str, Any]] | None, choice: str | dict[str, Any] | None, parallel: bool | None,
    settings: Settings, words: ToolWords = OPENAI_WORDS,
) -> Tools | None:  # fmt: skip
    """Return the tools, as OpenAI has them, that a request may call; None for none.

    Raises BadRequest naming the wrong field in the API's words.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise BadRequest("tool_choice needs tools", param="tool_choice")
        return None
    num_bytes = sum(len(orjson.dumps(tool)) for tool in tools)
    check_num(num_bytes, MAX_TIMES * settings.max_grammar_bytes, "bytes", "tools")
    schemas: dict[str, dict[str, Any]] = {}
    for i, tool in enumerate(tools):
        name, schema = _definition(tool, f"tools[{i}]", settings, words)
        if name in schemas:
            raise BadRequest(f"tools[{i}]{words.name}: {name!r} is there twice", param=f"tools[{i}]{words.name}")
        schemas[name] = schema
    wanted, required = _chosen(choice, list(schemas))
    if not wanted:
        return None
    one = choice in schemas if isinstance(choice, str) else choice is not None and choice.get("type") == "function"
    chosen = {name: schemas[name] for name in wanted}
    return Tools(list(tools), chosen, required, parallel is not False and not one, num_bytes)


def _definition(tool: dict[str, Any], place: str, settings: Settings, words: ToolWords) -> tuple[str, dict[str, Any]]:
    """Return a tool's name and the schema of its arguments."""
    if tool.get("type") != "function":
        raise BadRequest(f"{place}.type must be function, not {tool.get('type')!r}", param=f"{place}.type")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise BadRequest(f"{place}.function must be an object", param=f"{place}.function")
    name = function.get("name")
    if not isinstance(name, str) or len(name) > words.max_name or not _NAME.fullmatch(name):
        message = f"{place}{words.name} must be 1 to {words.max_name} letters, digits, _ or -"
        raise BadRequest(message, param=f"{place}{words.name}")
    parameters, where = function.get("parameters"), f"{place}{words.schema}"
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    schema = checked_schema(parameters, where, settings, strict=is_strict(function, f"{place}.function"))
    if schema.get("type", "object") != "object":
        raise BadRequest(f"{where}.type must be object, not {schema['type']!r}", param=where)
    return name, {**schema, "type": "object"}


def _chosen(choice: str | dict[str, Any] | None, names: list[str]) -> tuple[list[str], bool]:
    """Return the tools that a `tool_choice` allows, and whether one of them must be called."""
    if choice is None or choice == "auto":
        return names, False
    if choice == "none":
        return [], False
    if choice == "required":
        return names, True
    if isinstance(choice, str) and choice in names:  # as LoRAX has it
        return [choice], True
    if isinstance(choice, dict) and choice.get("type") == "function":
        return [_known(choice, names)], True
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools")
        tools = allowed.get("tools") if isinstance(allowed, dict) else None
        mode = allowed.get("mode") if isinstance(allowed, dict) else None
        if not isinstance(tools, list) or not tools or mode not in ("auto", "required"):
            raise BadRequest(
                "tool_choice.allowed_tools must have tools, and a mode: auto or required", param="tool_choice"
            )
        check_num(len(tools), len(names), "tools, and there are fewer", "tool_choice.allowed_tools")
        return [_known(tool, names) for tool in tools], mode == "required"
    raise BadRequest(
        f"tool_choice must be auto, none, required or a function's name in an object, not {choice!r}",
        param="tool_choice",
    )


def _known(tool: Any, names: list[str]) -> str:
    """Return the name of a tool that a `tool_choice` names. Raises BadRequest if it is none of the tools."""
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if name not in names:
        raise BadRequest(f"tool_choice names {name!r}, which is none of the tools", param="tool_choice")
    return name

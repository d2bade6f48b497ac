"""The tools of a request: their definitions, and which of them may or must be called. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import orjson

from gateway.grammars.limits import MAX_TIMES, check_num, too_many
from gateway.grammars.schemas import JSON_STYLE, checked_schema, is_strict
from gateway.tools.loose import LOOSE_STYLE, MAX_LOOKED_AT, not_held, outline
from protocol.runtime.settings import Settings
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest

_NAME = re.compile(r"[a-zA-Z0-9_-]+")


@dataclass(frozen=True, slots=True)
class ToolWords:
    """An API's field names of a tool, for errors, and its limit of a name's length."""

    name: str = ".function.name"
    schema: str = ".function.parameters"
    max_name: int = 64


OPENAI_WORDS = ToolWords()


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools that the model may call."""

    definitions: list[dict[str, Any]]  # as sent by the client, for the template
    schemas: dict[str, dict[str, Any]]  # argument schemas by tool name
    required: bool  # True: at least one call is required
    parallel: bool  # True: several calls are allowed
    num_bytes: int  # bytes of all definitions as JSON
    strict: frozenset[str] = frozenset()  # names of tools whose schemas must be enforced completely
    not_held: Sequence[str] = ()  # body paths and keywords of schemas that are not enforced
    namespaces: Mapping[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    """Tool -> its namespace and its name there, if the API has namespaces."""

    @property
    def names(self) -> list[str]:
        """The tools' names, in the client's order."""
        return list(self.schemas)

    def outlined(self) -> Tools | None:
        """Return the tools with the schemas of non-strict ones replaced by outlines; None if all are strict."""
        loose = {name: outline(schema) for name, schema in self.schemas.items() if name not in self.strict}
        return replace(self, schemas=self.schemas | loose) if loose else None


class _Definition(NamedTuple):
    """A tool as a request defines it."""

    name: str
    parameters: Any  # unchecked schema of its arguments
    function: dict[str, Any]  # the object that defines it
    place: str  # location of the function in the body
    schema_place: str


class _Tool(NamedTuple):
    """A tool that a request may call."""

    name: str
    schema: dict[str, Any]  # schema of its arguments, as in the grammar
    is_strict: bool
    place: str  # location of its schema in the body
    given: dict[str, Any] | None  # the schema as sent; None if only its outline is enforced


def tools_of(
    tools: Sequence[dict[str, Any]] | None,
    choice: str | dict[str, Any] | None,
    parallel: bool | None,
    settings: Settings,
    words: ToolWords = OPENAI_WORDS,
    places: Sequence[str] | None = None,
) -> Tools | None:
    """Return the tools that the model may call, None if none. tools: in OpenAI's form.

    places: body path of each tool, None if they are the body's `tools`. Raises BadRequest naming the field in the API's
    terms.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise BadRequest("tool_choice needs tools", param="tool_choice")
        return None
    num_bytes, most = sum(len(orjson.dumps(tool)) for tool in tools), MAX_TIMES * settings.max_grammar_bytes
    if num_bytes > most:
        raise too_many(num_bytes, most, "bytes", "tools")
    given: dict[str, _Definition] = {}
    for place, tool in zip(places or [f"tools[{i}]" for i in range(len(tools))], tools, strict=True):
        definition = _definition(tool, place, words)
        if definition.name in given:
            raise BadRequest(f"{place}{words.name}: {definition.name!r} is defined twice", param=f"{place}{words.name}")
        given[definition.name] = definition
    wanted, required = _chosen(choice, list(given))
    known = _checked(given.values(), settings)
    if not wanted:
        return None
    one = choice in known if isinstance(choice, str) else choice is not None and choice.get("type") == "function"
    chosen = {name: known[name] for name in wanted}
    return Tools(
        list(tools),
        {name: tool.schema for name, tool in chosen.items()},
        required,
        parallel is not False and not one,
        num_bytes,
        frozenset(name for name, tool in chosen.items() if tool.is_strict),
        _not_held(chosen.values()),
    )


def check_name(name: Any, place: str, most: int) -> str:
    """Return a tool's name. Raises BadRequest if it is invalid. most: maximum characters."""
    if not isinstance(name, str) or len(name) > most or not _NAME.fullmatch(name):
        raise BadRequest(f"{place} must be 1 to {most} letters, digits, _ or -", param=place)
    return name


def _definition(tool: dict[str, Any], place: str, words: ToolWords) -> _Definition:
    """Return a tool as a request defines it. Raises BadRequest."""
    if tool.get("type") != "function":
        raise BadRequest(f"{place}.type must be function, not {brief(tool.get('type'))}", param=f"{place}.type")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise BadRequest(f"{place}.function must be an object", param=f"{place}.function")
    name = check_name(function.get("name"), f"{place}{words.name}", words.max_name)
    parameters, where = function.get("parameters"), f"{place}{words.schema}"
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if isinstance(parameters, dict) and parameters.get("type", "object") != "object":
        raise BadRequest(f"{where}.type must be object, not {brief(parameters['type'])}", param=where)
    return _Definition(name, parameters, function, f"{place}.function", where)


def _checked(definitions: Iterable[_Definition], settings: Settings) -> dict[str, _Tool]:
    """Return validated tools by name. Raises BadRequest."""
    tools: dict[str, _Tool] = {}
    for name, given, function, function_place, place in definitions:
        strict = is_strict(function, function_place)
        style = JSON_STYLE if strict else LOOSE_STYLE
        try:
            schema = checked_schema(given, place, settings, style, strict=strict)
            tools[name] = _Tool(name, {**schema, "type": "object"}, strict, place, given)
        except BadRequest:
            if strict or not isinstance(given, dict):
                raise
            tools[name] = _Tool(name, outline(given), False, place, None)  # beyond the limits of grammars
    return tools


def _not_held(tools: Iterable[_Tool]) -> list[str]:
    """Return the body paths and keywords of tools' schemas that are not enforced, as far as they are searched."""
    ignored: list[str] = []
    left = MAX_LOOKED_AT
    for tool in tools:
        if tool.given is None:
            ignored.append(tool.place)
        elif not tool.is_strict:
            keywords, num = not_held(tool.given, left)
            ignored += [f"{tool.place}: {keyword}" for keyword in keywords]
            left -= num
    return ignored


def _chosen(choice: str | dict[str, Any] | None, names: list[str]) -> tuple[list[str], bool]:
    """Return the tools that a `tool_choice` allows, and whether a call is required. Raises BadRequest."""
    if choice is None or choice == "auto":
        return names, False
    if choice == "none":
        return [], False
    if choice == "required":
        return names, True
    if isinstance(choice, str) and choice in names:  # LoRAX's form
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
        check_num(len(tools), len(names), "tools, but fewer are given", "tool_choice.allowed_tools")
        return [_known(tool, names) for tool in tools], mode == "required"
    raise BadRequest(
        f"tool_choice must be auto, none, required or a function's name in an object, not {brief(choice)}",
        param="tool_choice",
    )


def _known(tool: Any, names: list[str]) -> str:
    """Return the name of the tool in a `tool_choice`. Raises BadRequest if it is not among the tools."""
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if name not in names:
        raise BadRequest(f"tool_choice names {brief(name)}, which is not among the tools", param="tool_choice")
    return name

"""Tool calls: what a request says of them, how a template wants them written, the grammar that sees to it.

Pure. A model learns one way to write calls with its chat template; the way is read off the template. Every answer that
may hold a call follows a grammar, so that what is called exists and its arguments are what its schema says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from gateway.text.structured import Constraint, checked_schema, lark_regex, lark_string
from gateway.tools.xml_calls import RAW_VALUE_RULES, arguments_rules
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

MarkerId = Callable[[str], int | None]
"""The id of a marker that is one token, added to the vocabulary; None for others."""


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """How calls are written: prefix, each as open, a body, close, with `between`; suffix."""

    marker: str  # text that only calls begin with; "": calls begin the answer
    prefix: str
    open: str
    close: str
    between: str
    suffix: str
    arguments: str = ""  # the key, of bodies that are {"name": …, ARGUMENTS: …}
    body: Literal["json", "named", "xml"] = "json"  # or NAME[ARGS]{…}, or tags, see xml_calls
    call_ids: bool = False  # named bodies are NAME[CALL_ID]…[ARGS]{…}
    id_characters: int = 24  # of a call's id, after "call_"; 9: without that, as Mistral's templates demand


HERMES = ToolStyle("<tool_call>", "", "<tool_call>\n", "\n</tool_call>", "\n", "", "arguments")
LLAMA = ToolStyle("", "", "", "", "; ", "", "parameters")
MISTRAL = ToolStyle("[TOOL_CALLS]", "[TOOL_CALLS][", "", "", ", ", "]", "arguments", id_characters=9)
MISTRAL_SPACED = ToolStyle("[TOOL_CALLS]", "[TOOL_CALLS] [", "", "", ", ", "]", "arguments", id_characters=9)
MISTRAL_NAMED = ToolStyle("[TOOL_CALLS]", "", "[TOOL_CALLS]", "", "", "", body="named", id_characters=9)
MISTRAL_WITH_IDS = replace(MISTRAL_NAMED, call_ids=True)
QWEN_CODER = ToolStyle("<tool_call>", "", "<tool_call>\n", "\n</tool_call>", "\n", "", body="xml")


def style_of(template: str) -> ToolStyle:
    """Return how a chat template, its source, has calls written; as Hermes does where it knows nothing of tools."""
    if "[TOOL_CALLS]" in template and "[ARGS]" in template:
        return MISTRAL_WITH_IDS if "[CALL_ID]" in template else MISTRAL_NAMED
    if "[TOOL_CALLS]" in template:
        return MISTRAL_SPACED if "[TOOL_CALLS] [" in template else MISTRAL
    if "<function=" in template and "<parameter=" in template:
        return QWEN_CODER
    if "<tool_call>" in template:
        return HERMES
    if "<|python_tag|>" in template or ('"parameters": ' in template and "ipython" in template):
        return LLAMA
    return HERMES


@dataclass(frozen=True, slots=True)
class Tools:
    """What a request may call."""

    definitions: list[dict[str, Any]]  # as the client sent them, for the template
    schemas: dict[str, dict[str, Any]]  # of the arguments, by name
    required: bool  # at least one call must come
    parallel: bool  # more than one may

    @property
    def names(self) -> list[str]:
        return list(self.schemas)


def tools_of(
    tools: Sequence[dict[str, Any]] | None, choice: str | dict[str, Any] | None, parallel: bool | None,
    settings: Settings,
) -> Tools | None:  # fmt: skip
    """Return what a request may call, None if nothing. Raises BadRequest naming the place."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise BadRequest("tool_choice needs tools", param="tool_choice")
        return None
    schemas: dict[str, dict[str, Any]] = {}
    for i, tool in enumerate(tools):
        name, schema = _definition(tool, f"tools[{i}]", settings)
        if name in schemas:
            raise BadRequest(f"tools[{i}].function.name: {name!r} is there twice", param=f"tools[{i}].function.name")
        schemas[name] = schema
    wanted, required = _chosen(choice, list(schemas))
    if not wanted:
        return None
    one = choice in schemas if isinstance(choice, str) else choice is not None and choice.get("type") == "function"
    chosen = {name: schemas[name] for name in wanted}
    return Tools(list(tools), chosen, required, parallel=parallel is not False and not one)


def _definition(tool: dict[str, Any], place: str, settings: Settings) -> tuple[str, dict[str, Any]]:
    """Return a tool's name and the schema of its arguments."""
    if tool.get("type") != "function":
        raise BadRequest(f"{place}.type must be function, not {tool.get('type')!r}", param=f"{place}.type")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise BadRequest(f"{place}.function must be an object", param=f"{place}.function")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        message = f"{place}.function.name must be 1 to 64 letters, digits, _ or -"
        raise BadRequest(message, param=f"{place}.function.name")
    parameters, where = function.get("parameters"), f"{place}.function.parameters"
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    schema = checked_schema(parameters, where, settings)
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
        return [_known(tool, names) for tool in tools], mode == "required"
    raise BadRequest(
        f"tool_choice must be auto, none, required or a function's name in an object, not {choice!r}",
        param="tool_choice",
    )


def _known(tool: Any, names: list[str]) -> str:
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if name not in names:
        raise BadRequest(f"tool_choice names {name!r}, which is none of the tools", param="tool_choice")
    return name


# ---------------------------------------------------------------- grammars


def tool_grammar(
    tools: Tools, style: ToolStyle, marker: MarkerId, text: Constraint | None, *, thought: str = ""
) -> list[Constraint]:
    """Return the grammars of an answer that may hold calls, the first of them its own.

    text: what an answer without calls must be, None for any text. thought: what begins with it is no such answer.
    """
    bodies = " | ".join(f"body_{i}" for i in range(len(tools.names)))
    more = f" ({_literal(style.between + style.open, marker)} body)*" if tools.parallel else ""
    rules = [
        f"calls: {_literal(style.prefix + style.open, marker)} tail",
        f"tail: body{more} {_literal(style.suffix, marker)}",
        f"body: {bodies}",
        *_body_rules(tools, style, marker),
    ]
    if tools.required:
        rules.insert(0, "start: calls")
    elif text is not None:
        rules.insert(0, "start: calls | @text")
        return [_lark(rules), {**text, "name": "text"}]
    else:
        any_text = "/(?s:.*)/"
        if style.marker and marker(style.marker) is not None:
            any_text += f" & ~/(?s:.*){lark_regex(style.marker)}(?s:.*)/"  # spelled out it would look like a call
        if thought and marker(thought) is None:
            any_text += f" & ~/{lark_regex(thought)}(?s:.*)/"
        rules = [*_beside_text(style, marker, any_text), *rules]
    return [_lark(rules)]


def _body_rules(tools: Tools, style: ToolStyle, marker: MarkerId) -> list[str]:
    """Return the rules of what a call of each tool consists of, body_0 and so on."""
    rules: list[str] = []
    for i, (name, schema) in enumerate(tools.schemas.items()):
        after = _literal(style.close, marker)
        if style.body == "xml":
            rules.append(f"body_{i}: {lark_string(f'<function={name}>' + chr(10))} args_{i} {after}")
            rules += arguments_rules(name, schema, f"args_{i}")
            continue
        if style.body == "named":
            call_id = f"{_literal('[CALL_ID]', marker)} /[a-zA-Z0-9]{{9}}/" if style.call_ids else ""
            before = f"{lark_string(name)} {call_id} {_literal('[ARGS]', marker)}"
        else:
            before = lark_string('{"name": "' + name + f'", "{style.arguments}": ')
            after = _literal("}" + style.close, marker)
        rules.append(f"body_{i}: {before} args_{i} {after}")
        rules.append(f"args_{i}: %json {json.dumps(schema, ensure_ascii=False)}")
    return [*rules, *(RAW_VALUE_RULES if style.body == "xml" else [])]


def _lark(rules: list[str]) -> Constraint:
    return {"lark_grammar": "\n".join(rules)}


def _beside_text(style: ToolStyle, marker: MarkerId, any_text: str) -> list[str]:
    """Return the rules of an answer that is text, which calls may follow."""
    if not style.marker:  # only an answer that begins like a call is one
        tag = marker("<|python_tag|>")
        maybe = f"<[{tag}]>? " if tag is not None else ""
        return [f"start: TEXT | {maybe}calls", r"TEXT: " + any_text + r" & /(?s:[ \n\t]*[^{ \n\t].*)?/"]
    if marker(style.marker) is not None:
        return ["start: TEXT calls?", f"TEXT: {any_text}"]
    # Once the marker stands there, the rest of a call must follow.
    rest = (style.prefix + style.open).removeprefix(style.marker)
    lead = f"lead[lazy]: TEXT {lark_string(style.marker)}"
    return [f"start: TEXT | lead {_literal(rest, marker)} tail", lead, f"TEXT: {any_text}"]


def _literal(text: str, marker: MarkerId) -> str:
    """Return a text as literals of Lark, the markers in it that are tokens of their own by their ids."""
    parts: list[str] = []
    for piece in re.split(r"(\[(?:TOOL_CALLS|CALL_ID|ARGS)\]|</?tool_call>)", text):
        id_ = marker(piece) if piece else None
        if id_ is not None:
            parts.append(f"<[{id_}]>")
        elif piece:
            parts.append(lark_string(piece))
    return " ".join(parts)

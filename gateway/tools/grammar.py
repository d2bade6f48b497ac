"""The grammar of answers with tool calls: only the given tools, with arguments that match their schemas. Pure."""

from __future__ import annotations

import re

from gateway.grammars.notation import Constraint, lark_json, lark_regex, lark_string
from gateway.tools.definitions import Tools
from gateway.tools.styles import MarkerId, ToolStyle
from gateway.tools.xml_calls import RAW_VALUE_RULES, arguments_rules


def tool_grammar(
    tools: Tools, style: ToolStyle, marker: MarkerId, text: Constraint | None, *, thought: str = ""
) -> list[Constraint]:
    """Return the grammar of an answer that may contain calls, followed by the grammars that it refers to by name.

    text: grammar of an answer without calls, None if unconstrained. thought: mark that opens reasoning, with which an
    answer without calls may not begin; "" for none.
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
            any_text += f" & ~/(?s:.*){lark_regex(style.marker)}(?s:.*)/"  # its spelling would be parsed as a call
        if thought and marker(thought) is None:
            any_text += f" & ~/{lark_regex(thought)}(?s:.*)/"
        rules = [*_beside_text(style, marker, any_text), *rules]
    return [_lark(rules)]


def _body_rules(tools: Tools, style: ToolStyle, marker: MarkerId) -> list[str]:
    """Return a rule for each tool's call body, `body_0`, `body_1` and so on, with the rules that they refer to."""
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
        rules.append(f"args_{i}: {lark_json(schema)}")
    return [*rules, *(RAW_VALUE_RULES if style.body == "xml" else [])]


def _lark(rules: list[str]) -> Constraint:
    return {"lark_grammar": "\n".join(rules)}


def _beside_text(style: ToolStyle, marker: MarkerId, any_text: str) -> list[str]:
    """Return the rules of an answer that is text, and may end with calls."""
    if not style.marker:  # without a marker, an answer that begins like a call is one
        tag = marker("<|python_tag|>")
        maybe = f"<[{tag}]>? " if tag is not None else ""
        return [f"start: TEXT | {maybe}calls", r"TEXT: " + any_text + r" & /(?s:[ \n\t]*[^{ \n\t].*)?/"]
    if marker(style.marker) is not None:
        return ["start: TEXT calls?", f"TEXT: {any_text}"]
    # After the marker, the rest of a call must follow.
    rest = (style.prefix + style.open).removeprefix(style.marker)
    lead = f"lead[lazy]: TEXT {lark_string(style.marker)}"
    return [f"start: TEXT | lead {_literal(rest, marker)} tail", lead, f"TEXT: {any_text}"]


def _literal(text: str, marker: MarkerId) -> str:
    """Return a text as Lark literals: markers that are single tokens by id, the rest as strings."""
    parts: list[str] = []
    for piece in re.split(r"(\[(?:TOOL_CALLS|CALL_ID|ARGS)\]|</?tool_call>)", text):
        id_ = marker(piece) if piece else None
        if id_ is not None:
            parts.append(f"<[{id_}]>")
        elif piece:
            parts.append(lark_string(piece))
    return " ".join(parts)

"""The cost of requests and of models' answers grows linearly with their size, however they are written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from helpers.growth import MOST, growth

from gateway.anthropic import content as anthropic
from gateway.bodies import json_values
from gateway.chat.messages import normalize_messages
from gateway.chat.template_forms import shows_lists
from gateway.grammars import ebnf, limits, structured
from gateway.ollama.ollama_parse import openai_messages
from gateway.openai.openai_write import _message
from gateway.responses import items
from gateway.text.answer_form import AnswerForm
from gateway.text.answer_parts import AnswerParts
from gateway.tools.definitions import tools_of
from gateway.tools.styles import HERMES, LLAMA, MISTRAL_WITH_IDS, QWEN_CODER, ToolStyle
from gateway.tools.xml_calls import arguments_rules
from protocol.runtime.settings import Settings
from protocol.wire.text import RegexMatcher, StopMatcher

SETTINGS = Settings(max_grammar_bytes=1 << 20)
GRAMMAR, ANSWER, BODY = 1 << 16, 1 << 14, 1 << 18

Made = Callable[[int], Callable[[], object]]


def filled(unit: str, size: int, before: str = "", after: str = "") -> str:
    return before + unit * ((size - len(before) - len(after)) // len(unit)) + after


def lark(unit: str, before: str = "", after: str = "") -> Made:
    def made(size: int) -> Callable[[], object]:
        text = filled(unit, size, before, after)
        return lambda: structured.check_lark(text, "here", SETTINGS)

    return made


def regex(unit: str, before: str = "") -> Made:
    def made(size: int) -> Callable[[], object]:
        text = filled(unit, size, before)
        return lambda: limits.check_regex(text, "here")

    return made


def of_ebnf(unit: str, before: str = "root ::= ", after: str = "") -> Made:
    def made(size: int) -> Callable[[], object]:
        text = filled(unit, size, before, after)
        return lambda: ebnf.is_ebnf(text) and ebnf.lark_of(text, "here")

    return made


GRAMMARS: dict[str, Made] = {
    **{f"lark {unit!r} after {before!r}": lark(unit, before) for unit, before in [
        ('\\"', ""), ('"\\', ""), ("\\/", ""), ("\\/", "/"), ("/a", ""), ("%json ", ""), (" ", "%json"),
        ("%json {", ""), ('%json {"a":', ""), ("[", "%json "), ("%json [", ""), ("a ", ""), ("\n", ""), ("[", ""),
        ("\\p{", ""), ("{1", ""), ("1", "{"), ("1", "a{1,"), ("(", ""), ("/", ""), ("/*", ""), ("//", ""),
        ('"aaa\n', ""), ("/\\", ""),
    ]},
    **{f"regex {unit!r} after {before!r}": regex(unit, before) for unit, before in [
        ("[", ""), ("\\p{", ""), ("{", ""), ("1", "a{"), ("{1111", ""), ("{0}", "a"), ("(", ""), ("|", ""), ("\\", ""),
    ]},
    **{f"ebnf {unit!r} after {before!r}": of_ebnf(unit, before) for unit, before in [
        ("a", "root ::= "), (" ", "root ::= a"), ('\\"', 'root ::= "'), ("\\]", "root ::= ["), ("1", "root ::= a{"),
        (" ", "root ::= a{1"), ("[", "root ::= "), ("\n   ", ""), ("a  \n", ""), ("a::", ""), ("\\x41", 'root ::= "'),
    ]},
}  # fmt: skip
"""Sizes are bytes of a grammar."""


def schema(made: Callable[[int], dict[str, Any]]) -> Made:
    def check(size: int) -> Callable[[], object]:
        value = made(size)
        return lambda: structured.checked_schema(value, "here", SETTINGS)

    return check


def chain(num: int) -> dict[str, Any]:
    links = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}], "properties": {f"p{i}": {}}} for i in range(num)}
    return {"$defs": links, "allOf": [{"$ref": "#/$defs/a0"}]}


def repeated(num: int) -> dict[str, Any]:
    one = {"type": "object", "properties": {f"p{i}": {} for i in range(num)}}
    return {"$defs": {"a": one}, "properties": {f"x{i}": {"allOf": [{"$ref": "#/$defs/a"}]} for i in range(num)}}


def copied(num: int) -> dict[str, Any]:
    return {"$defs": {"a": {"description": "d" * 50 * num}}, "allOf": [{"$ref": "#/$defs/%61"}] * num}


def distinct_copies(num: int) -> dict[str, Any]:
    """Refer to a single long schema by differently escaped spellings of its name."""
    ways = [f"#/$defs/{''.join('a' if i >> bit & 1 else '%61' for bit in range(12))}" for i in range(min(num, 4096))]
    return {"$defs": {"a" * 12: {"description": "d" * 50 * num}}, "allOf": [{"$ref": way} for way in ways]}


SCHEMAS: dict[str, Made] = {
    "properties": schema(lambda size: {"properties": {f"a{i}": {} for i in range(size // 16)}}),
    "required": schema(lambda size: {"type": "object", "required": [f"a{i}" for i in range(size // 16)]}),
    "a chain of references": schema(lambda size: chain(size // 80)),
    "many who refer to many": schema(lambda size: repeated(size // 80)),
    "one reference many times": schema(lambda size: copied(size // 100)),
    "one schema by many references": schema(lambda size: distinct_copies(size // 100)),
    "a pattern": schema(lambda size: {"pattern": "a{1" * (size // 3)}),
    "an open list": schema(lambda size: {"enum": [[]] * (size // 8)}),
}


def arguments(size: int) -> Callable[[], object]:
    names = [f"a{i}" for i in range(size // 24)]
    value = {"properties": {name: {} for name in names}, "required": names, "maxProperties": len(names)}
    return lambda: arguments_rules("f", value, "rule")


def allowed(size: int) -> Callable[[], object]:
    tools = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(128)]
    named = [{"function": {"name": "f127"}}] * (size // 32)
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": named}}
    return lambda: tools_of(tools, choice, None, SETTINGS)


TOOLS: dict[str, Made] = {"arguments in tags": arguments, "allowed tools": allowed}


def answer(style: ToolStyle, unit: str, before: str = "", *, whole: bool = False) -> Made:
    """Read an answer in steps of four characters, or at once."""

    def made(size: int) -> Callable[[], object]:
        text, step = filled(unit, size, before), size if whole else 4

        def read() -> object:
            parts = AnswerParts(thought=("<think>", "</think>"), opened=False, style=style)
            for at in range(0, len(text), step):
                parts.add(text[at : at + step])
            return parts.finish()

        return read

    return made


CALL = '{"name": "f", "arguments": {}}'
ANSWERS: dict[str, Made] = {
    f"{style.body} {unit!r} after {before!r}{' whole' * whole}": answer(style, unit, before, whole=whole)
    for whole in (False, True)
    for style, unit, before in [
        (HERMES, "{", "<tool_call>"), (HERMES, "a", "<tool_call>"), (HERMES, " ", "<tool_call>{"),
        (HERMES, "a", '<tool_call>{"name":"'), (HERMES, " ", '<tool_call>{"name":"a","arguments":'),
        (HERMES, " ", ""), (HERMES, "\n", "a"), (HERMES, "<tool_cal", ""), (HERMES, "a", f"<tool_call>{CALL[:-2]}"),
        (HERMES, '\\"', f'<tool_call>{CALL[:-2]}"'), (HERMES, "\\", f'<tool_call>{CALL[:-2]}"'),
        (HERMES, f"<tool_call>\n{CALL}\n</tool_call>\n", ""), (LLAMA, " ", ""), (LLAMA, f"{CALL}; ", ""),
        (MISTRAL_WITH_IDS, "a", "[TOOL_CALLS]"), (MISTRAL_WITH_IDS, "a", "[TOOL_CALLS]a[CALL_ID]"),
        (MISTRAL_WITH_IDS, " ", "[TOOL_CALLS]"), (MISTRAL_WITH_IDS, "[TOOL_CALLS]f[CALL_ID]0[ARGS]{}", ""),
        (QWEN_CODER, "a", "<tool_call>"), (QWEN_CODER, "<function=", "<tool_call>"),
        (QWEN_CODER, "a", "<tool_call><function="), (QWEN_CODER, "a", "<tool_call><function=a>\n<parameter="),
        (QWEN_CODER, " ", "<tool_call><function=a>\n"), (QWEN_CODER, "a", "<tool_call><function=a>\n"),
        (QWEN_CODER, "<parameter=a>\n1\n</parameter>\n", "<tool_call><function=a>\n"),
        (QWEN_CODER, "\n</paramete", "<tool_call><function=a>\n<parameter=a>\n"),
        (HERMES, " ", "<think>"), (HERMES, "</thin", "<think>"), (HERMES, " ", "<think>a</think>"),
    ]
}  # fmt: skip


def message_of_calls(size: int) -> Callable[[], object]:
    parts = AnswerParts(thought=None, opened=False, style=LLAMA)
    found = [*parts.add(filled(f"{CALL}; ", size)), *parts.finish()]
    form = AnswerForm(None, False, LLAMA, {}, {})
    return lambda: _message(found, form, "r")


def stops(stop: str, unit: str) -> Made:
    def made(size: int) -> Callable[[], object]:
        text = filled(unit, size)

        def read() -> None:
            matcher = StopMatcher([stop])
            for character in text:
                matcher.add(character)

        return read

    return made


def expression(expression: str, unit: str) -> Made:
    def made(size: int) -> Callable[[], object]:
        text = filled(unit, size)

        def read() -> None:
            matcher = RegexMatcher([], [expression])
            for at in range(0, len(text), 4):
                matcher.add(text[at : at + 4])

        return read

    return made


ANSWERS |= {
    "an expression that never ends": expression("a[^\0]*\0", "a"),
    "an expression that nearly ends": expression("a.{500}b", "a"),
    "an expression that begins anew": expression("(a|b)*c", "ab\n"),
    "a message of many calls": message_of_calls,
    "a stop string that nearly comes": stops("a" * 1023 + "b", "a"),
    "a stop string of pairs": stops("ab" * 511 + "c", "ab"),
}


def many_thoughts(size: int) -> Callable[[], object]:
    blocks = [{"type": "thinking", "thinking": "t" * (size // 2)}]
    blocks += [{"type": "thinking", "thinking": "t"}] * min(size // 40, 16_000)
    return lambda: anthropic.messages_of(None, [{"role": "assistant", "content": blocks}])


def many_turns(size: int) -> Callable[[], object]:
    one = {"type": "thinking", "thinking": "t" * 20}
    given = [{"role": "assistant", "content": [one]} for _ in range(size // 60)]
    return lambda: anthropic.messages_of(None, given)


def many_items(size: int) -> Callable[[], object]:
    first = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "t" * (size // 2)}]}
    one = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "t"}]}
    given = items.items_of([first, *[dict(one) for _ in range(size // 60)]], "0" * 32, {})
    return lambda: items.messages_of(None, given)


def many_images(size: int) -> Callable[[], object]:
    """Tool results in all three formats, with images that are replaced with text."""
    image, num = {"type": "image"}, size // 60
    result = {"type": "tool_result", "tool_use_id": "t", "content": [image] * min(num, 16_000)}
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    given = [{"role": "assistant", "content": [call]}, *[{"role": "user", "content": [result]}] * (1 + num // 16_000)]
    output = {"type": "function_call_output", "call_id": "c", "output": [image] * num}
    chat = [{"role": "tool", "tool_call_id": "c", "content": [image] * num}]

    def read() -> None:
        anthropic.messages_of(None, given)
        assert len(list(anthropic.unread_results(given))) >= num
        items.items_of([output], "0" * 32, {})
        normalize_messages(chat)

    return read


def many_open_calls(size: int) -> Callable[[], object]:
    calls = [{"function": {"name": f"f{i}", "arguments": {}}} for i in range(size // 60)]
    results = [{"role": "tool", "content": "", "tool_name": "f"} for _ in range(size // 400)]
    given = [{"role": "assistant", "tool_calls": calls}, *results]
    return lambda: openai_messages(given)


def rendered_lists(size: int) -> Callable[[], object]:
    parts = [[{"type": "text", "text": f"{i:05}" + "a" * 50}] for i in range(size // 64)]
    text = "".join(one[0]["text"] for one in parts)
    return lambda: shows_lists(text, [{"role": "user", "content": one} for one in parts])


def json_text(unit: str, before: str = "[", after: str = "1]") -> Made:
    def made(size: int) -> Callable[[], object]:
        raw = filled(unit, size, before, after).encode()

        def read() -> None:
            with suppress(ValueError):
                json_values.loads(raw)

        return read

    return made


BODIES: dict[str, Made] = {
    "anthropic: thoughts of a message": many_thoughts,
    "anthropic: thoughts of many messages": many_turns,
    "responses: items of a turn": many_items,
    "ollama: calls without results": many_open_calls,
    "images in results of tools": many_images,
    "parts of a message": lambda size: lambda: normalize_messages(
        [{"role": "user", "content": [{"type": "text", "text": "a"}] * (size // 30)}]
    ),
    "lists of parts looked for in a prompt": rendered_lists,
    **{f"json {unit!r} after {before!r}": json_text(unit, before) for unit, before in [
        ("[", "["), ("[],", "["), ('"",', "["), ("1,", "["), ("\\\\", '["'), ('\\"', '["'), ("[}", "["), ("9", "["),
        ("[" * 99 + "]" * 99 + ",", "["), ('{"a":', ""),
    ]},
}  # fmt: skip

CASES = {
    **{f"grammar: {name}": (made, GRAMMAR) for name, made in GRAMMARS.items()},
    **{f"schema: {name}": (made, GRAMMAR) for name, made in SCHEMAS.items()},
    **{f"tools: {name}": (made, GRAMMAR) for name, made in TOOLS.items()},
    **{f"answer: {name}": (made, ANSWER) for name, made in ANSWERS.items()},
    **{f"body: {name}": (made, BODY) for name, made in BODIES.items()},
}


@pytest.mark.parametrize("part", ["grammar", "schema", "tools", "answer", "body"])
def test_it_costs_in_proportion_to_its_size(part: str, subtests: pytest.Subtests) -> None:
    cases = {name: case for name, case in CASES.items() if name.startswith(f"{part}: ")}
    assert cases
    for name, (made, size) in cases.items():
        with subtests.test(name):
            assert growth(made, size) < MOST

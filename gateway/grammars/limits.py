"""What a schema, regular expression or grammar may hold, found out before anything compiles it. Pure.

Each function here reads every character a bounded number of times: patterns are possessive, and what begins like a
string or an expression and does not end is one token too, so that no search restarts within it.

Whether it compiles, and at what cost, is found out in the sandbox. Here is refused what is written in a few bytes and
costs without bound, counted repetitions inside each other, and what is too deep or too wide to walk through. `minItems`
and its kin cost nothing, however large.
"""

from __future__ import annotations

import json
import re
from typing import Any

from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

MAX_VALUES = 20_000
"""Values in one schema, objects and lists included."""

MAX_CHOICES = 10_000
"""Values in one `enum` or `choice`, schemas in one `anyOf`."""

MAX_PARTS = 100_000
"""Parts of a regular expression once its counted repetitions are written out: (ab){3} has six."""

MAX_TIMES = 16
"""A request's grammars, its tools' too, have so many times `max_grammar_bytes` together."""

MAX_WHITESPACE_BYTES = 256
"""Longest `whitespace_pattern`, which stands between all parts of the JSON."""

_LISTS = ("enum", "anyOf", "oneOf", "allOf", "prefixItems", "required")
_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_VALUES = frozenset({"const", "enum", "default", "example", "examples"})  # keywords whose values are not schemas
_SCHEMA, _NAMES, _VALUE = "schema", "names", "value"  # kinds of schema parts; _NAMES maps names to schemas

_TIMES = re.compile(r"\{(\d*+)(,?+)(\d*+)\}")
_MAX_DIGITS = 9
_LARK_TOKEN = re.compile(
    r'"(?:[^"\\\n]|\\.)*+(?P<end>"?+)|/(?![/*])(?P<regex>(?:[^/\\\n]|\\.)++)(?P<slash>/?+)|//[^\n]*+'
    r"|(?P<json>%json\s*+(?=[{\[]))"
)
_NAME = re.compile(r"[A-Za-z_]\w*")
_JSON = json.JSONDecoder()


def check_bytes(text: str, place: str, settings: Settings) -> None:
    """Raise BadRequest if a text is larger than `max_grammar_bytes`."""
    check_num(len(text.encode()), settings.max_grammar_bytes, "bytes", place)


def check_num(num: int, limit: int, what: str, place: str) -> None:
    """Raise BadRequest if there are more than `limit` of something."""
    if num > limit:
        raise BadRequest(f"{place} has {num} {what}; the limit is {limit}", param=place)


# ---------------------------------------------------------------- JSON schemas


def check_schema(schema: Any, place: str, settings: Settings) -> None:
    """Raise BadRequest for a schema that is too deep, has too many values, or a pattern beyond the limits."""
    num, depth, limit = 0, 0, settings.max_grammar_depth
    groups: list[tuple[str, Any]] = [(_SCHEMA, schema)]
    while groups:
        depth += 1
        if depth > limit:
            raise BadRequest(f"{place} is nested deeper than {limit} levels, which is the limit", param=place)
        inner: list[tuple[str, Any]] = []
        for kind, group in groups:
            num += len(group)
            check_num(num, MAX_VALUES, "values", place)
            inner += _parts(kind, group, place)
        groups = inner


def _parts(kind: str, group: Any, place: str) -> list[tuple[str, Any]]:
    """Return the objects and lists in one, each with its kind; raise BadRequest beyond the limits."""
    if isinstance(group, list):
        return [(kind, part) for part in group if isinstance(part, dict | list)]
    if kind == _SCHEMA:
        _check_keywords(group, place)
    parts: list[tuple[str, Any]] = []
    for key, part in group.items():
        if isinstance(part, dict | list):
            inner = kind if kind == _VALUE else _SCHEMA
            if kind == _SCHEMA:
                inner = _NAMES if key in _BY_NAME else _VALUE if key in _VALUES else _SCHEMA
            parts.append((inner, part))
    return parts


def _check_keywords(schema: dict[str, Any], place: str) -> None:
    for key in _LISTS:
        if isinstance(values := schema.get(key), list):
            check_num(len(values), MAX_CHOICES, f"values in {key}", place)
    if isinstance(pattern := schema.get("pattern"), str):
        check_regex(pattern, place)
    if isinstance(patterns := schema.get("patternProperties"), dict):
        for pattern in patterns:
            check_regex(pattern, place)
    style = schema.get("x-guidance")
    if isinstance(style, dict) and isinstance(white := style.get("whitespace_pattern"), str):
        check_whitespace(white, place)


# ---------------------------------------------------------------- regular expressions


def check_whitespace(pattern: str, place: str) -> None:
    """Raise BadRequest for a pattern of white space that is too long or counts too far."""
    check_num(len(pattern.encode()), MAX_WHITESPACE_BYTES, "bytes", place)
    check_regex(pattern, place)


def check_regex(pattern: str, place: str) -> None:
    """Raise BadRequest for a regular expression that has too many parts when its repetitions are written out."""
    if num_parts(pattern) > MAX_PARTS:
        text = f"{place}: /{pattern:.40}/ has more than {MAX_PARTS} parts when its repetitions are written out"
        raise BadRequest(f"{text}, which is the limit", param=place)


def num_parts(pattern: str) -> int:
    """Return how many parts a regular expression has when its repetitions are written out, up to `MAX_PARTS` + 1.

    It need not be a right one; the compiler finds that out.
    """
    total, last, at = 0, 0, 0  # parts so far in this group, those of its last piece, and the next character
    groups: list[int] = []  # parts before each group that is open
    while at < len(pattern):
        character, at = pattern[at], at + 1
        times = _TIMES.match(pattern, at - 1) if character == "{" else None
        if times is not None:
            at = times.end()
            most = max(_count(times[1]), _count(times[3])) + (times[2] == "," and not times[3])
            total, last = total + last * (most - 1 if most else 0), last * max(most, 1)
        elif character == "(":
            groups.append(total)
            total = 0
        elif character == ")" and groups:
            last = total
            total += groups.pop()
        elif character not in "*+?|":
            at = _after_piece(pattern, at - 1)
            total, last = total + 1, 1
        if total > MAX_PARTS:
            return MAX_PARTS + 1
    return total + sum(groups)


def _count(digits: str) -> int:
    return int(digits[: _MAX_DIGITS + 1] or 0)


def _after_piece(pattern: str, at: int) -> int:
    """Return where a character, an escape or a class that begins at `at` ends."""
    if pattern[at] == "\\":
        if pattern[at + 1 : at + 2] in tuple("pPxuU") and pattern[at + 2 : at + 3] == "{":
            return pattern.find("}", at) + 1 or len(pattern)
        return at + 2
    if pattern[at] != "[":
        return at + 1
    open_classes, at = 1, at + 1
    at += pattern[at : at + 1] == "^"
    at += pattern[at : at + 1] == "]"  # a class may begin with the character that ends it
    while at < len(pattern) and open_classes:
        open_classes += (pattern[at] == "[") - (pattern[at] == "]")
        at += 2 if pattern[at] == "\\" else 1
    return at


# ---------------------------------------------------------------- Lark


def check_lark(text: str, place: str, settings: Settings) -> None:
    """Raise BadRequest for a grammar with a regular expression, a JSON schema or repetitions beyond the limits."""
    at, outside, is_json = 0, list[str](), True
    while (token := _LARK_TOKEN.search(text, at)) is not None:
        is_open = token["end"] == "" or token["slash"] == ""  # the compiler says that it does not end
        outside += (text[at : token.start()], token[0] if is_open else "_")  # one part
        at = token.end()
        if token["slash"]:
            check_regex(token["regex"], place)
        elif token["json"] is not None and is_json:
            try:
                schema, at = _JSON.raw_decode(text, at)
            except (ValueError, RecursionError):
                is_json = False  # the compiler says what is wrong; the error of each would count the lines before it
                continue
            if isinstance(schema, dict | list):
                check_schema(schema, place, settings)
    outside.append(text[at:])
    for rule in "".join(outside).splitlines():
        check_regex(_NAME.sub("_", rule), place)

"""What a JSON text may cost, found out by counting in its bytes before any of its values exists. Pure.

orjson and pydantic hold the interpreter while they work, in whatever thread. Within these limits the longest that they
do for a text of 4 MB is some milliseconds, whatever it contains; without them it was five seconds.
"""

from __future__ import annotations

from typing import Any

import orjson

from protocol.wire.errors import BadRequest

MAX_DEPTH = 100
"""Deepest nesting of lists and objects; everything that reads JSON later can take that much."""

MAX_VALUES = 1 << 20
"""Most values in a text of up to 4 MB; a larger one may have one for each four of its bytes."""

MAX_CONTAINERS = 1 << 14
"""Most lists and objects: each costs fifty times its bytes."""

MAX_STRINGS = 1 << 16
"""Most strings, the keys of objects among them."""

_SQUARE = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


def loads(raw: bytes, what: str = "the body") -> Any:
    """Return the value of a JSON text. Raises BadRequest if it costs too much, JSONDecodeError if it is no JSON.

    As JSON demands, NaN and Infinity are none, nor are lone surrogates text.
    """
    if len(raw) > MAX_CONTAINERS or raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _check(raw, what)
    return orjson.loads(raw)


def _check(raw: bytes, what: str) -> None:
    """Raise BadRequest for a text with too many values, or too deep ones."""
    # Without escaped ones, every quote begins or ends a string.
    plain = raw.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in raw else raw
    _check_number(what, "strings", plain.count(b'"') // 2, MAX_STRINGS)
    outside = b"".join(plain.split(b'"')[::2])
    num_containers = outside.count(b"[") + outside.count(b"{")
    _check_number(what, "lists and objects", num_containers, MAX_CONTAINERS)
    num_values = outside.count(b",") + num_containers + 1
    _check_number(what, "values", num_values, max(MAX_VALUES, len(raw) // 4))
    if num_containers > MAX_DEPTH and _is_deeper(outside, MAX_DEPTH):
        raise BadRequest(f"{what} is nested too deeply; the limit is {MAX_DEPTH} levels")


def _check_number(what: str, of: str, num: int, limit: int) -> None:
    if num > limit:
        raise BadRequest(f"{what} has {num} {of}; the limit is {limit}")


def _is_deeper(outside: bytes, limit: int) -> bool:
    """Return whether brackets are nested deeper than a limit; of those that do not match it may say either."""
    brackets = outside.translate(_SQUARE, _NO_BRACKETS)
    if 2 * brackets.count(b"[") != len(brackets):
        return False  # not JSON; do not rescan millions of brackets that close nothing
    for _ in range(limit):
        inner = brackets.replace(b"[]", b"")
        if len(inner) == len(brackets):
            break  # none are left, or they do not match
        brackets = inner
    return b"[]" in brackets or b"[" * (limit + 1) in brackets

"""Limits of regular expressions and grammars, checked before anything compiles them. Pure.

Each function reads every character a bounded number of times: patterns are possessive, and an unterminated string or
expression is one token, so that no search restarts within it.

The sandbox finds out whether a grammar compiles, and at what cost. Refused here are short texts of unbounded cost, such
as nested counted repetitions, and schemas too deep or too wide to traverse. `minItems` and similar keywords cost
nothing, however large.
"""

from __future__ import annotations

import re

from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

MAX_CHOICES = 10_000
"""Maximum values in one `enum` or `choice`, and schemas in one `anyOf`."""

MAX_PARTS = 100_000
"""Maximum parts of a regular expression with its counted repetitions expanded: (ab){3} has six."""

MAX_TIMES = 16
"""All grammars of a request, including its tools', may have this multiple of `max_grammar_bytes` in total."""

MAX_WHITESPACE_BYTES = 256
"""Maximum bytes of a `whitespace_pattern`, which is inserted between all parts of the JSON."""

_TIMES = re.compile(r"\{(\d*+)(,?+)(\d*+)\}")
_MAX_DIGITS = 9


def check_bytes(text: str, place: str, settings: Settings) -> None:
    """Raise BadRequest if a text is larger than `max_grammar_bytes`."""
    check_num(len(text.encode()), settings.max_grammar_bytes, "bytes", place)


def check_num(num: int, limit: int, what: str, place: str) -> None:
    """Raise BadRequest if there are more than `limit` of something."""
    if num > limit:
        raise too_many(num, limit, what, place)


def too_many(num: int, limit: int, what: str, place: str) -> BadRequest:
    """Return the error for more than `limit` of something."""
    return BadRequest(f"{place} has {num} {what}; the limit is {limit}", param=place)


# ---------------------------------------------------------------- regular expressions


def check_whitespace(pattern: str, place: str) -> None:
    """Raise BadRequest for a white space pattern that is too long or has too many parts."""
    check_num(len(pattern.encode()), MAX_WHITESPACE_BYTES, "bytes", place)
    check_regex(pattern, place)


def check_regex(pattern: str, place: str) -> None:
    """Raise BadRequest for a regular expression with too many parts once its repetitions are expanded."""
    if num_parts(pattern) > MAX_PARTS:
        text = f"{place}: /{pattern:.40}/ has more than {MAX_PARTS} parts when its repetitions are written out"
        raise BadRequest(f"{text}, which is the limit", param=place)


def num_parts(pattern: str) -> int:
    """Return the number of parts of a regular expression with its repetitions expanded, up to `MAX_PARTS` + 1.

    The expression may be invalid; the compiler detects that.
    """
    total, last, at = 0, 0, 0  # parts so far in this group, parts of its last piece, index of the next character
    groups: list[int] = []  # parts before each open group
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
    """Return the end of the character, escape or class that begins at `at`."""
    if pattern[at] == "\\":
        if pattern[at + 1 : at + 2] in tuple("pPxuU") and pattern[at + 2 : at + 3] == "{":
            return pattern.find("}", at) + 1 or len(pattern)
        return at + 2
    if pattern[at] != "[":
        return at + 1
    open_classes, at = 1, at + 1
    at += pattern[at : at + 1] == "^"
    at += pattern[at : at + 1] == "]"  # a leading ] is a literal
    while at < len(pattern) and open_classes:
        open_classes += (pattern[at] == "[") - (pattern[at] == "]")
        at += 2 if pattern[at] == "\\" else 1
    return at

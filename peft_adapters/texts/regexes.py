"""Regular expressions that an adapter's tokenizer may split text by: those that backtracking cannot blow up.

The engine behind `tokenizers`, Oniguruma, tries one way to match after another. This module counts the ways: a choice
among k adds up to k, an expression after another multiplies, an unbounded repetition has as many as there are
characters (its degree is 1; degrees add up). What is repeated without bound must have one way alone and one length, so
no expression is exponential in the text. Syntax: https://github.com/kkos/oniguruma/blob/master/doc/RE.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from protocol.wire.errors import AdapterRefused

MAX_PATTERN_CHARS = 32_768
"""A converted SentencePiece model has all its user-defined pieces in one pattern."""

MAX_WAYS = 16_384
MAX_DEGREE = 4
MAX_DEPTH = 32
MAX_REPEAT = 1_000

_QUANTIFIER = re.compile(r"[*+?]|\{(\d*+)(,?+)(\d*+)\}")
_GROUP = re.compile(r"\((?:\?(?:[im]*(?:-[im]+)?:|[=!>]|<[=!]|<[A-Za-z_]\w*>))?")
_FLAGS = re.compile(r"\(\?[im]*(?:-[im]+)?\)")
_PROPERTY = re.compile(r"[pP]\{\^?[\w &=-]+\}")
_HEX = re.compile(r"x[0-9A-Fa-f]{1,2}|x\{[0-9A-Fa-f]{1,8}\}|u[0-9A-Fa-f]{4}")
_POSIX = re.compile(r"\[:\^?[a-z]+:\]")
_ANCHORS = "bBAzZ"
_CHARACTERS = "sSdDwWhHnrtfvea"


@dataclass(frozen=True, slots=True)
class Cost:
    """What an expression matches, and how many ways to match it there are at one place of a text of n characters."""

    shortest: int  # characters
    longest: int | None  # None: without bound
    ways: int  # times n ** degree
    degree: int = 0


NOTHING = Cost(0, 0, 1)
CHARACTER = Cost(1, 1, 1)


def regex_cost(pattern: str) -> Cost:
    """Return what a pattern costs. Raises AdapterRefused for one that costs too much, or uses what is not known."""
    if len(pattern) > MAX_PATTERN_CHARS:
        raise AdapterRefused([f"a regular expression has {len(pattern)} characters; the limit is {MAX_PATTERN_CHARS}"])
    return _Reader(pattern).read()


class _Reader:
    """Reads one pattern from left to right."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._depth = 0

    def read(self) -> Cost:
        cost = self._choice()
        if self._at < len(self._pattern):
            raise self._refusal("has a `)` too many")
        return cost

    def _refusal(self, why: str) -> AdapterRefused:
        shown = self._pattern if len(self._pattern) <= 80 else f"{self._pattern[:80]}…"
        return AdapterRefused([f"the regular expression {shown!r} {why}"])

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _take(self, syntax: re.Pattern[str]) -> re.Match[str] | None:
        found = syntax.match(self._pattern, self._at)
        if found is not None:
            self._at = found.end()
        return found

    def _choice(self) -> Cost:
        costs = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            costs.append(self._sequence())
        longest = [cost.longest for cost in costs]
        cost = Cost(
            min(cost.shortest for cost in costs),
            None if None in longest else max(value for value in longest if value is not None),
            sum(cost.ways for cost in costs),
            max(cost.degree for cost in costs),
        )
        return self._checked(cost)

    def _sequence(self) -> Cost:
        whole = NOTHING
        while self._peek() not in ("", "|", ")"):
            whole = self._checked(_after(whole, self._repeated(self._atom())))
        return whole

    def _checked(self, cost: Cost) -> Cost:
        if cost.ways > MAX_WAYS:
            raise self._refusal(f"has more than {MAX_WAYS} ways to match")
        if cost.degree > MAX_DEGREE:
            raise self._refusal(f"has more than {MAX_DEGREE} unbounded repetitions in one sequence")
        return cost

    def _repeated(self, cost: Cost) -> Cost:
        """Return the cost of an atom with the quantifiers behind it."""
        while (found := self._take(_QUANTIFIER)) is not None:
            sign = found[0]
            if sign[0] != "{":
                least, most = (1 if sign == "+" else 0), (1 if sign == "?" else None)
                if self._peek() in ("?", "+"):  # lazy or possessive: tries no more
                    self._at += 1
            elif not (found[1] or found[3]):  # stands for itself
                return self._checked(_after(cost, Cost(len(sign), len(sign), 1)))
            else:
                least = int(found[1] or 0)
                most = (int(found[3]) if found[3] else None) if found[2] else least
                if max(least, most or 0) > MAX_REPEAT or (most is not None and most < least):
                    raise self._refusal(f"repeats {sign}; the limit is {MAX_REPEAT}")
                if self._peek() == "?":
                    self._at += 1
            cost = self._times(cost, least, most)
        return cost

    def _times(self, cost: Cost, least: int, most: int | None) -> Cost:
        if most is None:
            if cost.ways > 1 or cost.degree or cost.longest != cost.shortest or not cost.shortest:
                raise self._refusal("repeats without bound what has several lengths or several ways to match")
            return Cost(least * cost.shortest, None, 1, 1)
        ways = 0
        for count in range(least, most + 1):
            ways += cost.ways**count
            if ways > MAX_WAYS:
                break
        longest = None if cost.longest is None and most else (cost.longest or 0) * most
        return self._checked(Cost(least * cost.shortest, longest, ways, cost.degree * most))

    def _atom(self) -> Cost:
        character = self._peek()
        if character == "(":
            return self._group()
        if character == "[":
            self._set(0)
            return CHARACTER
        if character == "\\":
            return self._escape()
        if character in "*+?":
            raise self._refusal("repeats nothing")
        self._at += 1
        return NOTHING if character in "^$" else CHARACTER

    def _group(self) -> Cost:
        if self._take(_FLAGS):
            return NOTHING
        begin = self._take(_GROUP)
        if begin is None or self._peek() == "?":
            raise self._refusal(f"has a group of an unknown kind at {self._at}")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._refusal(f"has groups nested deeper than {MAX_DEPTH}")
        cost = self._choice()
        self._depth -= 1
        if self._peek() != ")":
            raise self._refusal("has a group without end")
        self._at += 1
        looks = begin[0][2:] in ("=", "!", "<=", "<!")
        return Cost(0, 0, cost.ways, cost.degree) if looks else cost

    def _escape(self) -> Cost:
        self._at += 1
        character = self._peek()
        if character in "pPxu" and character:
            if self._take(_PROPERTY) or self._take(_HEX):
                return CHARACTER
        elif character and not character.isalnum():
            self._at += 1
            return CHARACTER
        elif character and character in _CHARACTERS + _ANCHORS:
            self._at += 1
            return NOTHING if character in _ANCHORS else CHARACTER
        raise self._refusal(f"has \\{character}, which is not known here")

    def _set(self, depth: int) -> None:
        """Pass a set of characters, with the sets in it."""
        if depth > MAX_DEPTH:
            raise self._refusal(f"has sets nested deeper than {MAX_DEPTH}")
        self._at += 1
        if self._peek() == "^":
            self._at += 1
        if self._peek() == "]":  # stands for itself
            self._at += 1
        while (character := self._peek()) != "]":
            if not character:
                raise self._refusal("has a set without end")
            if character == "\\":
                self._escape()
            elif character == "[":
                if not self._take(_POSIX):
                    self._set(depth + 1)
            else:
                self._at += 1
        self._at += 1


def _after(first: Cost, then: Cost) -> Cost:
    longest = None if first.longest is None or then.longest is None else first.longest + then.longest
    return Cost(first.shortest + then.shortest, longest, first.ways * then.ways, first.degree + then.degree)

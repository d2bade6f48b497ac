"""The syntax of `stop_regex`: Python's, without look-around and backreferences."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from protocol.wire.errors import BadRequest

PARAM = "stop_regex"

MAX_DEPTH = 32
"""Maximum nesting depth of groups."""

KINDS: Mapping[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "s": str.isspace,
    "w": lambda character: character == "_" or character.isalnum(),
    "D": lambda character: not character.isdecimal(),
    "S": lambda character: not character.isspace(),
    "W": lambda character: character != "_" and not character.isalnum(),
}
"""The letter after a backslash -> whether a character belongs to its class."""

_GAPS = frozenset({"^", "$", r"\A", r"\Z", r"\b", r"\B"})
_CONTROLS = {"a": "\a", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_CODE_DIGITS = {"x": 2, "u": 4, "U": 8}
_TIMES = re.compile(r"[*+?]|\{(?P<least>[0-9]*+)(?P<comma>,?+)(?P<most>[0-9]*+)\}")
_FLAGS = re.compile(r"(?P<on>[ims]*+)(?:-(?P<off>[ims]++))?+:")
_FLAGS_OF_ALL = re.compile(r"\(\?([ims]++)\)")
_NAME = re.compile(r"P<[^\W\d]\w*+>")


@dataclass(frozen=True, slots=True)
class Letters:
    """A character class: the characters that may stand at one place of an expression."""

    characters: frozenset[str] = frozenset()
    ranges: tuple[tuple[str, str], ...] = ()
    kinds: tuple[str, ...] = ()  # keys of `KINDS`
    negated: bool = False
    ignores_case: bool = False

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The ranges of code points, both ends included, before negation. Never empty: [(1, 0)] matches nothing."""
        found = [(ord(one), ord(one)) for one in self.characters]
        return [*found, *((ord(low), ord(high)) for low, high in self.ranges)] or [(1, 0)]


@dataclass(frozen=True, slots=True)
class Gap:
    """A zero-width assertion between two characters, or at either end of the text."""

    kind: str
    """`A` start of the text, `Z` end of the text read so far, `^` and `$` start and end of a line, `b` and `B` word
    boundary and its opposite.
    """

    def fits(self, before: str, after: str) -> bool:
        """Return whether the assertion holds between two characters, "" at an end of the text."""
        match self.kind:
            case "A":
                return not before
            case "Z":
                return not after
            case "^":
                return before in ("", "\n")
            case "$":
                return after in ("", "\n")
            case _:
                is_edge = (before != "" and KINDS["w"](before)) != (after != "" and KINDS["w"](after))
                return is_edge == (self.kind == "b")


@dataclass(frozen=True, slots=True)
class Row:
    """A concatenation of parts."""

    parts: Sequence[Part]


@dataclass(frozen=True, slots=True)
class Either:
    """An alternation: exactly one of the parts."""

    parts: Sequence[Part]


@dataclass(frozen=True, slots=True)
class Times:
    """A repetition of a part."""

    part: Part
    least: int
    most: int | None  # None: no upper bound


Part = Letters | Gap | Row | Either | Times


def forms_of(character: str) -> frozenset[str]:
    """Return a character in both cases, and the characters that equal it in another case."""
    once = {character, character.lower(), character.upper()}
    return frozenset(form for one in once for form in (one, one.lower(), one.upper()) if len(form) == 1)


def parts_of(expression: str) -> Part:
    """Return the syntax tree of an expression. Raises BadRequest if it is invalid or uses an unsupported construct."""
    return _Reader(expression).read()


class _Reader:
    """Parses one expression. Each character is read once, except after a `{` that begins no repetition."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._names: set[str] = set()

    def read(self) -> Part:
        """Return the syntax tree. Raises BadRequest."""
        flags = frozenset[str]()
        while (found := _FLAGS_OF_ALL.match(self._text, self._at)) is not None:
            flags |= frozenset(found[1])
            self._at = found.end()
        part = self._either(flags)
        if self._at < len(self._text):
            raise self._wrong("a ) without its (")
        return part

    def _wrong(self, what: str) -> BadRequest:
        return BadRequest(f"{PARAM}: {shown(self._text)} has {what} at position {self._at}", param=PARAM)

    def _unsupported(self, what: str, instead: str = "") -> BadRequest:
        message = f"{PARAM}: {shown(self._text)} has {what} before position {self._at}, which is not supported{instead}"
        return BadRequest(message, param=PARAM)

    def _take(self, text: str) -> bool:
        if not self._text.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def _next(self, what: str) -> str:
        """Consume a character. what: the missing element, for the error at the end of the text."""
        if self._at >= len(self._text):
            raise self._wrong(what)
        self._at += 1
        return self._text[self._at - 1]

    def _either(self, flags: frozenset[str]) -> Part:
        parts = [self._row(flags)]
        while self._take("|"):
            parts.append(self._row(flags))
        return parts[0] if len(parts) == 1 else Either(parts)

    def _row(self, flags: frozenset[str]) -> Part:
        parts: list[Part] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            if self._times() is not None:
                raise self._wrong("nothing to repeat")
            begin = self._at
            part = self._one(flags)
            is_gap = self._text[begin : self._at] in _GAPS
            times = self._times()
            if times is not None:
                if is_gap:
                    raise self._wrong("nothing to repeat")
                if self._take("+"):
                    raise self._unsupported("a possessive repetition")
                self._take("?")  # a lazy repetition has the same matches; only the order of tries differs
                if self._times() is not None:
                    raise self._wrong("a repetition of a repetition")
                part = Times(part, *times)
            parts.append(part)
        return parts[0] if len(parts) == 1 else Row(parts)

    def _times(self) -> tuple[int, int | None] | None:
        """Consume a repetition and return its bounds; None if there is none."""
        found = _TIMES.match(self._text, self._at)
        if found is None or found[0] == "{}":
            return None
        self._at = found.end()
        if found[0] in "*+?":
            return int(found[0] == "+"), 1 if found[0] == "?" else None
        least = int(found["least"] or 0)
        most = least if not found["comma"] else int(found["most"]) if found["most"] else None
        if most is not None and least > most:
            raise self._wrong("a repetition of at least more than at most")
        return least, most

    def _one(self, flags: frozenset[str]) -> Part:
        character = self._next("an end")
        ignores_case = "i" in flags
        if character == "(":
            return self._group(flags)
        if character == "[":
            return self._letters(ignores_case)
        if character == ".":
            return Letters(frozenset() if "s" in flags else frozenset("\n"), negated=True)
        if character in "^$":
            return self._edge_of_line(character, flags)
        kind = ""
        if character == "\\":
            character, kind = self._escape()
            if f"\\{kind}" in _GAPS:
                return Gap(kind)
        if kind:
            return Letters(kinds=(kind,))
        return Letters(forms_of(character) if ignores_case else frozenset(character), ignores_case=ignores_case)

    def _edge_of_line(self, character: str, flags: frozenset[str]) -> Part:
        """Return the meaning of `^` or `$`: an edge of a line with the flag m, else of the whole text."""
        if "m" in flags:
            return Gap(character)
        if character == "^":
            return Gap("A")
        return Either((Gap("Z"), Row((Letters(frozenset("\n")), Gap("Z")))))

    def _group(self, flags: frozenset[str]) -> Part:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._wrong(f"groups nested deeper than {MAX_DEPTH}, which is the limit,")
        if self._take("?"):
            if (found := _FLAGS.match(self._text, self._at)) is not None:
                on, off = frozenset(found["on"]), frozenset(found["off"] or "")
                if on & off:
                    raise self._wrong("a flag that is both set and cleared")
                flags = (flags | on) - off
            elif (found := _NAME.match(self._text, self._at)) is None:
                raise self._unsupported(f"(?{self._text[self._at : self._at + 2]}")
            elif found[0] in self._names:
                raise self._wrong("a second group of a name")
            else:
                self._names.add(found[0])
            self._at = found.end()
        part = self._either(flags)
        if not self._take(")"):
            raise self._wrong("a ( without its )")
        self._depth -= 1
        return part

    def _escape(self, *, in_letters: bool = False) -> tuple[str, str]:
        """Return (character, "") of an escape for a character, or ("", kind) for a character class or an assertion."""
        character = self._next("a \\ and nothing after it")
        if character in KINDS:
            return "", character
        if character in _CONTROLS:
            return _CONTROLS[character], ""
        if character in _CODE_DIGITS:
            digits = self._text[self._at : self._at + _CODE_DIGITS[character]]
            is_whole = len(digits) == _CODE_DIGITS[character] and all(one in "0123456789abcdefABCDEF" for one in digits)
            if not is_whole or int(digits, 16) > 0x10FFFF:
                raise self._wrong(f"a \\{character} without the digits of a character")
            self._at += len(digits)
            return chr(int(digits, 16)), ""
        if in_letters and character == "b":
            return "\b", ""
        if f"\\{character}" in _GAPS and not in_letters:
            return "", character
        if character.isascii() and character.isdigit():
            raise self._unsupported(f"\\{character}", ": neither groups nor octal numbers can be referred to")
        if character.isascii() and character.isalpha():
            raise self._unsupported(f"\\{character}")
        return character, ""

    def _letters(self, ignores_case: bool) -> Letters:
        """Parse a bracketed character class after its `[`."""
        negated = self._take("^")
        characters, ranges, kinds, is_first = set[str](), list[tuple[str, str]](), list[str](), True
        while is_first or not self._take("]"):
            is_first = False
            low, kind = self._member()
            if self._text.startswith("-", self._at) and not self._text.startswith("-]", self._at):
                self._at += 1
                high, high_kind = self._member()
                if kind or high_kind or low > high:
                    raise self._wrong("a range that is none")
                ranges.append((low, high))
            elif kind:
                kinds.append(kind)
            else:
                characters |= forms_of(low) if ignores_case else {low}
        return Letters(frozenset(characters), tuple(ranges), tuple(kinds), negated, ignores_case)

    def _member(self) -> tuple[str, str]:
        character = self._next("a [ without its ]")
        return self._escape(in_letters=True) if character == "\\" else (character, "")


def shown(expression: str) -> str:
    """Return the beginning of an expression as errors show it."""
    return f"/{expression:.40}/"


def num_places(part: Part) -> int:
    """Return the number of characters, assertions and alternatives with repetitions expanded, at least 1."""
    match part:
        case Letters() | Gap():
            return 1
        case Row():
            return max(sum(map(num_places, part.parts)), 1)
        case Either():
            return len(part.parts) + sum(map(num_places, part.parts))
        case Times():
            return num_places(part.part) * max(part.least if part.most is None else part.most, 1)


def may_be_empty(part: Part) -> bool:
    """Return whether the part can match the empty text."""
    match part:
        case Letters():
            return False
        case Gap():
            return True
        case Row():
            return all(map(may_be_empty, part.parts))
        case Either():
            return any(map(may_be_empty, part.parts))
        case Times():
            return not part.least or may_be_empty(part.part)

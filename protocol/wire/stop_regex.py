r"""Regular expressions that end a text: read, held to limits, and looked for while the text grows.

The syntax (`regex_syntax.py`) and its meaning are Python's, as with SGLang. Several expressions become one automaton
without counters, Glushkov's: each of its places is one character of a match, and knows which places may come next.
`Search` keeps for each place where the earliest match began that has come there, so that a character costs the same few
operations on arrays of bounded size, whatever expression and text are, and where a match begins is known once it ends.

A gap (`^`, `$`, `\b`) is a place too, which a match passes between two characters. What comes after a text is not
known while it grows: `add` looks for matches as if each text that it is given were the last, as SGLang does after each
token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protocol.wire.errors import BadRequest
from protocol.wire.regex_syntax import (
    KINDS,
    PARAM,
    Either,
    Gap,
    Letters,
    Part,
    Row,
    Times,
    forms_of,
    may_be_empty,
    num_places,
    parts_of,
    shown,
)

MAX_EXPRESSIONS = 16

MAX_CHARACTERS = 1024
"""Most characters of a request's expressions together: they are read and made an automaton in 5 ms."""

MAX_PLACES = 512
"""Most characters and alternatives of a request's expressions, once counted repetitions are written out."""

MAX_LINKS = 4096
"""Most pairs of places that follow each other: (a?){64} has two thousand."""

MAX_KNOWN = 256
"""Characters of texts for which an automaton remembers which places they fit."""

MAX_KEPT = 32
"""Automata that are kept, the most recently used."""

NEVER = 1 << 62
"""A position behind every text."""


# ---------------------------------------------------------------- the automaton


class _Piece(NamedTuple):
    """Places as bits of numbers: those that a part of an expression begins with, and ends with."""

    first: int
    last: int
    may_be_empty: bool


_EMPTY = _Piece(0, 0, True)
_BEGINNING = 1  # the place before all others, as bits


class _Builder:
    """Writes parts out as places."""

    def __init__(self) -> None:
        self.letters: list[Letters] = []  # of each place but the one before all others, which is 0; of a gap none
        self.next: list[int] = [0]  # of each place, those that may follow
        self.gaps: dict[int, Gap] = {}
        self._gap_bits = 0
        self._num_links = 0

    def build(self, part: Part) -> _Piece:
        match part:
            case Letters() | Gap():
                self.letters.append(part if isinstance(part, Letters) else Letters())
                self.next.append(0)
                bits = 1 << len(self.letters)
                if isinstance(part, Gap):
                    self.gaps[len(self.letters)] = part
                    self._gap_bits |= bits
                return _Piece(bits, bits, False)
            case Row():
                piece = _EMPTY
                for one in part.parts:
                    piece = self._joined(piece, self.build(one))
                return piece
            case Either():
                piece = _Piece(0, 0, False)
                for one in map(self.build, part.parts):
                    piece = _Piece(
                        piece.first | one.first, piece.last | one.last, piece.may_be_empty or one.may_be_empty
                    )
                return piece
            case Times():
                return self._repeated(part)

    def _repeated(self, times: Times) -> _Piece:
        """Write a part out as often as it must be there, then as (x(x)?)? or x*, so that links stay few."""
        piece = last = _EMPTY
        for _ in range(times.least):
            last = self.build(times.part)
            piece = self._joined(piece, last)
        if times.most is None:
            if not times.least:
                last = self.build(times.part)
                piece = last._replace(may_be_empty=True)
            self.link(last.last, last.first)
            return piece
        rest = _EMPTY
        for _ in range(times.most - times.least):
            rest = self._joined(self.build(times.part), rest)._replace(may_be_empty=True)
        return self._joined(piece, rest)

    def _joined(self, one: _Piece, other: _Piece) -> _Piece:
        self.link(one.last, other.first)
        return _Piece(
            one.first | (other.first if one.may_be_empty else 0),
            other.last | (one.last if other.may_be_empty else 0),
            one.may_be_empty and other.may_be_empty,
        )

    def link(self, lasts: int, firsts: int) -> None:
        """Let places follow others. Raises BadRequest when there are too many such pairs."""
        for place in _bits(lasts):
            if place in self.gaps and firsts & self._gap_bits:
                text = f"{PARAM} has one of ^ $ \\A \\Z \\b \\B right after another, which is not supported"
                raise BadRequest(text, param=PARAM)
            self._num_links += (firsts & ~self.next[place]).bit_count()
            self.next[place] |= firsts
            if self._num_links > MAX_LINKS:
                text = f"{PARAM} has more than {MAX_LINKS} pairs of characters that may follow each other"
                raise BadRequest(f"{text}, which is the limit: use fewer optional parts in a row", param=PARAM)


def _bits(number: int) -> Iterator[int]:
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest


class _Alphabet:
    """Which places a character fits, found out for all at once, since a text may have ever new characters."""

    def __init__(self, of_places: Sequence[Letters]) -> None:
        distinct = list(dict.fromkeys(of_places))
        which = {letters: i for i, letters in enumerate(distinct)}
        spans = [letters.spans for letters in distinct]
        self._which = np.array([which[letters] for letters in of_places], np.intp)
        self._lows, self._highs = np.array([span for some in spans for span in some], np.int64).T.copy()
        self._begins = np.cumsum([0, *map(len, spans)])[:-1].astype(np.intp)  # of each entry's spans
        self._kinds = np.array([[kind in letters.kinds for kind in KINDS] for letters in distinct], bool)
        self._negated = np.array([letters.negated for letters in distinct], bool)
        self._ignores_case = np.array([letters.ignores_case for letters in distinct], bool)

    def fits(self, character: str) -> NDArray[np.bool_]:
        """Return whether a character may stand at each place."""
        found = self._has(character)
        if self._ignores_case.any():
            for form in forms_of(character) - {character}:
                found |= self._has(form) & self._ignores_case
        return (found ^ self._negated)[self._which]

    def _has(self, character: str) -> NDArray[np.bool_]:
        number, kinds = ord(character), [is_one(character) for is_one in KINDS.values()]
        inside = np.logical_or.reduceat((self._lows <= number) & (number <= self._highs), self._begins)
        return inside | (self._kinds & kinds).any(axis=1)


class Reading(NamedTuple):
    """What a character means to an automaton."""

    unfit: NDArray[np.bool_]  # bool [places]: where it may not stand
    may_begin: bool  # a match
    may_end: bool


class Automaton:
    """Expressions as places, each of which is a character of a match. Never changed, but for what it remembers."""

    def __init__(self, expressions: Sequence[str]) -> None:
        """Make it. Raises BadRequest for what is no expression, matches the empty text, or is beyond the limits."""
        parts = [parts_of(expression) for expression in expressions]
        num = sum(map(num_places, parts))
        if num > MAX_PLACES:
            shown_num = str(num) if num < 1_000_000 else "a million or more"
            text = f"{PARAM} has {shown_num} characters and alternatives when its repetitions are written out"
            raise BadRequest(f"{text}; the limit is {MAX_PLACES}", param=PARAM)
        builder = _Builder()
        ends: list[tuple[int, int]] = []  # a place where a match may end, and of which expression
        for index, (expression, part) in enumerate(zip(expressions, parts, strict=True)):
            if may_be_empty(part):
                text = f"{PARAM}: {shown(expression)} matches the empty text, with which every answer begins"
                raise BadRequest(text, param=PARAM)
            piece = builder.build(part)
            builder.link(_BEGINNING, piece.first)
            ends += [(place - 1, index) for place in _bits(piece.last)]
        before: list[list[int]] = [[] for _ in builder.letters]  # of each place, those that it may follow
        for place, following in enumerate(builder.next):
            for other in _bits(following):
                before[other - 1].append(place)
        self.num_places = len(builder.letters)
        self.links = np.array([place for places in before for place in places], np.intp)
        self.begins = np.cumsum([0, *map(len, before)])[:-1].astype(np.intp)  # of each place's `links`
        self.ends = np.array([place for place, _ in ends], np.intp)
        self.expression_of = [index for _, index in ends]
        self.gaps = [(gap, place - 1) for place, gap in builder.gaps.items()]
        self._alphabet = _Alphabet(builder.letters)
        firsts = builder.next[0]
        for place in builder.gaps:
            firsts |= builder.next[place] if builder.next[0] >> place & 1 else 0
        self._firsts = np.array(list(_bits(firsts)), np.intp) - 1
        self._known: dict[str, Reading] = {}

    def reading(self, character: str) -> Reading:
        """Return where a character may stand."""
        found = self._known.get(character)
        if found is None:
            fits = self._alphabet.fits(character)
            found = Reading(~fits, bool(fits[self._firsts].any()), bool(fits[self.ends].any()))
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[character] = found
        return found


@lru_cache(MAX_KEPT)
def automaton_of(expressions: tuple[str, ...]) -> Automaton:
    """Return the automaton of expressions. Raises BadRequest as `Automaton` does."""
    return Automaton(expressions)


def checked(expressions: str | Sequence[str] | None) -> list[str]:
    """Return a request's expressions without empty ones. Raises BadRequest for those that are not served."""
    given = [one for one in ([expressions] if isinstance(expressions, str) else expressions or ()) if one]
    if len(given) > MAX_EXPRESSIONS:
        raise BadRequest(f"{PARAM} has {len(given)} expressions; the limit is {MAX_EXPRESSIONS}", param=PARAM)
    num_characters = sum(map(len, given))
    if num_characters > MAX_CHARACTERS:
        raise BadRequest(f"{PARAM} has {num_characters} characters; the limit is {MAX_CHARACTERS}", param=PARAM)
    if given:
        automaton_of(tuple(given))
    return given


# ---------------------------------------------------------------- the search


class Match(NamedTuple):
    """Where a match lies in all text read so far."""

    begin: int
    expression: int  # its index
    end: int


class Search:
    """Looks for an automaton's expressions in a text that grows."""

    def __init__(self, automaton: Automaton) -> None:
        self._automaton = automaton
        self._began = np.full(1 + automaton.num_places, NEVER, np.int64)
        self._places = self._began[1:]  # of each: where the earliest match began that has come there, or NEVER
        self._along = np.empty(len(automaton.links), np.int64)
        self._arriving = np.empty(automaton.num_places, np.int64)
        self._gap_kinds = list(dict.fromkeys(gap for gap, _ in automaton.gaps))
        self._gap_places = np.array([place for _, place in automaton.gaps], np.intp)
        self._kind_of_gap = np.array([self._gap_kinds.index(gap) for gap, _ in automaton.gaps], np.intp)
        self._num_read = 0
        self._last = ""  # the character that was read last
        self.earliest = NEVER
        """Where the earliest match begins that is under way, `NEVER` if none is."""
        self.match: Match | None = None
        """The match that begins first; of those that begin alike, the first expression's, as long as it is there."""

    def add(self, text: str) -> None:
        """Read more text. Once there is a match, nothing more may be added."""
        automaton, began, places = self._automaton, self._began, self._places
        has_gaps = bool(automaton.gaps)
        for character in text:
            unfit, may_begin, may_end = automaton.reading(character)
            last, self._last = self._last, character
            began[0] = self._num_read
            if self.earliest == NEVER and not may_begin:
                self._num_read += 1
                continue
            if has_gaps:
                self._pass_gaps(last, character)
            self._num_read += 1
            self._arrive(places)
            np.putmask(places, unfit, NEVER)
            self.earliest = int(places.min())
            if may_end and self.earliest != NEVER:
                self._note_match(places[automaton.ends])
        if has_gaps and self.earliest != NEVER:
            began[0] = NEVER
            self._pass_gaps(self._last, "")
            places[self._gap_places] = NEVER

    def _arrive(self, places: NDArray[np.int64]) -> None:
        """Write where the earliest match began that may come to each place next. places: int64 [places]."""
        np.take(self._began, self._automaton.links, out=self._along, mode="clip")
        np.minimum.reduceat(self._along, self._automaton.begins, out=places)

    def _pass_gaps(self, before: str, after: str) -> None:
        """Let matches pass between two characters, "" where there is none, and take those that end there."""
        fits = np.array([gap.fits(before, after) for gap in self._gap_kinds])[self._kind_of_gap]
        self._arrive(self._arriving)
        self._places[self._gap_places] = np.where(fits, self._arriving[self._gap_places], NEVER)
        self._note_match(self._places[self._automaton.ends])

    def _note_match(self, begins: NDArray[np.int64]) -> None:
        """Take the matches that end here. begins: of each place where one may, int64."""
        index = int(begins.argmin())  # the first of the smallest
        begin, expression = int(begins[index]), self._automaton.expression_of[index]
        if begin != NEVER and (self.match is None or (begin, expression) <= self.match[:2]):
            self.match = Match(begin, expression, self._num_read)

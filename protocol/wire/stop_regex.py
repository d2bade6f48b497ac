r"""Regular expressions that end a text: parsed, limited in size, and searched while the text grows.

The syntax (`regex_syntax.py`) and its meaning are Python's, as with SGLang. Several expressions become one Glushkov
automaton without counters: each of its places is one character of a match and has a set of successors. `Search` stores
for each place the beginning of the earliest match that has reached it. So every character costs the same few operations
on arrays of bounded size, for any expression and text. The beginning of a match is known as soon as the match ends.

An assertion (`^`, `$`, `\b`) is a place too, which a match passes between two characters. The text that follows is not
known while it grows. So `add` searches as if each text that it receives were the last, as SGLang does after each token.
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
"""Maximum number of characters of a request's expressions together; they are parsed and built in 5 ms."""

MAX_PLACES = 512
"""Maximum number of characters and alternatives of a request's expressions, with counted repetitions expanded."""

MAX_LINKS = 4096
"""Maximum number of pairs of successive places: (a?){64} has two thousand."""

MAX_KNOWN = 256
"""Number of characters for which an automaton caches the places that they fit."""

MAX_KEPT = 32
"""Number of cached automata, the most recently used ones."""

NEVER = 1 << 62
"""A position after the end of any text."""


# ---------------------------------------------------------------- the automaton


class _Piece(NamedTuple):
    """Places of a part as bit masks: those that may begin its match, and those that may end it."""

    first: int
    last: int
    may_be_empty: bool


_EMPTY = _Piece(0, 0, True)
_BEGINNING = 1  # bit of the start place, number 0


class _Builder:
    """Expands parts of a syntax tree into places."""

    def __init__(self) -> None:
        self.letters: list[Letters] = []  # by place without the start place 0; an empty class for an assertion
        self.next: list[int] = [0]  # by place, bit mask of its successors
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
        """Write the required repetitions out, then the optional ones as (x(x)?)? or x*, which keeps the links few."""
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
        """Add successors to places. Raises BadRequest if there are too many pairs, or for two assertions in a row."""
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
    """Finds the places that a character fits, for all places at once, since a text may bring new characters forever."""

    def __init__(self, of_places: Sequence[Letters]) -> None:
        distinct = list(dict.fromkeys(of_places))
        which = {letters: i for i, letters in enumerate(distinct)}
        spans = [letters.spans for letters in distinct]
        self._which = np.array([which[letters] for letters in of_places], np.intp)
        self._lows, self._highs = np.array([span for some in spans for span in some], np.int64).T.copy()
        self._begins = np.cumsum([0, *map(len, spans)])[:-1].astype(np.intp)  # first span of each distinct class
        self._kinds = np.array([[kind in letters.kinds for kind in KINDS] for letters in distinct], bool)
        self._negated = np.array([letters.negated for letters in distinct], bool)
        self._ignores_case = np.array([letters.ignores_case for letters in distinct], bool)

    def fits(self, character: str) -> NDArray[np.bool_]:
        """Return, bool [places], whether a character may stand at each place."""
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
    """How an automaton treats a character."""

    unfit: NDArray[np.bool_]  # bool [places]: True where the character may not stand
    may_begin: bool  # whether it may begin a match
    may_end: bool  # whether it may end a match


class Automaton:
    """Several expressions as one set of places, each a character of a match. Immutable except for a cache."""

    def __init__(self, expressions: Sequence[str]) -> None:
        """Build the automaton. Raises BadRequest if one is invalid, matches the empty text or exceeds a limit."""
        parts = [parts_of(expression) for expression in expressions]
        num = sum(map(num_places, parts))
        if num > MAX_PLACES:
            shown_num = str(num) if num < 1_000_000 else "a million or more"
            text = f"{PARAM} has {shown_num} characters and alternatives when its repetitions are written out"
            raise BadRequest(f"{text}; the limit is {MAX_PLACES}", param=PARAM)
        builder = _Builder()
        ends: list[tuple[int, int]] = []  # (place where a match may end, index of its expression)
        for index, (expression, part) in enumerate(zip(expressions, parts, strict=True)):
            if may_be_empty(part):
                text = f"{PARAM}: {shown(expression)} matches the empty text, with which every answer begins"
                raise BadRequest(text, param=PARAM)
            piece = builder.build(part)
            builder.link(_BEGINNING, piece.first)
            ends += [(place - 1, index) for place in _bits(piece.last)]
        before: list[list[int]] = [[] for _ in builder.letters]  # by place, its predecessors
        for place, following in enumerate(builder.next):
            for other in _bits(following):
                before[other - 1].append(place)
        self.num_places = len(builder.letters)
        self.links = np.array([place for places in before for place in places], np.intp)
        self.begins = np.cumsum([0, *map(len, before)])[:-1].astype(np.intp)  # first entry of each place in `links`
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
        """Return where a character may stand; cached."""
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
    """Return the automaton of expressions, cached. Raises BadRequest as `Automaton` does."""
    return Automaton(expressions)


def checked(expressions: str | Sequence[str] | None) -> list[str]:
    """Return a request's expressions without empty ones. Raises BadRequest if they are invalid or exceed a limit."""
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
    """The position of a match in all text read so far."""

    begin: int
    expression: int  # index of the expression
    end: int


class Search:
    """Searches a growing text for the expressions of an automaton."""

    def __init__(self, automaton: Automaton) -> None:
        self._automaton = automaton
        self._began = np.full(1 + automaton.num_places, NEVER, np.int64)
        self._places = self._began[1:]  # by place: beginning of the earliest match that has reached it, or NEVER
        self._along = np.empty(len(automaton.links), np.int64)
        self._arriving = np.empty(automaton.num_places, np.int64)
        self._gap_kinds = list(dict.fromkeys(gap for gap, _ in automaton.gaps))
        self._gap_places = np.array([place for _, place in automaton.gaps], np.intp)
        self._kind_of_gap = np.array([self._gap_kinds.index(gap) for gap, _ in automaton.gaps], np.intp)
        self._num_read = 0
        self._last = ""  # the last character read
        self.earliest = NEVER
        """The beginning of the earliest unfinished match; `NEVER` if there is none."""
        self.match: Match | None = None
        """The match that begins first; among equals the first expression's, as long as the text read allows."""

    def add(self, text: str) -> None:
        """Read more text. Must not be called once there is a match."""
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
        """Write to `places`, int64 [places], the beginning of the earliest match that may reach each place next."""
        np.take(self._began, self._automaton.links, out=self._along, mode="clip")
        np.minimum.reduceat(self._along, self._automaton.begins, out=places)

    def _pass_gaps(self, before: str, after: str) -> None:
        """Advance matches through assertions between two characters ("" at an end), and note those that end there."""
        fits = np.array([gap.fits(before, after) for gap in self._gap_kinds])[self._kind_of_gap]
        self._arrive(self._arriving)
        self._places[self._gap_places] = np.where(fits, self._arriving[self._gap_places], NEVER)
        self._note_match(self._places[self._automaton.ends])

    def _note_match(self, begins: NDArray[np.int64]) -> None:
        """Store the best match that ends here. begins: int64, the beginning of the match at each ending place."""
        index = int(begins.argmin())  # the first of the smallest
        begin, expression = int(begins[index]), self._automaton.expression_of[index]
        if begin != NEVER and (self.match is None or (begin, expression) <= self.match[:2]):
            self.match = Match(begin, expression, self._num_read)

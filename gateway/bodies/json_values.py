"""Estimates the cost of a JSON text by counting its bytes, before any value is created. Pure.

orjson holds the GIL during a call, in any thread. So a long text is counted, and then parsed, in pieces of a tenth of a
millisecond: in a thread, the event loop runs between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from protocol.wire.errors import BadRequest

MAX_DEPTH = 100
"""Maximum nesting of lists and objects; all later readers of JSON support it."""

MAX_VALUES = 1 << 20
"""Maximum values, with keys, of a text of up to 4 MB; a larger text may have one per four bytes."""

MAX_CONTAINERS = 1 << 14
"""Maximum lists and objects: each takes fifty times its bytes."""

MAX_STRINGS = 1 << 16
"""Maximum strings, including keys."""

MAX_FIELDS = 1 << 9
"""Maximum fields of the outermost object: several times as many as any API's body has."""

PIECE_BYTES, PIECE_MARKS = 1 << 16, 1 << 10
"""Bytes and marks processed at once; a longer single string or number is processed in one call."""

_SPACE = b" \t\r\n"
_QUOTE, _COMMA, _COLON, _LIST = b'",:['
_CHANGE = np.zeros(256, np.int8)
_CHANGE[list(b"[{")], _CHANGE[list(b"]}")] = 1, -1
_IS_MARK = _CHANGE != 0
_IS_MARK[list(b'",:')] = True


def loads(raw: bytes, what: str = "the body") -> Any:
    """Return the value of a JSON text. Raises BadRequest if it costs too much, JSONDecodeError if it is invalid.

    As JSON demands, NaN, Infinity and lone surrogates are invalid.
    """
    return orjson.loads(raw) if is_shallow(raw) else Marks(raw, what).value()


def is_shallow(raw: bytes) -> bool:
    """Return whether a JSON text is so short, with so few brackets, that it can be parsed at once."""
    return len(raw) <= MAX_CONTAINERS and raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH


def loads_kept(raw: bytes) -> Any:
    """Return the value of a stored JSON text: parsed in pieces, or at once if it exceeds the limits of a body.

    Stored texts may combine several bodies. Raises JSONDecodeError.
    """
    try:
        return loads(raw)
    except BadRequest:
        return orjson.loads(raw)


def marks_of(
    raw: bytes | bytearray, piece_bytes: int = PIECE_BYTES
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.int64], int]]:
    """Yield the marks (brackets, commas, colons) outside of strings, one piece of the text at a time.

    For each piece: the marks' positions, their bytes, the nesting depth after each mark, and the number of unescaped
    quotes so far.
    """
    begin = num_quotes = depth = 0
    while begin < len(raw):
        piece = raw[begin : begin + piece_bytes]
        if b"\\" in piece:
            if (len(piece) - len(piece.rstrip(b"\\"))) % 2:  # include the escaped character
                piece = raw[begin : begin + len(piece) + 1]
            # Mask escapes, so that every quote begins or ends a string.
            text = np.frombuffer(piece.replace(rb"\\", b"__").replace(rb"\"", b"__"), np.uint8)
        else:
            text = np.frombuffer(piece, np.uint8)
        places = np.flatnonzero(_IS_MARK[text])
        kinds = text[places]
        quotes = kinds == _QUOTE
        before = num_quotes + np.cumsum(quotes)
        is_outside = (before % 2 == 0) & ~quotes
        places, kinds = places[is_outside], kinds[is_outside]
        depths = depth + np.cumsum(_CHANGE[kinds], dtype=np.int64)
        depth = int(depths[-1]) if len(kinds) else depth
        num_quotes += int(np.count_nonzero(quotes))
        yield (places + begin).astype(np.int32), kinds, depths, num_quotes
        begin += len(piece)


class Marks:
    """The brackets, commas and colons of a JSON text outside of strings, with their nesting levels.

    The outermost list or object has level 1; its own brackets, commas and colons are of its level.
    """

    def __init__(
        self, raw: bytes, what: str = "the body", *, piece_bytes: int = PIECE_BYTES, piece_marks: int = PIECE_MARKS
    ) -> None:
        """Find the marks. Raises BadRequest if the text costs too much, JSONDecodeError if its brackets do not match.

        piece_bytes, piece_marks: bytes and marks processed at once.
        """
        self._piece_bytes, self._piece_marks = piece_bytes, piece_marks
        self._raw = raw
        self._what = what
        self._num_values = self.num_containers = 0
        found = [*self._count(), (np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(0, np.int8))]
        self._places, self._kinds, self._levels = (np.concatenate(part) for part in zip(*found, strict=True))
        self._order = np.argsort(self._levels, kind="stable").astype(np.int32)
        self._starts = np.searchsorted(self._levels[self._order], np.arange(MAX_DEPTH + 2))
        if raw.lstrip(_SPACE)[:1] == b"{":
            outer = self._kinds[self._order[self._starts[1] : self._starts[2]]]
            self._check("fields", int(np.count_nonzero(outer == _COMMA)) + 1, MAX_FIELDS)

    @property
    def num_values(self) -> int:
        """Upper bound of the number of values, including keys."""
        return self._num_values

    def value(self) -> Any:
        """Return the parsed value. Raises JSONDecodeError if the text is invalid."""
        raw, places = self._raw, self._places
        last = len(places) - 1
        is_short = last < self._piece_marks and len(raw) <= self._piece_bytes
        if is_short or last < 0:
            return self._read(0, b"", len(raw), b"")
        if not self._is_container(0, last, 1):
            raise self._broken("unexpected character", self._odd_place(0, 1))
        self._check_blank(0, places[0])
        self._check_blank(places[last] + 1, len(raw))
        return self._container(0, last, 1)

    # ------------------------------------------------------------ counting

    def _count(self) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        """Yield positions, bytes and levels of the marks, one piece of the text at a time."""
        num_commas = num_quotes = depth = 0
        most = max(MAX_VALUES, len(self._raw) // 4)
        for places, kinds, depths, num_quotes in marks_of(self._raw, self._piece_bytes):
            change = _CHANGE[kinds]
            if len(kinds):
                if depths.min() < 0:
                    raise self._broken("unexpected character", int(places[depths.argmin()]))
                if depths.max() > MAX_DEPTH:
                    raise BadRequest(f"{self._what} is nested too deeply; the limit is {MAX_DEPTH} levels")
            self.num_containers += int(np.count_nonzero(change > 0))
            num_commas += int(np.count_nonzero(change == 0))
            self._check("strings", num_quotes // 2, MAX_STRINGS)
            self._check("lists and objects", self.num_containers, MAX_CONTAINERS)
            self._check("values", num_commas + self.num_containers + 1, most)
            depth = int(depths[-1]) if len(kinds) else depth
            yield places, kinds, (depths + (change < 0)).astype(np.int8)
        if depth or num_quotes % 2:
            raise self._broken("unexpected end of data", len(self._raw))
        self._num_values = num_commas + self.num_containers + 1

    def _check(self, of: str, num: int, limit: int) -> None:
        if num > limit:
            raise BadRequest(f"{self._what} has {num} {of}; the limit is {limit}")

    # ------------------------------------------------------------ reading

    def _own(self, begin: int, end: int, level: int) -> NDArray[np.int32]:
        """Return the marks of a level in [begin, end]."""
        own = self._order[self._starts[level] : self._starts[level + 1]]
        return own[_num_below(own, begin) : _num_below(own, end + 1)]

    def _is_container(self, begin: int, end: int, level: int) -> bool:
        """Return whether two marks begin and end one list or object of a level."""
        own = self._own(begin, end, level)
        change = _CHANGE[self._kinds[own]]
        is_whole = len(own) > 1 and own[0] == begin and own[-1] == end and change[0] == 1 and change[-1] == -1
        return bool(is_whole) and np.count_nonzero(change) == 2

    def _odd_place(self, begin: int, level: int) -> int:
        """Return the position of the first unexpected mark from `begin` on, where a list or object should end.

        level: of that list or object. Parsing all of it to find the first error would take too long.
        """
        if _CHANGE[self._kinds[begin]] != 1:
            return int(self._places[begin])
        own = self._own(begin, len(self._places) - 1, level)
        return int(self._places[own[_CHANGE[self._kinds[own]] == -1][0] + 1])

    def _container(self, begin: int, end: int, level: int) -> Any:
        """Return the list or object between two marks."""
        is_list = self._kinds[begin] == _LIST
        left, right = (b"[", b"]") if is_list else (b"{", b"}")
        if self._kinds[end] != right[0]:
            raise self._broken("unexpected character", int(self._places[end]))
        values: list[Any] = []
        fields: dict[str, Any] = {}
        if end == begin + 1 and not self._raw[self._places[begin] + 1 : self._places[end]].strip(_SPACE):
            return values if is_list else fields
        own = self._own(begin, end, level)[1:]
        ends = own[self._kinds[own] != _COLON]  # the mark after each entry
        places = self._places[ends]
        before, done = begin, 0  # the mark before the next entry, and the number of parsed entries
        while done < len(ends):
            start = int(self._places[before]) + 1
            most = before + self._piece_marks, start + self._piece_bytes
            num = min(_num_below(ends, most[0]), _num_below(places, most[1])) - done
            if num > 0:
                found = self._read(start, left, int(places[done + num - 1]), right)
                if not found:  # an entry is missing before or after a comma
                    raise self._broken("unexpected character", start)
                values.extend(found) if is_list else fields.update(found)
            elif is_list:
                num = 1
                values.append(self._large(before, int(ends[done]), level))
            else:
                num = 1
                colon = before + 1
                if self._kinds[colon] != _COLON or self._levels[colon] != level:
                    raise self._broken("unexpected character", start)
                key = self._read(start, b"", int(self._places[colon]), b"")
                if not isinstance(key, str):
                    raise self._broken("unexpected character", start)
                fields[key] = self._large(colon, int(ends[done]), level)
            done += num
            before = int(ends[done - 1])
        return values if is_list else fields

    def _large(self, before: int, after: int, level: int) -> Any:
        """Return the value between two marks of a level."""
        begin, end = before + 1, after - 1
        if begin > end:
            return self._read(int(self._places[before]) + 1, b"", int(self._places[after]), b"")
        if not self._is_container(begin, end, level + 1):
            raise self._broken("unexpected character", self._odd_place(begin, level + 1))
        self._check_blank(int(self._places[before]) + 1, int(self._places[begin]))
        self._check_blank(int(self._places[end]) + 1, int(self._places[after]))
        return self._container(begin, end, level + 1)

    def _read(self, begin: int, left: bytes, end: int, right: bytes) -> Any:
        """Return the value of a part of the text, enclosed in brackets."""
        try:
            return orjson.loads(left + self._raw[begin:end] + right if left else memoryview(self._raw)[begin:end])
        except orjson.JSONDecodeError as error:
            raise self._broken(error.msg, begin, error.pos - len(left)) from None

    def _check_blank(self, begin: int, end: int) -> None:
        if self._raw[begin:end].strip(_SPACE):
            raise self._broken("unexpected character", begin)

    def _broken(self, reason: str, num_bytes: int, num_characters: int = 0) -> orjson.JSONDecodeError:
        """Return the error at a position of the text, given in bytes plus characters."""
        at = len(self._raw[:num_bytes].decode(errors="replace")) + num_characters
        return orjson.JSONDecodeError(reason, "", at)


def _num_below(sorted_numbers: NDArray[np.int32], number: int) -> int:
    """Return how many of some sorted numbers are below `number`.

    The conversion to int32 keeps numpy from converting the whole array to int64 on each call.
    """
    return int(np.searchsorted(sorted_numbers, np.int32(number)))

"""Reads a few fields of a long JSON text, without most of its content. Pure.

msgspec makes no objects of unrequested values, but skips them in one call that holds the GIL, in any thread: 16 ms for
4 MB of lists. So a long text is checked in pieces of 64 kB, and only its outline is decoded. A longer single string,
number or run of whitespace is checked in one call: up to 15 ms for 4 MB.
"""

from __future__ import annotations

import re
from bisect import bisect_right

import msgspec
import numpy as np
from msgspec import Raw
from numpy.typing import NDArray

from gateway.bodies.json_values import PIECE_BYTES, marks_of

LONG_BYTES = 1 << 13
"""Minimum bytes of a string that is left out: ids and model names are always shorter."""

MAX_OUTLINE_BYTES, MAX_PARTS = 1 << 18, 1 << 10
"""Maximum bytes of a long text's outline, which take half a millisecond; maximum number of omitted values."""

MAX_OPEN = 1000
"""Maximum nesting: msgspec's own limit depends on the thread's stack and Python's version; bodies are limited to
less."""

_LIST, _COMMA = b"[,"
_OPENING, _CLOSING = np.zeros(256, np.bool_), np.zeros(256, np.bool_)
_OPENING[list(b"[{")] = _CLOSING[list(b"]}")] = True
_NOT_BLANK = re.compile(rb"[^ \t\r\n]")
_AT_BYTE = re.compile(r"\(byte (\d+)\)")
_BEFORE = {b"[": b"[0,", b"{": b'{"":0,'}  # prefix of a piece that follows a comma
_AFTER = {b"[": b"0]", b"{": b'"":0}'}  # suffix of a piece that ends with one
_ENDS = bytes.maketrans(b"[{", b"]}")
_Places = NDArray[np.int32]


class TooManyFields(ValueError):
    """The text's outline would be too long."""


class Outline:
    """A JSON text in which long strings, and deeply nested lists and objects, are replaced by empty ones."""

    def __init__(self, raw: bytes | bytearray, levels: int, *, piece_bytes: int = PIECE_BYTES) -> None:
        """Check a text and make its outline; a text of at most a quarter of a piece is kept whole.

        levels: nesting depth down to which objects keep their fields; lists are emptied. piece_bytes: bytes checked at
        once. Raises DecodeError as msgspec does, RecursionError if the text is nested too deeply, TooManyFields.
        """
        self._raw = raw
        self._piece_bytes = piece_bytes
        self._levels = levels
        self._parts: list[bytes | bytearray] = []
        self._froms: list[int] = []  # start of each part in the text
        self._starts: list[int] = []  # start of each part in the outline
        self._num_bytes = 0
        self._from = 0  # start of kept bytes that are in no part yet
        self._before = 0  # end of the last kept mark
        self._inside = 0  # level of the list or object being left out, 0 for none
        if len(raw) <= piece_bytes // 4:
            self.text = raw
            self._froms, self._starts = [0], [0]
        else:
            self._read()
            self.text = b"".join(self._parts)

    def span(self, value: Raw) -> tuple[int, int]:
        """Return begin and end, in the text, of a value of the outline. value: was decoded from `text`."""
        view = memoryview(value)
        begin = _address(view) - _address(self.text)
        return self._place(begin), self._place(begin + len(view) - 1) + 1

    def _place(self, at: int) -> int:
        part = bisect_right(self._starts, at) - 1
        return self._froms[part] + at - self._starts[part]

    # ------------------------------------------------------------ reading

    def _read(self) -> None:
        """Check the text, and collect the parts of its outline."""
        done, opened = 0, b""  # number of checked bytes, and the open brackets there
        is_open = b""  # open brackets after the last piece
        for places, kinds, depths, _ in marks_of(self._raw, self._piece_bytes):
            if not len(kinds):
                continue
            if depths.max() > MAX_OPEN:
                raise RecursionError
            if depths.min() < 0:
                self._check(done, opened, int(places[-1]) + 1, b"")  # raises: an unmatched closing bracket
            commas = np.flatnonzero((kinds == _COMMA) & (depths > 0))
            if len(commas):
                num = int(commas[-1]) + 1
                is_open = _open_after(is_open, kinds[:num], depths[:num])
                self._check(done, opened, int(places[num - 1]) + 1, is_open)
                done, opened = int(places[num - 1]) + 1, is_open
                is_open = _open_after(is_open, kinds[num:], depths[num:])
            else:
                is_open = _open_after(is_open, kinds, depths)
            self._outline(places, kinds, depths)
        self._check(done, opened, len(self._raw), b"")
        self._add(len(self._raw))

    def _check(self, begin: int, opened: bytes, end: int, is_open: bytes) -> None:
        """Check a part of the text. Raises as msgspec does.

        opened, is_open: the open brackets at its beginning, which follows a comma, and at its end, which is a comma.
        """
        left = opened[:-1].replace(b"{", b'{"":') + _BEFORE.get(opened[-1:], b"")
        right = _AFTER.get(is_open[-1:], b"") + is_open[:-1][::-1].translate(_ENDS)
        try:
            msgspec.json.decode(b"".join((left, self._raw[begin:end], right)), type=Raw)
        except msgspec.DecodeError as error:
            text = _AT_BYTE.sub(lambda found: f"(byte {int(found[1]) - len(left) + begin})", str(error))
            raise msgspec.DecodeError(text) from None

    def _outline(self, places: _Places, kinds: NDArray[np.uint8], depths: NDArray[np.int64]) -> None:
        """Find the kept parts of one piece of the text."""
        opening, closing = _OPENING[kinds], _CLOSING[kinds]
        begins = np.flatnonzero(opening & ((kinds == _LIST) | (depths > self._levels)))
        ends = {level: np.flatnonzero(closing & (depths == level - 1)) for level in range(1, self._levels + 2)}
        at = 0  # number of processed marks
        while at < len(places):
            if self._inside:
                found = ends[self._inside]
                num = int(np.searchsorted(found, at))
                if num == len(found):
                    return
                at, self._inside = int(found[num]), 0
                self._from = self._before = int(places[at])
                continue  # the closing bracket is kept
            num = int(np.searchsorted(begins, at))
            next_at = int(begins[num]) + 1 if num < len(begins) else len(places)
            self._keep(places[at:next_at])
            if num < len(begins):
                self._inside = int(depths[next_at - 1])
                self._add(int(places[next_at - 1]) + 1)
            at = next_at

    def _keep(self, places: _Places) -> None:
        """Keep the text up to some marks, except long strings before each of them."""
        ends = np.concatenate((np.array([self._before - 1], np.int32), places))
        for at in np.flatnonzero(np.diff(ends) > LONG_BYTES):
            begin, end = int(ends[at]) + 1, int(ends[at + 1])
            found = _NOT_BLANK.search(self._raw, begin, begin + LONG_BYTES)
            if found is not None and found[0] == b'"':
                last = self._raw.rindex(b'"', begin, end)
                if last - found.start() > LONG_BYTES:  # the string itself is long, not the whitespace around it
                    self._add(found.end())
                    self._from = last
        self._before = int(places[-1]) + 1

    def _add(self, end: int) -> None:
        """Add the kept bytes up to `end` as a part."""
        self._parts.append(self._raw[self._from : end])
        self._froms.append(self._from)
        self._starts.append(self._num_bytes)
        self._num_bytes += end - self._from
        if self._num_bytes > MAX_OUTLINE_BYTES or len(self._parts) > MAX_PARTS:
            raise TooManyFields(f"more than {MAX_PARTS} fields, or {MAX_OUTLINE_BYTES} bytes of them")


def _open_after(is_open: bytes, kinds: NDArray[np.uint8], depths: NDArray[np.int64]) -> bytes:
    """Return the open brackets after some marks. is_open: those before them."""
    if not len(kinds):
        return is_open
    begins = np.flatnonzero(_OPENING[kinds])
    last = np.zeros(MAX_OPEN + 1, np.int64)
    last[depths[begins]] = begins  # numpy keeps the last of each level
    kept = min(len(is_open), int(depths.min()))
    return is_open[:kept] + kinds[last[kept + 1 : int(depths[-1]) + 1]].tobytes()


def _address(view: bytes | bytearray | memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data

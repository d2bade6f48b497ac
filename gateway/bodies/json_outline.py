"""A long JSON text without most of what is in it, for readers that look at a few fields. Pure.

msgspec makes no values of what nobody asks for, but it passes over it in one go and holds the interpreter meanwhile, in
whatever thread: 16 ms for 4 MB of lists. So a long text is checked in pieces of 64 kB, and what is read is its outline.
A single string, number or run of blanks that is longer is checked at once: up to 15 ms for one of 4 MB.
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
"""Bytes from which on a string is left out: an id or the name of a model never has as many."""

MAX_OUTLINE_BYTES, MAX_PARTS = 1 << 18, 1 << 10
"""Most bytes of a long text's outline, half a millisecond, and most lists, objects and strings that are left out."""

MAX_OPEN = 1000
"""Deepest nesting: what msgspec can read depends on the thread's stack and Python's version, and bodies have less."""

_LIST, _COMMA = b"[,"
_OPENING, _CLOSING = np.zeros(256, np.bool_), np.zeros(256, np.bool_)
_OPENING[list(b"[{")] = _CLOSING[list(b"]}")] = True
_NOT_BLANK = re.compile(rb"[^ \t\r\n]")
_AT_BYTE = re.compile(r"\(byte (\d+)\)")
_BEFORE = {b"[": b"[0,", b"{": b'{"":0,'}  # what a piece begins with that follows a comma
_AFTER = {b"[": b"0]", b"{": b'"":0}'}  # what it ends with that ends with one
_ENDS = bytes.maketrans(b"[{", b"]}")
_Places = NDArray[np.int32]


class TooManyFields(ValueError):
    """The outline of a text would be too long."""


class Outline:
    """A JSON text of which long strings are empty, and so are lists and objects that are deep in it."""

    def __init__(self, raw: bytes | bytearray, levels: int, *, piece_bytes: int = PIECE_BYTES) -> None:
        """Check a text, and take out of it what is longer than needed, unless it has no more than a quarter of a piece.

        levels: objects within each other that keep their fields; lists have none. piece_bytes: bytes that are read at
        once. Raises DecodeError as msgspec does, RecursionError for a text that is nested too deeply, TooManyFields.
        """
        self._raw = raw
        self._piece_bytes = piece_bytes
        self._levels = levels
        self._parts: list[bytes | bytearray] = []
        self._froms: list[int] = []  # where each part begins in the text
        self._starts: list[int] = []  # and in the outline
        self._num_bytes = 0
        self._from = 0  # beginning of what is kept and no part yet
        self._before = 0  # end of the last mark that is kept
        self._inside = 0  # level of the list or object that is being left out, 0 for none
        if len(raw) <= piece_bytes // 4:
            self.text = raw
            self._froms, self._starts = [0], [0]
        else:
            self._read()
            self.text = b"".join(self._parts)

    def span(self, value: Raw) -> tuple[int, int]:
        """Return where a value of the outline begins and ends in the text. `value`: has been decoded from `text`."""
        view = memoryview(value)
        begin = _address(view) - _address(self.text)
        return self._place(begin), self._place(begin + len(view) - 1) + 1

    def _place(self, at: int) -> int:
        part = bisect_right(self._starts, at) - 1
        return self._froms[part] + at - self._starts[part]

    # ------------------------------------------------------------ reading

    def _read(self) -> None:
        """Check the text, and find the parts of its outline."""
        done, opened = 0, b""  # bytes that are checked, and the brackets that are open there
        is_open = b""  # the brackets that are open after the last piece
        for places, kinds, depths, _ in marks_of(self._raw, self._piece_bytes):
            if not len(kinds):
                continue
            if depths.max() > MAX_OPEN:
                raise RecursionError
            if depths.min() < 0:
                self._check(done, opened, int(places[-1]) + 1, b"")  # raises: what it closes was never opened
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

        opened, is_open: the brackets around its beginning, which follows a comma, and its end, which is one.
        """
        left = opened[:-1].replace(b"{", b'{"":') + _BEFORE.get(opened[-1:], b"")
        right = _AFTER.get(is_open[-1:], b"") + is_open[:-1][::-1].translate(_ENDS)
        try:
            msgspec.json.decode(b"".join((left, self._raw[begin:end], right)), type=Raw)
        except msgspec.DecodeError as error:
            text = _AT_BYTE.sub(lambda found: f"(byte {int(found[1]) - len(left) + begin})", str(error))
            raise msgspec.DecodeError(text) from None

    def _outline(self, places: _Places, kinds: NDArray[np.uint8], depths: NDArray[np.int64]) -> None:
        """Find what is kept of one piece of the text."""
        opening, closing = _OPENING[kinds], _CLOSING[kinds]
        begins = np.flatnonzero(opening & ((kinds == _LIST) | (depths > self._levels)))
        ends = {level: np.flatnonzero(closing & (depths == level - 1)) for level in range(1, self._levels + 2)}
        at = 0  # marks of the piece that were looked at
        while at < len(places):
            if self._inside:
                found = ends[self._inside]
                num = int(np.searchsorted(found, at))
                if num == len(found):
                    return
                at, self._inside = int(found[num]), 0
                self._from = self._before = int(places[at])
                continue  # its end is kept
            num = int(np.searchsorted(begins, at))
            next_at = int(begins[num]) + 1 if num < len(begins) else len(places)
            self._keep(places[at:next_at])
            if num < len(begins):
                self._inside = int(depths[next_at - 1])
                self._add(int(places[next_at - 1]) + 1)
            at = next_at

    def _keep(self, places: _Places) -> None:
        """Keep what is up to some marks, but for long strings before each of them."""
        ends = np.concatenate((np.array([self._before - 1], np.int32), places))
        for at in np.flatnonzero(np.diff(ends) > LONG_BYTES):
            begin, end = int(ends[at]) + 1, int(ends[at + 1])
            found = _NOT_BLANK.search(self._raw, begin, begin + LONG_BYTES)
            if found is not None and found[0] == b'"':
                last = self._raw.rindex(b'"', begin, end)
                if last - found.start() > LONG_BYTES:  # the string itself is long, not the blanks around it
                    self._add(found.end())
                    self._from = last
        self._before = int(places[-1]) + 1

    def _add(self, end: int) -> None:
        """Take what is kept up to a place as a part."""
        self._parts.append(self._raw[self._from : end])
        self._froms.append(self._from)
        self._starts.append(self._num_bytes)
        self._num_bytes += end - self._from
        if self._num_bytes > MAX_OUTLINE_BYTES or len(self._parts) > MAX_PARTS:
            raise TooManyFields(f"more than {MAX_PARTS} fields, or {MAX_OUTLINE_BYTES} bytes of them")


def _open_after(is_open: bytes, kinds: NDArray[np.uint8], depths: NDArray[np.int64]) -> bytes:
    """Return which brackets are open after some marks. is_open: before them."""
    if not len(kinds):
        return is_open
    begins = np.flatnonzero(_OPENING[kinds])
    last = np.zeros(MAX_OPEN + 1, np.int64)
    last[depths[begins]] = begins  # of several of a level the last is kept
    kept = min(len(is_open), int(depths.min()))
    return is_open[:kept] + kinds[last[kept + 1 : int(depths[-1]) + 1]].tobytes()


def _address(view: bytes | bytearray | memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data

"""Writes large answers as JSON slice by slice, because orjson holds the GIL during a call. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, cast

import orjson

ROWS = 64
"""Rows made and written at a time."""

PART_BYTES = 1 << 16
"""Bytes of an existing JSON text that are written at a time."""

ENTRIES = 21 * 8
"""Entries made and written at a time, if each row has several: half a millisecond."""


def rows_of(num_entries: int) -> int:
    """Return how many rows of `num_entries` entries are made and written at a time."""
    return min(ROWS, max(ENTRIES // max(num_entries, 1), 1))


class RowSlices:
    """A list whose entries are made only when they are written, so that they are never all in memory."""

    def __init__(self, rows: Callable[[], Iterable[Any]], at_once: int = ROWS) -> None:
        """rows: returns a new iterator. at_once: rows made and written at a time; rows that contain slices, one."""
        self._rows = rows
        self._at_once = at_once

    def slices(self) -> Iterator[bytes]:
        """Yield the list's JSON text in order, a few rows at a time."""
        rows, begin = iter(self._rows()), b"["
        while some := list(islice(rows, self._at_once)):
            if has_rows(some):
                for row in some:
                    yield begin
                    yield from slices(row)
                    begin = b","
            else:
                yield begin + dumps(some)[1:-1]
            begin = b","
        yield b"]" if begin == b"," else b"[]"

    def whole(self) -> Any:
        """Return the list."""
        return list(self._rows())


class FieldSlices(RowSlices):
    """An object whose fields are made only when they are written; rows are pairs of a name and a value."""

    def slices(self) -> Iterator[bytes]:
        """Yield the object's JSON text in order, a few fields at a time."""
        rows, begin = iter(self._rows()), b"{"
        while some := list(islice(rows, self._at_once)):
            yield begin + dumps(dict(some))[1:-1]
            begin = b","
        yield b"}" if begin == b"," else b"{}"

    def whole(self) -> Any:
        """Return the object."""
        return dict(self._rows())


class JsonText(RowSlices):
    """A value of which there is the JSON text already; it is written a part at a time."""

    def __init__(self, text: bytes) -> None:
        """text: valid JSON."""
        self._text = text

    def slices(self) -> Iterator[bytes]:
        """Yield the text in order."""
        return (self._text[start : start + PART_BYTES] for start in range(0, len(self._text), PART_BYTES))

    def whole(self) -> Any:
        """Return the text as what orjson inserts unchanged."""
        return orjson.Fragment(self._text)


def dumps(value: Any) -> bytes:
    """Return the JSON text of a value in one piece."""
    return orjson.dumps(value, default=_whole, option=orjson.OPT_SERIALIZE_NUMPY)


def slices(value: Any) -> Iterator[bytes]:
    """Yield a value's JSON text in order, in short pieces; values outside `RowSlices` must be small."""
    if isinstance(value, RowSlices):
        yield from value.slices()
    elif isinstance(value, dict) and has_rows(value):
        begin = b"{"
        for key, entry in value.items():
            yield begin + orjson.dumps(key) + b":"
            yield from slices(entry)
            begin = b","
        yield b"}"
    elif isinstance(value, list) and has_rows(value):
        begin = b"["
        for entry in value:
            yield begin
            yield from slices(entry)
            begin = b","
        yield b"]"
    else:
        yield dumps(value)


def has_rows(value: Any) -> bool:
    """Return whether a value contains `RowSlices`."""
    if isinstance(value, dict):
        return any(map(has_rows, cast("dict[str, Any]", value).values()))
    return isinstance(value, RowSlices) or (isinstance(value, list) and any(map(has_rows, value)))


def joined(value: Any) -> bytes:
    """Return a value's JSON text, made in slices: in a thread, other threads run between them."""
    return b"".join(slices(value))


def _whole(value: Any) -> Any:
    if isinstance(value, RowSlices):
        return value.whole()
    raise TypeError

"""Large answers as JSON, a slice at a time, as orjson holds the interpreter while it works. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, cast

import orjson

ROWS = 64
"""Rows that are made and written at a time."""

ENTRIES = 21 * 8
"""Entries of rows that are, where each has several: half a millisecond."""


def rows_of(num_entries: int) -> int:
    """Return how many rows of so many entries are made and written at a time."""
    return min(ROWS, max(ENTRIES // max(num_entries, 1), 1))


class RowSlices:
    """A list whose entries are made when they are written, so that they are never there all at once."""

    def __init__(self, rows: Callable[[], Iterable[Any]], at_once: int = ROWS) -> None:
        """rows: returns a new iterator. at_once: rows formatted and written at a time; those with slices, one."""
        self._rows = rows
        self._at_once = at_once

    def slices(self) -> Iterator[bytes]:
        """Return the JSON text of the list in order, a few rows at a time."""
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
    """An object whose fields are made when they are written: rows are pairs of a name and a value."""

    def slices(self) -> Iterator[bytes]:
        """Return the JSON text of the object in order, a few fields at a time."""
        rows, begin = iter(self._rows()), b"{"
        while some := list(islice(rows, self._at_once)):
            yield begin + dumps(dict(some))[1:-1]
            begin = b","
        yield b"}" if begin == b"," else b"{}"

    def whole(self) -> Any:
        """Return the object."""
        return dict(self._rows())


def dumps(value: Any) -> bytes:
    """Return the JSON text of a value in one piece."""
    return orjson.dumps(value, default=_whole, option=orjson.OPT_SERIALIZE_NUMPY)


def slices(value: Any) -> Iterator[bytes]:
    """Return the JSON text of a value in order, in short pieces: values outside `RowSlices` are small."""
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
    """Return whether a value holds `RowSlices` somewhere."""
    if isinstance(value, dict):
        return any(map(has_rows, cast("dict[str, Any]", value).values()))
    return isinstance(value, RowSlices) or (isinstance(value, list) and any(map(has_rows, value)))


def joined(value: Any) -> bytes:
    """Return the JSON text of a value, made in slices: in a thread, where others have their turn between them."""
    return b"".join(slices(value))


def _whole(value: Any) -> Any:
    if isinstance(value, RowSlices):
        return value.whole()
    raise TypeError

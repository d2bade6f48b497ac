"""Lines of untrusted texts: only a line feed ends a line.

Python's `splitlines`, and libraries built on it, also split at ten other characters that a JSON text may contain
unescaped, U+2028 and U+0085 among them.
"""

from __future__ import annotations

import codecs
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator


def lines_of(text: str) -> list[str]:
    """Return the lines of a text without their ends, LF or CR LF; text after the last end is a line if not empty."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def iter_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield the lines of a stream of UTF-8 bytes as `lines_of` splits them; invalid UTF-8 is replaced by U+FFFD."""
    lines = _Lines()
    for chunk in chunks:
        yield from lines.add(chunk)
    yield from lines.end()


async def aiter_lines(chunks: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """Yield the lines of an asynchronous stream as `iter_lines` does."""
    lines = _Lines()
    async for chunk in chunks:
        for line in lines.add(chunk):
            yield line
    for line in lines.end():
        yield line


class _Lines:
    """Splits a stream of bytes into lines. The parts of a line are joined once, at its end."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._parts: list[str] = []

    def add(self, chunk: bytes, *, final: bool = False) -> Iterator[str]:
        """Yield the lines that this chunk completes."""
        first, *rest = self._decoder.decode(chunk, final).split("\n")
        self._parts.append(first)
        for part in rest:
            yield "".join(self._parts).removesuffix("\r")
            self._parts = [part]

    def end(self) -> Iterator[str]:
        """Yield the text after the last line end, unless it is empty."""
        yield from self.add(b"", final=True)
        if last := "".join(self._parts):
            yield last.removesuffix("\r")

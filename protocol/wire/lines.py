"""Lines of texts that others wrote: they end with a line feed, and with nothing else.

Python's `splitlines`, and what libraries build on it, also ends lines at ten characters that a JSON text may hold as
they are, U+2028 and U+0085 among them.
"""

from __future__ import annotations

import codecs
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator


def lines_of(text: str) -> list[str]:
    """Return the lines of a text without their ends, LF or CR LF; what follows the last end only if it is any."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def iter_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield the lines of a stream of UTF-8 bytes as `lines_of` has them; bytes that are no UTF-8 are replaced."""
    lines = _Lines()
    for chunk in chunks:
        yield from lines.add(chunk)
    yield from lines.end()


async def aiter_lines(chunks: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """Yield the lines of a stream as `iter_lines` does."""
    lines = _Lines()
    async for chunk in chunks:
        for line in lines.add(chunk):
            yield line
    for line in lines.end():
        yield line


class _Lines:
    """The lines of a stream as its bytes come. What a line gathers is joined once, at its end."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._parts: list[str] = []

    def add(self, chunk: bytes, *, final: bool = False) -> Iterator[str]:
        """Yield the lines that a chunk ends."""
        first, *rest = self._decoder.decode(chunk, final).split("\n")
        self._parts.append(first)
        for part in rest:
            yield "".join(self._parts).removesuffix("\r")
            self._parts = [part]

    def end(self) -> Iterator[str]:
        """Yield what follows the last end of a line, if it is any."""
        yield from self.add(b"", final=True)
        if last := "".join(self._parts):
            yield last.removesuffix("\r")

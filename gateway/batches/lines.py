"""The lines of a batch's input file: where each is, whether it can be run, and in which order. Pure.

A line is read twice: first by itself, to find out that it is a call and of which model, later to be run. Between the
two nothing of it is held but its place, a hash of its name and what it is sorted by, some 640 bytes at most.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import orjson

from protocol.wire import messages as m

MAX_LINES = 50_000
MAX_NUMBER = 2 * MAX_LINES
"""Lines of a file, empty ones counted."""

LINES_AT_ONCE = 64
"""Lines that are read before others have their turn."""

MAX_PROBLEMS = 50
"""Problems of a file that are told; the rest are counted by nobody."""

MAX_CUSTOM_ID_CHARACTERS = 512
SORTED_BYTES = 96
"""Bytes of a prompt that lines of one model are sorted by, so that prompts that begin alike follow each other."""

MAX_PARTS = 8
"""Entries of a list or an object that are looked into for the beginning of a prompt."""

_SKIPPED = b" \t\r"


@dataclass(frozen=True, slots=True)
class Line:
    """A line that can be run."""

    number: int  # counted from 1
    start: int  # bytes before it in the file
    num_bytes: int
    model: str
    prompt: bytes  # the beginning of it, to sort by

    @property
    def end(self) -> int:
        """Where it ends in the file."""
        return self.start + self.num_bytes


@dataclass(slots=True)
class InputLines:
    """What was found in an input file."""

    endpoint: str
    max_bytes: int  # of a line
    lines: list[Line] = field(default_factory=list)
    problems: list[m.BatchProblem] = field(default_factory=list)
    _names: set[bytes] = field(default_factory=set)

    def add(self, number: int, start: int, raw: bytes | None) -> None:
        """Take a line, which is not empty; None: it is too long."""
        if len(self.problems) >= MAX_PROBLEMS:
            return
        if len(self.lines) >= MAX_LINES:
            self._problem("too_many_tasks", f"the file has more than {MAX_LINES} lines", number)
            return
        if raw is None:
            self._problem("line_too_large", f"the line has more than {self.max_bytes} bytes", number)
            return
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            self._problem("invalid_json_line", f"the line is no JSON: {error}", number)
            return
        if not isinstance(value, dict):
            self._problem("invalid_json_line", "the line is no JSON object", number)
            return
        name = value.get("custom_id")
        if not isinstance(name, str) or not 0 < len(name) <= MAX_CUSTOM_ID_CHARACTERS:
            text = f"custom_id must be a string of 1 to {MAX_CUSTOM_ID_CHARACTERS} characters"
            self._problem("invalid_custom_id", text, number, "custom_id")
            return
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in self._names:
            self._problem("duplicate_custom_id", f"custom_id {name!r:.100} was there before", number, "custom_id")
            return
        self._names.add(digest)
        if value.get("method") != "POST":
            self._problem(
                "invalid_method", f"method is {value.get('method')!r:.100}; it must be POST", number, "method"
            )
            return
        if value.get("url") != self.endpoint:
            text = f"url is {value.get('url')!r:.100}; this batch is for {self.endpoint}"
            self._problem("url_mismatch", text, number, "url")
            return
        body = value.get("body")
        if not isinstance(body, dict):
            self._problem("invalid_body", "body must be an object", number, "body")
            return
        model = body.get("model")
        self.lines.append(Line(number, start, len(raw), model if isinstance(model, str) else "", _beginning(body)))

    def finish(self, number: int) -> None:
        """Note that there are no more lines than `number`, empty ones too."""
        if number > MAX_NUMBER:
            self._problem("too_many_tasks", f"the file has more than {MAX_NUMBER} lines, empty ones counted", None)
        if not self.lines and not self.problems:
            self._problem("empty_file", "the file has no lines", None)
        self._names.clear()

    def _problem(self, code: str, message: str, line: int | None, param: str | None = None) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(m.BatchProblem(code=code, message=message, line=line, param=param))

    @property
    def model(self) -> str:
        """The model that all lines name, "" if they name several."""
        models = {line.model for line in self.lines}
        return models.pop() if len(models) == 1 else ""

    def in_order(self) -> list[Line]:
        """Return the lines in the order in which they are run: by model, then by the beginnings of their prompts.

        Models with the most lines are first, so that the last ones run with others beside them. The order is the same
        each time, whoever asks.
        """
        counts = Counter(line.model for line in self.lines)
        return sorted(self.lines, key=lambda line: (-counts[line.model], line.model, line.prompt, line.number))


def _beginning(body: dict[str, Any]) -> bytes:
    """Return the beginning of what a body asks, as far as lines are sorted by it."""
    for name in ("messages", "prompt", "input", "query", "text_1", "queries"):
        if name in body:
            found = body[name]
            text = found if isinstance(found, str) else _text_of(found)
            return text[:SORTED_BYTES].encode("utf-8", "surrogatepass")[:SORTED_BYTES]
    return b""


def _text_of(value: Any, depth: int = 4) -> str:
    """Return the first texts within a value, joined until they are long enough."""
    if isinstance(value, str):
        return value[:SORTED_BYTES]
    parts: Iterable[Any] = ()
    if depth and isinstance(value, dict):
        parts = value.values()
    elif depth and isinstance(value, list):
        parts = value
    found = ""
    for part in islice(parts, MAX_PARTS):
        found += _text_of(part, depth - 1)
        if len(found) >= SORTED_BYTES:
            break
    return found


class Splitter:
    """Cuts a file that comes in pieces into lines."""

    def __init__(self, max_bytes: int) -> None:
        """max_bytes: of a line; of a longer one nothing is held."""
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []  # of the line that has not ended
        self._num_bytes = 0  # of it
        self._start = 0  # of it, in the file
        self.number = 1  # of the line that has not ended

    def feed(self, chunk: bytes) -> Iterator[tuple[int, int, bytes | None]]:
        """Yield the lines that have ended: number, bytes before it in the file, the line or None if it is too long."""
        *ended, rest = chunk.split(b"\n")
        for part in ended:
            self._add(part)
            yield from self.end()
            self.number, self._start = self.number + 1, self._start + self._num_bytes + 1
            self._parts, self._num_bytes = [], 0
            if self.number > MAX_NUMBER:
                return
        self._add(rest)

    def end(self) -> Iterator[tuple[int, int, bytes | None]]:
        """Yield the line that has come so far, unless it is empty."""
        line = b"".join(self._parts) if self._num_bytes <= self._max_bytes else None
        if line is None or line.strip(_SKIPPED):
            yield self.number, self._start, line

    def _add(self, part: bytes) -> None:
        self._num_bytes += len(part)
        if self._num_bytes > self._max_bytes:
            self._parts.clear()
        elif part:
            self._parts.append(part)


async def read_lines(chunks: AsyncIterator[bytes], endpoint: str, max_bytes: int) -> InputLines:
    """Return the lines of an input file for an endpoint. max_bytes: of a line. Raises what `chunks` raises."""
    found, splitter = InputLines(endpoint, max_bytes), Splitter(max_bytes)
    async for chunk in chunks:
        for number, start, raw in splitter.feed(chunk):
            found.add(number, start, raw)
            if number % LINES_AT_ONCE == 0:
                await asyncio.sleep(0)
        if splitter.number > MAX_NUMBER or len(found.problems) >= MAX_PROBLEMS:
            break  # nobody writes so many empty lines, and nobody reads more problems
    else:
        for number, start, raw in splitter.end():
            found.add(number, start, raw)
    found.finish(splitter.number)
    return found

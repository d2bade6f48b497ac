"""The lines of a batch's input file: where each is, whether it can be run, and in which order. Pure.

A line is read twice: first by itself, to find out that it is a call and of which model, later to be run. Between the
two nothing of it is held but its place, a hash of its name and what it is sorted by, some 640 bytes at most.

No values are made of a line's body here: it is passed over, and what it may hold is checked by the endpoint that it is
for, as with any body. So what is wrong with a body is an error of its line, not of the batch. A large line is read in a
thread, at turns of tenants, in pieces that let others have the interpreter between them (`json_outline`).
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Container, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from heapq import merge
from typing import Any

import msgspec
from msgspec import Raw

from gateway.bodies import json_values
from gateway.bodies.json_outline import Outline, TooManyFields
from gateway.http.paths import SMALL_BODY_BYTES
from gateway.overload.large import PLAIN_BYTES, Checks
from gateway.overload.loop_slice import LoopSlice
from protocol.runtime.fair_slots import FairSlots
from protocol.wire import messages as m
from protocol.wire.brief import brief

MAX_LINES = 50_000
MAX_NUMBER = 2 * MAX_LINES
"""Lines of a file, including empty ones."""

BYTES_AT_ONCE = 1 << 16
"""Bytes of a line that are copied at once."""

PIECE_BYTES = 4 << 10
"""Bytes in which lines are looked for at a time: a tenth of a millisecond, if each line has one byte."""

SORTED_AT_ONCE = 128
"""Lines that are sorted before others have their turn."""

MAX_PROBLEMS = 50
"""Maximum number of reported problems of a file; the rest are ignored."""

MAX_CUSTOM_ID_CHARACTERS = 512
SORTED_BYTES = 96
"""Bytes of a prompt that lines of one model are sorted by, so that prompts that begin alike follow each other."""

LOOKED_AT_BYTES = 2048
"""Bytes of a prompt's JSON that are looked through for the texts that it begins with."""

_SKIPPED = b" \t\r"
_TEXT = re.compile(rb'"((?:[^"\\]|\\.)*+)("?+)\s*+(:?+)', re.DOTALL)  # a string, its end, and whether it is a key
_PROMPTS = ("messages", "prompt", "input", "query", "text_1", "queries")
_NULL, _ABSENT = Raw(b"null"), Raw(b"")


class _Whole(msgspec.Struct):
    """A line, whose parts are passed over."""

    custom_id: Raw = _NULL
    method: Raw = _NULL
    url: Raw = _NULL
    body: Raw = _NULL


class _Body(msgspec.Struct):
    """What of a body batches look at."""

    model: Raw = _NULL
    messages: Raw = _ABSENT
    prompt: Raw = _ABSENT
    input: Raw = _ABSENT
    query: Raw = _ABSENT
    text_1: Raw = _ABSENT
    queries: Raw = _ABSENT
    stream: Raw = _NULL
    background: Raw = _NULL


class _Line(msgspec.Struct):
    """A line whose body is an object."""

    body: _Body
    custom_id: Raw = _NULL
    method: Raw = _NULL
    url: Raw = _NULL


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A line that can be run."""

    number: int  # counted from 1
    start: int  # bytes before it in the file
    num_bytes: int
    model: str
    prompt: bytes  # the beginning of it, to sort by
    refusal: str = ""  # why nothing of it can be read, "" for nothing: it is not checked further

    @property
    def end(self) -> int:
        """Where it ends in the file."""
        return self.start + self.num_bytes


@dataclass(slots=True)
class InputLines:
    """The result of checking an input file."""

    endpoint: str
    max_bytes: int  # maximum bytes of a line
    lines: list[BatchLine] = field(default_factory=list)
    problems: list[m.BatchProblem] = field(default_factory=list)
    _models: Counter[str] = field(default_factory=Counter)  # lines of each
    _names: set[bytes] = field(default_factory=set)

    def add(self, number: int, start: int, raw: bytes | bytearray | None) -> None:
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
            outline, _ = _outlined(raw)
            line = _line_of(outline)
        except TooManyFields as error:
            self._add(BatchLine(number, start, len(raw), "", b"", f"has {error}"))
            return
        except msgspec.ValidationError:
            self._problem("invalid_json_line", "the line is not a JSON object", number)
            return
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._problem("invalid_json_line", f"the line is not valid JSON: {error}", number)
            return
        except RecursionError:
            self._add(BatchLine(number, start, len(raw), "", b"", "is nested too deeply"))
            return
        name = _scalar(line.custom_id)
        if not isinstance(name, str) or not 0 < len(name) <= MAX_CUSTOM_ID_CHARACTERS:
            text = f"custom_id must be a string of 1 to {MAX_CUSTOM_ID_CHARACTERS} characters"
            self._problem("invalid_custom_id", text, number, "custom_id")
            return
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in self._names:
            self._problem(
                "duplicate_custom_id", f"custom_id {brief(name)} was used by an earlier line", number, "custom_id"
            )
            return
        self._names.add(digest)
        method, url = _scalar(line.method), _scalar(line.url)
        if method != "POST":
            self._problem("invalid_method", f"method is {brief(method)}; it must be POST", number, "method")
            return
        if url != self.endpoint:
            text = f"url is {brief(url)}; this batch is for {self.endpoint}"
            self._problem("url_mismatch", text, number, "url")
            return
        body = line.body
        if not isinstance(body, _Body):
            self._problem("invalid_body", "body must be an object", number, "body")
            return
        model = _scalar(body.model)
        begun = _beginning(body, outline, raw)
        self._add(BatchLine(number, start, len(raw), model if isinstance(model, str) else "", begun))

    def _add(self, line: BatchLine) -> None:
        self.lines.append(line)
        self._models[line.model] += 1

    def finish(self, number: int) -> None:
        """Note that there are no more lines than `number`, empty ones too."""
        if number > MAX_NUMBER:
            self._problem("too_many_tasks", f"the file has more than {MAX_NUMBER} lines, including empty ones", None)
        if not self.lines and not self.problems:
            self._problem("empty_file", "the file has no lines", None)
        self._names.clear()

    def _problem(self, code: str, message: str, line: int | None, param: str | None = None) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(m.BatchProblem(code=code, message=message, line=line, param=param))

    @property
    def model(self) -> str:
        """The model that all lines name, "" if they name several."""
        return next(iter(self._models)) if len(self._models) == 1 else ""

    async def in_order(self, done: Container[int] = ()) -> Iterator[BatchLine]:
        """Return the lines in the order in which they are run: by model, then by the beginnings of their prompts.

        Models with the most lines are first, so that the last ones run with others beside them. The order is the same
        each time, whoever asks. done: numbers of those that are left out.
        """
        runs: list[list[BatchLine]] = []
        for some in (self.lines[i : i + SORTED_AT_ONCE] for i in range(0, len(self.lines), SORTED_AT_ONCE)):
            runs.append(sorted((line for line in some if line.number not in done), key=self._rank))
            await asyncio.sleep(0)
        return merge(*runs, key=self._rank)

    def _rank(self, line: BatchLine) -> tuple[int, str, bytes, int]:
        return -self._models[line.model], line.model, line.prompt, line.number


@dataclass(frozen=True, slots=True)
class LineCall:
    """A line that is to be run."""

    custom_id: str  # "" of one that is nested so deeply that nothing of it can be read
    body: bytes  # bytes as written in the file
    refusal: str  # why its endpoint is not asked, "" for nothing
    begin: int = 0  # offset of the body in the line


def call_of(line: BatchLine, raw: bytes) -> LineCall:
    """Return the call of a line that `InputLines` has found, from its bytes in the file."""
    if line.refusal:  # how deep can be read depends on who asks: what was not checked then is not used now
        return LineCall("", b"", f"line {line.number} {line.refusal}")
    try:
        outline, refusal = _outlined(raw)
        whole = msgspec.json.decode(outline.text, type=_Whole)
        body = msgspec.json.decode(whole.body, type=_Body)
    except RecursionError:
        return LineCall("", b"", f"line {line.number} is nested too deeply")
    name = next((name for name in ("stream", "background") if _scalar(getattr(body, name))), "")
    if name:
        refusal = f"{name} cannot be true in a batch"
    begin, end = outline.span(whole.body)
    # Slices, as joining them leaves the interpreter to others, which one copy of megabytes does not.
    written = b"".join(raw[at : min(at + BYTES_AT_ONCE, end)] for at in range(begin, end, BYTES_AT_ONCE))
    return LineCall(_scalar(whole.custom_id), written, refusal, begin)


def _outlined(raw: bytes | bytearray) -> tuple[Outline, str]:
    """Return a line with the fields of its body, or without them where they are too many, and then why.

    Raises DecodeError as msgspec does, RecursionError, and TooManyFields for a line that has too many around its body.
    """
    try:
        return Outline(raw, 2), ""
    except TooManyFields as error:
        return Outline(raw, 1), f"the body has {error}"


def _line_of(outline: Outline) -> _Line | _Whole:
    """Return a line with its body, or without one that is no object. Raises as msgspec does."""
    try:
        return msgspec.json.decode(outline.text, type=_Line)
    except msgspec.ValidationError:
        return msgspec.json.decode(outline.text, type=_Whole)


def _scalar(raw: Raw) -> Any:
    """Return a value if it is a string, a number, true, false or null, else the beginning of its JSON as bytes.

    So it does of what was passed over and is no JSON in itself: text that is not UTF-8, a number that is too large.
    """
    text = bytes(memoryview(raw)[: LOOKED_AT_BYTES * 4])
    if len(text) < len(memoryview(raw)) or text[:1] in b"[{":
        return text
    try:
        return json_values.loads(text)
    except ValueError:
        return text


def _beginning(body: _Body, outline: Outline, raw: bytes | bytearray) -> bytes:
    """Return the beginning of what a line's body asks, as far as lines are sorted by it: its first texts, joined."""
    found = next((one for name in _PROMPTS if memoryview(one := getattr(body, name))), None)
    if found is None:
        return b""
    begin, end = outline.span(found)
    texts, num_bytes = list[bytes](), 0
    for text, quote, colon in _TEXT.findall(raw[begin : min(end, begin + LOOKED_AT_BYTES)]):
        if not colon and num_bytes < SORTED_BYTES:
            value = _scalar(Raw(b'"%b"' % text)) if quote else text
            texts.append(value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value)
            num_bytes += len(texts[-1])
    return b"".join(texts)[:SORTED_BYTES]


class Splitter:
    """Cuts a file that comes in pieces into lines."""

    def __init__(self, max_bytes: int) -> None:
        """max_bytes: of a line; of a longer one nothing is held."""
        self._max_bytes = max_bytes
        self._line: list[bytes] = []  # the unfinished line in pieces: adding to megabytes may copy all of them
        self._is_empty = True  # whether it is, but for blanks
        self._num_bytes = 0  # bytes of the unfinished line
        self._start = 0  # offset of the unfinished line in the file
        self.number = 1  # number of the unfinished line

    def feed(self, chunk: bytes) -> Iterator[tuple[int, int, list[bytes] | None]]:
        """Yield the lines that have ended: number, bytes before it, its pieces or None if it is too long."""
        *ended, rest = chunk.split(b"\n")
        for part in ended:
            self._add(part)
            yield from self.end()
            self.number, self._start = self.number + 1, self._start + self._num_bytes + 1
            self._line, self._is_empty, self._num_bytes = [], True, 0
            if self.number > MAX_NUMBER:
                return
        self._add(rest)

    async def of(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[tuple[int, int, bytearray | None]]:
        """Yield the lines that end in a file, as `feed` does but whole; others have their turn. Raises as `chunks`."""
        turn = LoopSlice()
        async for chunk in chunks:
            for at in range(0, len(chunk), PIECE_BYTES):
                for number, start, parts in self.feed(chunk[at : at + PIECE_BYTES]):
                    yield number, start, await _whole(parts)
                    await turn.pause()
                if self.number > MAX_NUMBER:
                    return
                await turn.pause()

    def end(self) -> Iterator[tuple[int, int, list[bytes] | None]]:
        """Yield the line that has come so far, unless it is empty."""
        is_long = self._num_bytes > self._max_bytes
        if is_long or not self._is_empty:
            yield self.number, self._start, None if is_long else self._line

    def _add(self, part: bytes) -> None:
        self._num_bytes += len(part)
        if self._num_bytes > self._max_bytes:
            self._line = []
        elif part:
            self._is_empty = self._is_empty and not part.strip(_SKIPPED)
            self._line.append(part)


async def _whole(parts: list[bytes] | None) -> bytearray | None:
    """Return a line of its pieces, joined in a thread if it is long. It takes them: a long line is not held twice."""
    if parts is None:
        return None
    join = partial(bytearray().join, parts)
    line = await asyncio.to_thread(join) if len(parts) * PIECE_BYTES > PLAIN_BYTES else join()
    parts.clear()
    return line


@asynccontextmanager
async def turn_of(num_bytes: int, turns: FairSlots, tenant: str) -> AsyncIterator[None]:
    """Wait until a tenant's line may be read: one large line is at a time, and held until it is somebody's call."""
    if num_bytes <= SMALL_BODY_BYTES:
        yield
        return
    await turns.take(tenant)
    try:
        yield
    finally:
        turns.give(tenant)


async def read_lines(
    chunks: AsyncIterator[bytes], endpoint: str, max_bytes: int, checks: Checks | None = None, tenant: str = ""
) -> InputLines:
    """Return the lines of an input file for an endpoint. max_bytes: of a line. Raises what `chunks` raises.

    checks: reads large lines, at the tenant's turns; None: one of its own.
    """
    found, splitter, checks = InputLines(endpoint, max_bytes), Splitter(max_bytes), checks or Checks()

    async def add(number: int, start: int, raw: bytearray | None) -> None:
        if raw is None or len(raw) <= PLAIN_BYTES:
            found.add(number, start, raw)
        else:
            await checks.in_thread(partial(found.add, number, start, raw), tenant)

    async for number, start, raw in splitter.of(chunks):
        await add(number, start, raw)
        if len(found.problems) >= MAX_PROBLEMS:
            break  # nobody reads more
    else:
        for number, start, parts in splitter.end() if splitter.number <= MAX_NUMBER else ():
            await add(number, start, await _whole(parts))
    found.finish(splitter.number)
    return found

"""The lines of a batch's input file: where each is, whether it is valid, and the order in which they run. Pure.

A line is read twice: first to check that it is a call and for which model, later to run it. In between, only its
position, a hash of its name and its sort key are kept: at most some 640 bytes.

The line's body is not parsed here, but skipped: the endpoint checks its contents, so an invalid body is an error of its
line, not of the batch. A large line is read in a thread, round-robin by tenant, in pieces between which other threads
run (`json_outline`).
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Container, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from heapq import merge
from typing import Any

import msgspec
from msgspec import Raw

from gateway.bodies import json_values
from gateway.bodies.json_outline import Outline, TooManyFields
from gateway.files.storage import close
from gateway.http.paths import SMALL_BODY_BYTES
from gateway.overload.large import PLAIN_BYTES, Checks
from gateway.overload.loop_slice import LoopSlice
from protocol.runtime.fair_slots import FairSlots
from protocol.wire import messages as m
from protocol.wire.brief import brief

MAX_LINES = 50_000
MAX_NUMBER = 2 * MAX_LINES
"""Maximum lines of a file, including empty ones."""

BYTES_AT_ONCE = 1 << 16
"""Bytes of a line copied at a time."""

PIECE_BYTES = 4 << 10
"""Bytes searched for line ends at a time: a tenth of a millisecond if each line has one byte."""

SORTED_AT_ONCE = 128
"""Lines sorted before other tasks run."""

MAX_PROBLEMS = 50
"""Maximum number of reported problems of a file; the rest are ignored."""

MAX_CUSTOM_ID_CHARACTERS = 512
SORTED_BYTES = 96
"""Bytes of the prompt in a line's sort key, so that prompts with equal beginnings follow each other."""

LOOKED_AT_BYTES = 2048
"""Bytes of a prompt's JSON searched for its first texts."""

_SKIPPED = b" \t\r"
_TEXT = re.compile(rb'"((?:[^"\\]|\\.)*+)("?+)\s*+(:?+)', re.DOTALL)  # string, closing quote, colon of a key
_PROMPTS = ("messages", "prompt", "input", "query", "text_1", "queries")
_NULL, _ABSENT = Raw(b"null"), Raw(b"")


class _Whole(msgspec.Struct):
    """A line, whose fields are not parsed."""

    custom_id: Raw = _NULL
    method: Raw = _NULL
    url: Raw = _NULL
    body: Raw = _NULL


class _Body(msgspec.Struct):
    """The fields of a body that batches use."""

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
    prompt: bytes  # its first bytes, for sorting
    refusal: str = ""  # why it cannot be read and is not checked further; "" if it can

    @property
    def end(self) -> int:
        """Offset of its end in the file."""
        return self.start + self.num_bytes


@dataclass(slots=True)
class InputLines:
    """The result of checking an input file."""

    endpoint: str
    max_bytes: int  # maximum bytes of a line
    lines: list[BatchLine] = field(default_factory=list)
    problems: list[m.BatchProblem] = field(default_factory=list)
    _models: Counter[str] = field(default_factory=Counter)  # number of lines per model
    _names: set[bytes] = field(default_factory=set)

    def add(self, number: int, start: int, raw: bytes | bytearray | None) -> None:
        """Check a line that is not empty; None: it is too long."""
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
        """Finish the check. number: of the last line, counting empty ones."""
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
        """The model of all lines, "" if they name several."""
        return next(iter(self._models)) if len(self._models) == 1 else ""

    async def in_order(self, done: Container[int] = ()) -> Iterator[BatchLine]:
        """Return the lines in the order in which they run: by model, then by the beginnings of their prompts.

        Models with the most lines come first, so that the last lines run beside others. The order is always the same.
        done: numbers of lines to leave out.
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
    """A line to be run."""

    custom_id: str  # "" if the line is nested too deeply to be read
    body: bytes  # bytes as written in the file
    refusal: str  # why its endpoint is not called, "" if it is
    begin: int = 0  # offset of the body in the line


def call_of(line: BatchLine, raw: bytes) -> LineCall:
    """Return the call of a line that `InputLines` has found, given its bytes in the file."""
    if line.refusal:  # the readable depth depends on the thread's stack, so it is not tried again
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
    # Joining slices lets other threads run, unlike one copy of megabytes.
    written = b"".join(raw[at : min(at + BYTES_AT_ONCE, end)] for at in range(begin, end, BYTES_AT_ONCE))
    return LineCall(_scalar(whole.custom_id), written, refusal, begin)


def _outlined(raw: bytes | bytearray) -> tuple[Outline, str]:
    """Return a line's outline with the fields of its body or, if there are too many, without them and with the reason.

    Raises DecodeError as msgspec does, RecursionError, and TooManyFields if there are too many outside the body.
    """
    try:
        return Outline(raw, 2), ""
    except TooManyFields as error:
        return Outline(raw, 1), f"the body has {error}"


def _line_of(outline: Outline) -> _Line | _Whole:
    """Return a line with its body, or without a body that is not an object. Raises as msgspec does."""
    try:
        return msgspec.json.decode(outline.text, type=_Line)
    except msgspec.ValidationError:
        return msgspec.json.decode(outline.text, type=_Whole)


def _scalar(raw: Raw) -> Any:
    """Return a string, number, true, false or null; for any other value the beginning of its JSON as bytes.

    Also returns bytes for skipped values that are invalid by themselves: text that is not UTF-8, a number that is too
    large.
    """
    text = bytes(memoryview(raw)[: LOOKED_AT_BYTES * 4])
    if len(text) < len(memoryview(raw)) or text[:1] in b"[{":
        return text
    try:
        return json_values.loads(text)
    except ValueError:
        return text


def _beginning(body: _Body, outline: Outline, raw: bytes | bytearray) -> bytes:
    """Return the sort key of a line's prompt: its first texts, joined."""
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
    """Splits a file that arrives in chunks into lines."""

    def __init__(self, max_bytes: int) -> None:
        """max_bytes: maximum bytes of a line; a longer one is not buffered."""
        self._max_bytes = max_bytes
        self._line: list[bytes] = []  # the unfinished line in pieces: appending to one buffer may copy megabytes
        self._is_empty = True  # whether the unfinished line is blank
        self._num_bytes = 0  # bytes of the unfinished line
        self._start = 0  # offset of the unfinished line in the file
        self.number = 1  # number of the unfinished line

    def feed(self, chunk: bytes) -> Iterator[tuple[int, int, list[bytes] | None]]:
        """Yield the completed lines: number, offset in the file, and pieces or None if it is too long."""
        *ended, rest = chunk.split(b"\n")
        for part in ended:
            self._add(part)
            yield from self.end()
            self.number, self._start = self.number + 1, self._start + self._num_bytes + 1
            self._line, self._is_empty, self._num_bytes = [], True, 0
            if self.number > MAX_NUMBER:
                return
        self._add(rest)

    async def of(self, chunks: AsyncIterator[bytes]) -> AsyncGenerator[tuple[int, int, bytearray | None]]:
        """Yield the completed lines of a file as `feed` does, but joined, in slices of the event loop.

        Raises as `chunks`.
        """
        turn = LoopSlice()
        try:
            async for chunk in chunks:
                for at in range(0, len(chunk), PIECE_BYTES):
                    for number, start, parts in self.feed(chunk[at : at + PIECE_BYTES]):
                        yield number, start, await _whole(parts)
                        await turn.pause()
                    if self.number > MAX_NUMBER:
                        return
                    await turn.pause()
        finally:
            await close(chunks)

    def end(self) -> Iterator[tuple[int, int, list[bytes] | None]]:
        """Yield the unfinished line unless it is blank."""
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
    """Join a line's pieces, in a thread if it is long, and clear the list: a long line is not held twice."""
    if parts is None:
        return None
    join = partial(bytearray().join, parts)
    line = await asyncio.to_thread(join) if len(parts) * PIECE_BYTES > PLAIN_BYTES else join()
    parts.clear()
    return line


@asynccontextmanager
async def turn_of(num_bytes: int, turns: FairSlots, tenant: str) -> AsyncIterator[None]:
    """Wait for a tenant's turn to read a line: one large line is held at a time, until its call has it."""
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
    """Return the checked lines of an input file for an endpoint. max_bytes: of a line. Raises as `chunks`.

    checks: runs the checks of large lines, in the tenant's turns; None: a new one.
    """
    found, splitter, checks = InputLines(endpoint, max_bytes), Splitter(max_bytes), checks or Checks()

    async def add(number: int, start: int, raw: bytearray | None) -> None:
        if raw is None or len(raw) <= PLAIN_BYTES:
            found.add(number, start, raw)
        else:
            await checks.in_thread(partial(found.add, number, start, raw), tenant)

    async with aclosing(splitter.of(chunks)) as lines:
        async for number, start, raw in lines:
            await add(number, start, raw)
            if len(found.problems) >= MAX_PROBLEMS:
                break  # no more are reported
        else:
            for number, start, parts in splitter.end() if splitter.number <= MAX_NUMBER else ():
                await add(number, start, await _whole(parts))
    found.finish(splitter.number)
    return found

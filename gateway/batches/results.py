"""The answers of a batch while it runs: append-only parts of files, and the totals.

Each gateway that runs the batch writes its own parts, named by its epoch. A line that two gateways have answered, the
earlier one not knowing that it was declared dead, counts once.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import orjson

from gateway.batches.lines import Splitter
from gateway.bodies.json_outline import Outline, TooManyFields
from gateway.files.storage import Storage, close
from protocol.wire import messages as m

Kind = Literal["output", "error"]
KINDS: tuple[Kind, ...] = ("output", "error")

Hold = Callable[[Mapping[Kind, int]], Awaitable[None]]


async def _no_limit(file_bytes: Mapping[Kind, int]) -> None:
    """Reserve no space."""


MAX_PART_BYTES = 1 << 20
"""Bytes of buffered answers that trigger a write."""

WRITTEN_BYTES, LONG_BYTES = 256 << 10, 64 << 10
"""Bytes collected before a write, and minimum bytes of a part that is written by itself, because joining copies it."""

_HEAD_BYTES = 256
"""Upper bound of the bytes before an answer: six numbers and words."""

NO_USAGE = m.BatchUsage()

_LONGEST = 1 << 62


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """The answer to a line."""

    number: int  # line number
    kind: Kind
    line: bytes  # JSON line of the output or error file, without newline
    usage: m.BatchUsage = NO_USAGE


@dataclass(slots=True)
class Tally:
    """The answered lines and their totals."""

    done: set[int] = field(default_factory=set)
    completed: int = 0
    failed: int = 0
    usage: m.BatchUsage = NO_USAGE

    def add(self, number: int, kind: str, usage: m.BatchUsage) -> bool:
        """Count an answer. Return False if its line has one already."""
        if number in self.done:
            return False
        self.done.add(number)
        if kind == "output":
            self.completed += 1
        else:
            self.failed += 1
        self.usage = _usage(a + b for a, b in zip(_numbers(self.usage), _numbers(usage), strict=True))
        return True


class Results:
    """The answers of a batch."""

    def __init__(self, storage: Storage, batch_id: str, epoch: int) -> None:
        self._storage = storage
        self.folder = f"batches/{batch_id}"
        self._epoch = epoch
        self._num_parts = 0
        self._waiting: list[LineAnswer] = []
        self._num_bytes = 0
        self._writing = asyncio.Lock()
        self.num_written = 0  # number of durably stored answers
        self.num_read = 0  # rows written to the final files
        self.tally = Tally()
        self.is_loaded = False  # whether the tally includes all earlier answers
        self.file_bytes: Counter[Kind] = Counter()  # total bytes of the two files

    async def load(self) -> None:
        """Count the answers written by other gateways or by an earlier run of this one. Raises Unavailable."""
        mine = f"{self.folder}/{self._epoch:08}-"
        names = [name for name in await self._storage.names(self.folder) if name.startswith(mine)]
        self._num_parts = max((int(name.removeprefix(mine)) for name in names), default=0)
        async for kind, line in self._lines(self.tally):
            self.file_bytes[kind] += len(line) + 1
        self.num_written = len(self.tally.done) - len(self._waiting)
        self.is_loaded = True

    @property
    def is_full(self) -> bool:
        """Whether the buffered answers should be written now."""
        return self._num_bytes >= MAX_PART_BYTES

    def add(self, answer: LineAnswer) -> None:
        """Buffer the answer to a line that has none."""
        if self.tally.add(answer.number, answer.kind, answer.usage):
            self._waiting.append(answer)
            self._num_bytes += len(answer.line)
            self.file_bytes[answer.kind] += len(answer.line) + 1

    async def flush(self, hold: Hold = _no_limit) -> list[int]:
        """Write the buffered answers. Return the numbers of their lines, which are now durable.

        hold: called before each write with the total bytes of the two files, including buffered answers. If it raises,
        the answers stay buffered. A concurrent caller waits for the running call, so that the files include its
        answers.
        """
        async with self._writing:
            return await self._write_waiting(hold)

    async def _write_waiting(self, hold: Hold) -> list[int]:
        answers, self._waiting, self._num_bytes = self._waiting, [], 0
        if not answers:
            return []
        self._num_parts += 1
        name = f"{self.folder}/{self._epoch:08}-{self._num_parts:08}"
        try:
            await hold(dict(self.file_bytes))
            await self._storage.write(name, _gathered(_rows(answers)))
        except BaseException:  # also after a cancellation: buffer them again
            self._waiting += answers
            self._num_bytes += sum(len(answer.line) for answer in answers)
            raise
        self.num_written += len(answers)
        return [answer.number for answer in answers]

    def file(self, kind: Kind) -> AsyncIterator[bytes | bytearray]:
        """Yield the output or error file in chunks."""
        return _gathered(self._file(kind))

    async def _file(self, kind: Kind) -> AsyncIterator[bytes | bytearray]:
        async with aclosing(self._lines(Tally())) as lines:
            async for found, line in lines:
                if found == kind:
                    self.num_read += 1
                    yield line
                    yield b"\n"

    async def forget(self) -> None:
        """Delete the parts."""
        await self._storage.delete(self.folder)

    async def _lines(self, tally: Tally) -> AsyncGenerator[tuple[Kind, bytearray]]:
        """Yield kind and line of every stored answer, one per line of the batch."""
        for name in await self._storage.names(self.folder):
            async with aclosing(Splitter(_LONGEST).of(self._storage.read(name))) as rows:
                async for _, _, row in rows:
                    assert row is not None
                    head = bytes(row[:_HEAD_BYTES]).split(b" ", 6)[:6]
                    number, written, *usage = head
                    kind: Kind = "output" if written == b"output" else "error"
                    if tally.add(int(number), kind, _usage(map(int, usage))):
                        del row[: len(b" ".join(head)) + 1]
                        yield kind, row


def answer_of(number: int, custom_id: str, status: int, request_id: str, body: bytes) -> LineAnswer:
    """Return the answer to a line from the response of its endpoint, whose body is JSON."""
    response = {"status_code": status, "request_id": request_id, "body": orjson.Fragment(body)}
    kind: Kind = "output" if status < 400 else "error"
    return LineAnswer(number, kind, _line(custom_id, response, None), usage_of(body) if status < 400 else NO_USAGE)


def failure_of(number: int, custom_id: str, code: str, message: str) -> LineAnswer:
    """Return the answer to a line whose endpoint was not called or did not answer."""
    return LineAnswer(number, "error", _line(custom_id, None, {"code": code, "message": message}))


_USAGE_LEVELS = 3
"""Nesting levels read of an answer: itself, its usage and the usage's details."""


class _Told(msgspec.Struct):
    """The field read from an answer; the rest, which may be megabytes, is skipped."""

    usage: dict[str, Any] | None = None


def usage_of(body: bytes) -> m.BatchUsage:
    """Return the token usage of an answer in any API's format."""
    try:
        told = Outline(body, _USAGE_LEVELS).text
    except TooManyFields:
        told = body
    usage = msgspec.json.decode(told, type=_Told).usage or {}
    given = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    made = usage.get("completion_tokens_details") or usage.get("output_tokens_details") or {}
    anthropic = usage.get("cache_read_input_tokens") or 0  # not included in Anthropic's input_tokens
    return m.BatchUsage(
        input_tokens=usage.get("prompt_tokens") or (usage.get("input_tokens") or 0) + anthropic,
        cached_tokens=given.get("cached_tokens") or anthropic,
        output_tokens=usage.get("completion_tokens") or usage.get("output_tokens") or 0,
        reasoning_tokens=made.get("reasoning_tokens") or 0,
    )


def _line(custom_id: str, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
    made = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id, "response": response, "error": error}
    return orjson.dumps(made)


async def _rows(answers: Iterable[LineAnswer]) -> AsyncIterator[bytes]:
    for answer in answers:
        numbers = " ".join(map(str, _numbers(answer.usage)))
        yield b"%d %s %s " % (answer.number, answer.kind.encode(), numbers.encode())
        yield answer.line
        yield b"\n"


def _numbers(usage: m.BatchUsage) -> tuple[int, ...]:
    return msgspec.structs.astuple(usage)


def _usage(numbers: Iterable[int]) -> m.BatchUsage:
    return m.BatchUsage(**dict(zip(m.BatchUsage.__struct_fields__, numbers, strict=True)))


async def _gathered(parts: AsyncIterator[bytes | bytearray]) -> AsyncIterator[bytes | bytearray]:
    """Yield a file's parts, joining short ones."""
    short, num_bytes = list[bytes | bytearray](), 0
    try:
        async for part in parts:
            is_long = len(part) >= LONG_BYTES
            if not is_long:
                short.append(part)
                num_bytes += len(part)
            if short and (is_long or num_bytes >= WRITTEN_BYTES):
                yield b"".join(short)
                short, num_bytes = [], 0
            if is_long:
                yield part
        if short:
            yield b"".join(short)
    finally:
        await close(parts)

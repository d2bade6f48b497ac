"""A job's answer as a stream, from its first token or from where a client was: the same events each time.

Events are made token by token from the logs, so they do not depend on when a client asks, nor which gateway. The id of
an event counts, for each choice, the tokens that are shown with it, and its end as one more; a client that sends it
back as `Last-Event-ID` is told what comes after.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.bodies.json_bodies import disconnected
from gateway.calls.choices import Choice, Piece, tokens_of
from gateway.calls.follow import usage_of
from gateway.calls.waiting import waiting_state
from gateway.calls.writers import SSE, Writer
from gateway.http.errors import OPENAI_ERRORS, error_of, is_failure
from gateway.http.sse import DONE
from protocol.queue.bus import CONNECTION_ERRORS, Bus
from protocol.wire.errors import BadRequest, LorafleetError, NotFound

POLL_S, WAITING_POLL_S = 0.1, 0.5
"""Pauses between looks into the logs: while tokens come, and before the first."""

TOKENS_AT_ONCE = 64
"""Tokens of a choice that are read at a time, before other calls have a turn."""


class JobStream(Response):
    """Streams the choices of a job until all have ended."""

    done = DONE  # the frame that ends a stream

    def __init__(
        self, bus: Bus, choices: Sequence[Choice], writer: Writer, after: Sequence[int], keepalive_s: float
    ) -> None:  # fmt: skip
        """after: the numbers of the last event's id, one for each choice."""
        self.choices = choices
        self._bus = bus
        self._writer = writer
        self._after = after
        self._told = [0] * len(choices)
        self._keepalive_s = keepalive_s
        self._failure: LorafleetError | None = None  # what has ended a choice
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the job has ended or its client leaves."""
        left = asyncio.create_task(disconnected(receive))
        await send({"type": "http.response.start", "status": 200, "headers": SSE.headers})
        try:
            async for frames in self._frames():
                if left.done():
                    return
                await send({"type": "http.response.body", "body": frames, "more_body": True})
            last = self.done
        except BaseException as failure:  # the edge of a call: every failure is told
            if not is_failure(failure):
                raise
            last = await self.failed(error_of(failure))
        finally:
            left.cancel()
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _frames(self) -> AsyncIterator[bytes]:
        """Yield the events of all choices as they come. Raises what has ended a request."""
        loop = asyncio.get_running_loop()
        told_s = loop.time()
        if first := self.first():
            yield first
        while not all(choice.cursor.ended for choice in self.choices):
            has_new = False
            for choice in self.choices:
                frames, is_new = await self._advance(choice)
                has_new = has_new or is_new
                if frames:
                    told_s = loop.time()
                    yield frames
                if self._failure is not None:
                    raise self._failure
            if has_new:
                continue
            has_begun = any(choice.cursor.next for choice in self.choices)
            if loop.time() - told_s >= self._keepalive_s:
                told_s = loop.time()
                yield SSE.idle("" if has_begun else await self._waiting_for())
            await asyncio.sleep(POLL_S if has_begun else WAITING_POLL_S)
        if last := await self.last():
            yield last

    def first(self) -> bytes:
        """Return what a stream begins with, before any token."""
        return b""

    async def last(self) -> bytes:
        """Return what comes after all tokens."""
        return self._writer.usage_frame(usage_of(self.choices)) if self.choices[0].options.include_usage else b""

    async def failed(self, error: LorafleetError) -> bytes:
        """Return what a stream ends with that cannot go on."""
        return SSE.event(OPENAI_ERRORS.body(error))

    async def _advance(self, choice: Choice) -> tuple[bytes, bool]:
        """Return the events of a choice's next tokens, and whether there were any. Raises NotFound."""
        if choice.cursor.ended:
            return b"", False
        expired = NotFound("the result has expired", code="result_expired")
        try:
            delta = await self._bus.read_log(choice.rid, choice.cursor.next, choice.record_bytes, TOKENS_AT_ONCE)
            if delta is None:
                raise expired
            if delta.ids and choice.needs_prompt:
                found = await self._bus.prompt_logprobs(choice.rid, choice.options.prompt_record_bytes)
                if found is None:
                    raise expired
                choice.give_prompt(*found)
        except CONNECTION_ERRORS:
            return b"", False
        out = b""
        for one in tokens_of(delta, choice.record_bytes):
            piece = Piece(choice.index)
            try:
                choice.take(one, piece)
            except LorafleetError as error:
                self._failure = error  # told once the tokens before it are
                break
            out += self.event(choice, piece)
        return out, bool(delta.ids or delta.finish)

    def event(self, choice: Choice, piece: Piece) -> bytes:
        """Return the events of one token or of the end, with their id; b"" if the client has them, or there is none."""
        position = choice.cursor.next + bool(piece.finish)
        frames = self._writer.frames(piece)
        if not frames:
            return b""
        self._told[choice.index] = position
        if position <= self._after[choice.index]:
            return b""
        told = [max(*both) for both in zip(self._told, self._after, strict=True)]
        head, last = frames[: frames.rfind(b"data: ")], frames[frames.rfind(b"data: ") :]
        return head + b"id: " + ",".join(map(str, told)).encode() + b"\n" + last

    async def _waiting_for(self) -> str:
        try:
            return await waiting_state(self._bus, self.choices[0].rid)
        except CONNECTION_ERRORS:
            return "the queue cannot be reached"


def numbers_of(event_id: str, num_choices: int) -> list[int]:
    """Return the numbers of an event's id, "" for none. Raises BadRequest."""
    if not event_id:
        return [0] * num_choices
    numbers = event_id.split(",")
    if len(numbers) != num_choices or not all(number.isdecimal() and len(number) < 12 for number in numbers):
        raise BadRequest(f"{event_id!r:.100} is no id of an event of this job: it has {num_choices} numbers")
    return [int(number) for number in numbers]

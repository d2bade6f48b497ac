"""Sends the answer of a generation, as a stream or one JSON object, until its client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from starlette.responses import Response

from gateway.answers.call_response import CallResponse, SentAnswer
from gateway.bodies.json_bodies import SENT_BYTES, SlicedResponse, json_response, written
from gateway.calls import observe
from gateway.calls.choices import Piece, best_of
from gateway.calls.follow import ClientGoneError, Generation
from gateway.calls.size import TextGrowth
from gateway.calls.writers import DONE, SSE, Writer
from gateway.http.errors import OPENAI_ERRORS, error_of
from gateway.overload.loop_slice import LoopSlice
from gateway.server.connection import CONNECTION, Connection
from protocol.runtime.guarded import is_failure
from protocol.wire import messages as m
from protocol.wire.errors import LorafleetError

T = TypeVar("T")

FEW_LOGPROB_BYTES = 1 << 14
"""Maximum bytes of logprobs of an answer that is written in one piece, which takes a few milliseconds."""


class GenerationAnswer(SentAnswer):
    """The answer of a running generation, which is always closed."""

    errors = OPENAI_ERRORS
    framing = SSE
    done = DONE  # the frame that ends a stream

    def __init__(self, generation: Generation, writer: Writer) -> None:
        self.generation = generation
        self.writer = writer
        self.options = generation.call.parsed.options
        self._growth = TextGrowth(self.options, generation.call.prompts)
        self._last_s = 0.0  # loop time of the latest frame
        self._connection: Connection | None = None

    async def send(self, to: CallResponse) -> None:
        """Send the answer, whole or as a stream, until it ends or its client leaves."""
        self._to = to
        self._connection = to.scope.get(CONNECTION)
        to.client().add_done_callback(self._hang_up)
        response: Response | None = None
        try:
            if self.options.stream:
                await self._send_stream()
            else:
                response = await self._whole_response()
                await to.send_response(response)
        except ClientGoneError:
            observe.client_gone()
        except BaseException as failure:  # every failure of a call is sent or logged
            if not is_failure(failure):
                raise
            if to.has_begun or response is not None:  # too late for an error: the connection is cut
                observe.cut_off(self.generation.call.parsed.caller.owner)
                raise
            await to.send_response(self.errors.response(error_of(failure)))

    async def close(self) -> None:
        """Stop following the generation."""
        await self.generation.close()

    def _hang_up(self, client: asyncio.Task[None]) -> None:
        if not client.cancelled():
            self.generation.hang_up()

    async def _send_stream(self) -> None:
        """Send frames as they arrive. The headers are sent with the first, so that earlier errors are HTTP errors."""
        loop = asyncio.get_running_loop()
        self._last_s = loop.time()
        generation = self.generation
        while True:
            pieces = await self._advance()
            if self.options.running_usage:
                self.writer.show_usage(generation.usage)
            frames = await self._send_pieces(pieces)
            if generation.is_done:
                break
            if not frames:
                if loop.time() - self._last_s < self._to.keepalive_s:
                    continue
                frames = self.framing.idle(await generation.waiting_for())
            await self._send_frames(frames, more=True)
            self._last_s = loop.time()
            if self._connection is not None and not self._growth.is_gathered and not self._in_thread:
                generation.pass_on(self._pass_on)
        await self._send_frames(frames + await self.last_frames(), more=False)

    async def _send_pieces(self, pieces: Sequence[Piece]) -> bytes:
        """Return the frames of pieces; if they are long, send all but the last ones first.

        Other tasks run in between.
        """
        gathered: list[bytes] = []
        num_bytes, turn = 0, LoopSlice()
        for piece in pieces:
            frames = iter(await self._done(partial(self.writer.frames, piece)))
            while frame := await self._done(partial(next, frames, b"")):
                gathered.append(frame)
                num_bytes += len(frame)
                if num_bytes > SENT_BYTES:
                    await self._send_frames(b"".join(gathered), more=True)
                    self._last_s = asyncio.get_running_loop().time()
                    gathered, num_bytes = [], 0
                    await asyncio.sleep(0)
                    if self.generation.client_gone:
                        raise ClientGoneError
                await turn.pause()
        return b"".join(gathered)

    def _pass_on(self, delta: m.Delta) -> bool:
        """Send a delta's tokens without waking the call's task, which would cost more than writing and sending them.

        Return False if the task is needed: for a delta with more than tokens, or a client that does not keep up.
        """
        connection = self._connection
        assert connection is not None
        if not connection.takes_parts:
            return False
        piece = self.generation.piece_of(delta)
        if piece is None:
            return False
        if self.options.running_usage:
            self.writer.show_usage(self.generation.usage)
        frames = b"".join(self.writer.frames(piece))
        if frames:
            connection.write_part(frames)
            self._last_s = connection.loop.time()
        return True

    async def last_frames(self) -> bytes:
        """Return the end of a stream."""
        usage = self.writer.usage_frame(self.generation.usage) if self.options.include_usage else b""
        return usage + self.done

    def failed(self, error: LorafleetError) -> bytes:
        """Return the last frames of a stream that fails: without [DONE], so that no client takes it as complete."""
        return self.framing.event(self.errors.body(error))

    async def _advance(self) -> list[Piece]:
        """Wait for output. Raises as `Generation.advance`, and if there is no memory for its text."""
        pieces = await self.generation.advance(self._to.keepalive_s)
        for piece in pieces:
            self._growth.add(piece.text)
        return pieces

    async def _send_frames(self, frames: bytes, *, more: bool) -> None:
        if not self._to.has_begun:
            await self._to.begin(self.stream_headers())
        await self._to.write(frames, more=more)

    def stream_headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers of a streamed answer."""
        return self.framing.headers

    async def whole(self, choices: list[Piece]) -> tuple[Any, dict[str, str]]:
        """Return the answer of a call that is not streamed, and its headers."""
        return self.writer.whole(best_of(choices, self.options), self.generation.usage), {}

    async def _done(self, make: Callable[[], T]) -> T:
        return await written(self._to.scope, make) if self._in_thread else make()

    @property
    def _in_thread(self) -> bool:
        """Whether writing a token's logprobs is so slow that it is done in a thread, round-robin by tenant."""
        return self.options.sampling.vocabulary > 0

    @property
    def is_large(self) -> bool:
        """Whether an answer that is not streamed takes long to write."""
        num_bytes = self.generation.usage.completion_tokens * self.options.record_bytes
        return num_bytes > FEW_LOGPROB_BYTES or self.options.sampling.prompt_logprobs is not None

    async def _whole_response(self) -> Response:
        """Return the response of a call that is not streamed, once it has ended. Raises as `_advance`."""
        whole = [Piece(choice.index) for choice in self.generation.choices]
        while True:
            for piece in await self._advance():
                if self.options.by_token:
                    self.writer.frames(piece)  # the writer collects the pieces
                whole[piece.index].add(piece)
            if self.generation.is_done:
                break
        await asyncio.sleep(0)  # other tasks run: taking the last tokens and making the answer are half a ms each
        answer, headers = await self.whole(whole)
        if not self.is_large:
            return json_response(answer, headers=headers)
        return SlicedResponse(answer, 200, headers, lambda: self.generation.client_gone, in_thread=self._in_thread)

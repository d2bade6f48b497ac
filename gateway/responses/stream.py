"""The events of a response that is kept, from the first or from any on: the same ones each time."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.calls.choices import Choice, Piece
from gateway.calls.follow import usage_of
from gateway.calls.job_stream import JobStream
from gateway.responses.write import ResponseWriter, failure_of
from protocol.queue.bus import Bus, now_ms
from protocol.wire.errors import LorafleetError


class ResponseStream(JobStream):
    """Streams a response until it has ended."""

    done = b""

    def __init__(self, bus: Bus, choices: Sequence[Choice], writer: ResponseWriter, keepalive_s: float) -> None:
        """writer: writes the events that are wanted."""
        super().__init__(bus, choices, writer, [0], keepalive_s)
        self._made = writer

    def first(self) -> bytes:
        """Return the events before any token: of a response in the background, that it is queued."""
        return self._made.first()

    def event(self, choice: Choice, piece: Piece) -> bytes:
        """Return the events of one token or of the end."""
        return self._made.frames(piece)

    async def last(self) -> bytes:
        """Return the event that ends the stream."""
        [facts] = await self._bus.requests([self.choices[0].rid])
        ended_ms = facts.ended_ms if facts is not None else now_ms()
        return self._made.last(self._made.end(ended_ms), usage_of(self.choices))

    async def failed(self, error: LorafleetError) -> bytes:
        """Return what a stream ends with that cannot go on."""
        if self.choices[0].cursor.ended:
            return self._made.last(failure_of(error), usage_of(self.choices))
        return self._made.failure(error)

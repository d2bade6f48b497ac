"""The events of a stored response, from any position on: the same ones each time."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.calls.choices import Choice, Piece
from gateway.calls.follow import usage_of
from gateway.jobs.job_events import JobEvent, JobEvents
from gateway.responses.response_write import ResponseWriter, failure_of
from protocol.queue.bus import Bus, now_ms
from protocol.wire.errors import LorafleetError


class ResponseEvents(JobEvents):
    """Makes the events of a response; the place of each is its sequence number."""

    def __init__(self, bus: Bus, choices: Sequence[Choice], writer: ResponseWriter) -> None:
        """writer: writes all events."""
        super().__init__(bus, choices, writer)
        self._made = writer

    def first(self) -> list[JobEvent]:
        """Return the events before any token: of a response in the background, that it is queued."""
        return self._numbered(self._made.first())

    def events(self, choice: Choice, piece: Piece, frames: list[bytes]) -> list[JobEvent]:
        """Return the events of one token or of the end, of which the frames are."""
        return self._numbered(frames)

    async def last(self) -> list[JobEvent]:
        """Return the event that ends the stream."""
        [facts] = await self._bus.requests([self.choices[0].rid])
        ended_ms = facts.ended_ms if facts is not None else now_ms()
        return self._numbered(self._made.last(self._made.end(ended_ms), usage_of(self.choices)))

    def failed(self, error: LorafleetError) -> list[JobEvent]:
        """Return what a stream ends with that cannot go on."""
        if self.choices[0].cursor.ended:
            return self._numbered(self._made.last(failure_of(error), usage_of(self.choices)))
        return [JobEvent(0, None, [self._made.failure(error)])]

    def _numbered(self, frames: list[bytes]) -> list[JobEvent]:
        """Return frames that have just been written as events, each with its number."""
        return [JobEvent(0, number, [frame]) for number, frame in enumerate(frames, self._made.number - len(frames))]

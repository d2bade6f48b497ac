"""The events of a stored response from any position, identical on each reading."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.calls.choices import Choice, Piece
from gateway.calls.follow import usage_of
from gateway.jobs.job_events import JobEvent, JobEvents
from gateway.responses.response_write import ResponseWriter, failure_of
from protocol.queue.bus import Bus, now_ms
from protocol.wire.errors import LorafleetError


class ResponseEvents(JobEvents):
    """Makes the events of a response; the place of an event is its sequence number."""

    def __init__(self, bus: Bus, choices: Sequence[Choice], writer: ResponseWriter) -> None:
        """writer: writes all events."""
        super().__init__(bus, choices, writer)
        self._made = writer

    def first(self) -> list[JobEvent]:
        """Return the events before any token; in the background, they say that the response is queued."""
        return self._numbered(self._made.first())

    def events(self, choice: Choice, piece: Piece, frames: list[bytes]) -> list[JobEvent]:
        """Return the events of one token or end, given its frames."""
        return self._numbered(frames)

    async def last(self) -> list[JobEvent]:
        """Return the final event."""
        [facts] = await self._bus.requests([self.choices[0].rid])
        ended_ms = facts.ended_ms if facts is not None else now_ms()
        return self._numbered(self._made.last(self._made.end(ended_ms), usage_of(self.choices)))

    def failed(self, error: LorafleetError) -> list[JobEvent]:
        """Return the final events of a stream that fails."""
        if self.choices[0].cursor.ended:
            return self._numbered(self._made.last(failure_of(error), usage_of(self.choices)))
        return [JobEvent(0, None, [self._made.failure(error)])]

    def _numbered(self, frames: list[bytes]) -> list[JobEvent]:
        """Return frames that were just written as events with their numbers."""
        return [JobEvent(0, number, [frame]) for number, frame in enumerate(frames, self._made.number - len(frames))]

"""The events of a job in order, made token by token from the logs, and identical for every reader.

They do not depend on the time or the gateway. Each has a place, which grows with its choice's tokens, so that a reader
can resume after its position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.calls.choices import Choice, Piece, tokens_of
from gateway.calls.follow import log_limit, usage_of
from gateway.calls.waiting import waiting_state
from gateway.calls.writers import DONE, SSE, Writer
from gateway.http.errors import OPENAI_ERRORS, error_of
from gateway.overload.loop_slice import LoopSlice
from protocol.queue.bus import CONNECTION_ERRORS, Bus
from protocol.runtime.guarded import is_failure
from protocol.wire import messages as m
from protocol.wire.errors import LorafleetError, NotFound

TOKENS_AT_ONCE = 64
"""Maximum tokens of a choice read at a time, before other calls are served."""

Places = Sequence[int]
"""Position in each choice: the number of shown tokens, plus one after its end."""


@dataclass(frozen=True, slots=True)
class JobEvent:
    """The frames that one token, or an end, adds to a stream; the last frame carries the id."""

    choice: int
    place: int | None  # None: sent to every reader
    frames: list[bytes]

    @property
    def num_bytes(self) -> int:
        """Total bytes of its frames."""
        return sum(map(len, self.frames))


class JobEvents:
    """Reads the logs of a job's choices and makes their events until all have ended."""

    def __init__(self, bus: Bus, choices: Sequence[Choice], writer: Writer) -> None:
        self.choices = choices
        self.is_over = False
        """Whether the last event has been made."""
        self.is_behind = False
        """Whether the logs had more than was read the last time."""
        self.num_end = 0
        """Number of final events, sent after all choices have ended; 0 until then."""
        self._bus = bus
        self._writer = writer
        self._at_once = min([TOKENS_AT_ONCE, *filter(None, map(log_limit, choices[:1]))])
        self._failed: set[int] = set()  # failed choices, whose end the shared reader sends

    @property
    def has_begun(self) -> bool:
        """Whether there is a token."""
        return any(choice.cursor.next for choice in self.choices)

    @property
    def places(self) -> list[int]:
        """The position up to which each log has been read."""
        return [choice.cursor.next + choice.cursor.ended for choice in self.choices]

    def has_reached(self, goal: Places) -> bool:
        """Return whether all events up to these places have been made; a failed choice has no more events."""
        pairs = zip(self.places, goal, strict=True)
        return all(own >= wanted or i in self._failed for i, (own, wanted) in enumerate(pairs))

    def first(self) -> list[JobEvent]:
        """Return the first events of a stream, before any token."""
        return []

    async def advance(self) -> list[JobEvent]:
        """Read each choice's log once; return the new events, including the final ones if all have ended."""
        made: list[JobEvent] = []
        self.is_behind = False
        try:
            for choice in self.choices:
                if not choice.cursor.ended:
                    await self._advance(choice, self._at_once, made)
            if all(choice.cursor.ended for choice in self.choices):
                made += self._ended(await self.last())
        except BaseException as failure:  # every failure of a call is sent
            if not is_failure(failure):
                raise
            made += self._ended(self.failed(error_of(failure)))
        return made

    def _ended(self, end: list[JobEvent]) -> list[JobEvent]:
        self.is_over, self.num_end = True, len(end)
        return end

    async def catch_up(self, goal: Places) -> list[JobEvent]:
        """Return the next events up to these places, without the end, which the shared reader sends."""
        made: list[JobEvent] = []
        for i, choice in enumerate(self.choices):
            limit = min(goal[i] - choice.cursor.next, self._at_once)
            if limit <= 0 or choice.cursor.ended or i in self._failed:
                continue
            try:
                await self._advance(choice, limit, made)
            except LorafleetError:
                self._failed.add(i)
        return made

    async def _advance(self, choice: Choice, limit: int, made: list[JobEvent]) -> None:
        """Add the events of a choice's next tokens. Raises the error that ended it, after adding earlier events."""
        delta = await self._read(choice, limit)
        if delta is None:
            return
        self.is_behind = self.is_behind or len(delta.ids) == 4 * limit
        turn = LoopSlice()
        for one in tokens_of(delta, choice.record_bytes):
            piece = Piece(choice.index)
            choice.take(one, piece)
            frames: list[bytes] = []
            for frame in self._writer.frames(piece):
                frames.append(frame)
                await turn.pause()
            made += self.events(choice, piece, frames)

    async def _read(self, choice: Choice, limit: int) -> m.Delta | None:
        """Return a choice's next tokens; None while the queue cannot be reached. Raises NotFound."""
        expired = NotFound("the result has expired", code="result_expired")
        try:
            delta = await self._bus.read_log(choice.rid, choice.cursor.next, choice.record_bytes, limit)
            if delta is None:
                raise expired
            if delta.ids and choice.needs_prompt:
                found = await self._bus.prompt_logprobs(choice.rid, choice.options.prompt_record_bytes)
                if found is None:
                    raise expired
                choice.give_prompt(*found)
        except CONNECTION_ERRORS:
            return None
        return delta

    def events(self, choice: Choice, piece: Piece, frames: list[bytes]) -> list[JobEvent]:
        """Return the events of one token or end, given its frames; [] without frames."""
        return [JobEvent(choice.index, choice.cursor.next + bool(piece.finish), frames)] if frames else []

    async def last(self) -> list[JobEvent]:
        """Return the final events, after all tokens."""
        usage = self.choices[0].options.include_usage
        return [JobEvent(0, None, [*([self._writer.usage_frame(usage_of(self.choices))] if usage else []), DONE])]

    def failed(self, error: LorafleetError) -> list[JobEvent]:
        """Return the final events of a stream that fails."""
        return [JobEvent(0, None, [SSE.event(OPENAI_ERRORS.body(error))])]

    async def waiting_for(self) -> str:
        """Return a short description of what the job waits for."""
        try:
            return await waiting_state(self._bus, self.choices[0].rid)
        except CONNECTION_ERRORS:
            return "the queue cannot be reached"

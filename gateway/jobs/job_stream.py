"""A job's answer as a stream, from its first token or from a client's position.

The id of an event counts, for each choice, the tokens shown so far, plus one after its end. A client that sends it as
`Last-Event-ID` gets the following events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from gateway.answers.call_response import CallResponse, SentAnswer
from gateway.bodies.json_bodies import SENT_BYTES
from gateway.calls.writers import SSE
from gateway.http.errors import OPENAI_ERRORS
from gateway.jobs.job_events import JobEvent
from gateway.jobs.job_readers import JobReaders, Opening, SharedReader
from gateway.overload.cost import held, hold
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest, LorafleetError

After = Callable[[int], list[int]]
"""Returns a client's position in each choice, given the number of choices; raises BadRequest for an invalid event
id."""


def error_event(error: LorafleetError) -> bytes:
    """Return an error as an event of a stream of chunks."""
    return SSE.event(OPENAI_ERRORS.body(error))


class JobStream(SentAnswer):
    """Streams the choices of a job until all have ended."""

    def __init__(
        self,
        readers: JobReaders,
        jid: str,
        tenant: str,
        opening: Opening,
        after: After,
        *,
        with_ids: bool = True,
        failed: Callable[[LorafleetError], bytes] = error_event,
    ) -> None:
        """tenant: owner of the job. with_ids: whether events carry ids. failed: returns the event of an error."""
        self._readers = readers
        self._jid = jid
        self._tenant = tenant
        self._opening = opening
        self._after = after
        self._with_ids = with_ids
        self._failed = failed
        self._known: list[int] = []  # the client's position in each choice

    async def send(self, to: CallResponse) -> None:
        """Send the events until the job has ended or the client leaves. Errors before the first event are raised."""
        async with self._readers.stream(self._jid, self._tenant, self._opening) as reader:
            self._known = self._after(len(reader.places))
            await to.begin(SSE.headers)
            async for frames in self._frames(reader, to.client()):
                await to.write(frames)
                if len(frames) > SENT_BYTES:
                    await asyncio.sleep(0)
        await to.write(b"", more=False)

    def failed(self, error: LorafleetError) -> bytes:
        """Return the last event of a stream that fails."""
        return self._failed(error)

    async def close(self) -> None:
        """Do nothing: a job continues without readers."""

    async def _frames(self, reader: SharedReader, left: asyncio.Task[None]) -> AsyncIterator[bytes]:
        """Yield the client's next events until the end or until it leaves."""
        loop, number, own, charged = asyncio.get_running_loop(), 0, None, held()
        told_s = loop.time()
        while not left.done():
            events = reader.since(number)
            if events is None:  # this reader has fallen behind the cache
                if own is None:
                    own = await self._opening()
                    for frames in self._told(own.first()):
                        yield frames
                goal, number = reader.places, reader.num_told
                while not own.has_reached(goal) and not left.done():
                    async with self._readers.turn(self._tenant):
                        events = await own.catch_up(goal)
                    for frames in self._told(events):
                        yield frames
                told_s = loop.time()
                continue
            if own is not None:
                own = None
                hold(charged)
            number += len(events)
            for frames in self._told(events):
                told_s = loop.time()
                yield frames
            if reader.is_over and number == reader.num_made:
                return
            await reader.more(number, max(0.0, told_s + self._readers.keepalive_s - loop.time()))
            if loop.time() - told_s >= self._readers.keepalive_s and reader.num_made == number:
                told_s = loop.time()
                yield SSE.idle(reader.waiting_for)

    def _told(self, events: Iterable[JobEvent]) -> Iterator[bytes]:
        """Yield the frames of the events that are new to the client, joined to some kilobytes."""
        out, num_bytes = list[bytes](), 0
        for frame in self._unknown(events):
            out.append(frame)
            num_bytes += len(frame)
            if num_bytes > SENT_BYTES:
                yield b"".join(out)
                out, num_bytes = [], 0
        if out:
            yield b"".join(out)

    def _unknown(self, events: Iterable[JobEvent]) -> Iterator[bytes]:
        """Yield the frames of the events that are new to the client, and advance its position."""
        for event in events:
            if event.place is None:
                yield from event.frames
            elif event.place > self._known[event.choice]:
                self._known[event.choice] = event.place
                *head, last = event.frames
                yield from head
                if self._with_ids:
                    yield b"id: %b\n" % ",".join(map(str, self._known)).encode()
                yield last


def numbers_of(event_id: str, num_choices: int) -> list[int]:
    """Return the numbers in an event's id, zeros for "". Raises BadRequest."""
    if not event_id:
        return [0] * num_choices
    numbers = event_id.split(",")
    if len(numbers) != num_choices or not all(number.isdecimal() and len(number) < 12 for number in numbers):
        raise BadRequest(f"{brief(event_id)} is not an event id of this job, which consists of {num_choices} numbers")
    return [int(number) for number in numbers]

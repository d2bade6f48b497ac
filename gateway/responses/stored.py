"""Stored responses, read from the queue: as objects, as events, and as turns of conversations.

A stored response is a job whose record has the whole conversation before it. So it does not depend on earlier
responses, which may be deleted.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import orjson

from gateway.auth.callers import Caller
from gateway.calls.choices import Choice
from gateway.calls.follow import choices_of, usage_of
from gateway.calls.pipeline import Pipeline
from gateway.calls.writers import CallUsage
from gateway.http.paths import RESPONSES
from gateway.jobs.job_events import JobEvents
from gateway.jobs.job_stream import JobStream
from gateway.jobs.jobs import Facts, Jobs, state_of
from gateway.overload import large
from gateway.responses.items import Item
from gateway.responses.response_write import ID_PREFIX, End, ResponseWriter, error_event, failure_of, writer_of
from gateway.responses.stream import ResponseEvents
from protocol.wire import messages as m
from protocol.wire.brief import brief
from protocol.wire.codec import as_kept
from protocol.wire.error_codec import error_from
from protocol.wire.errors import LorafleetError, NotFound

GOES_ON = ("completed", "incomplete")
"""Final states with an answer that a conversation can continue."""


class StoredResponses:
    """Reads stored responses by id."""

    def __init__(self, pipeline: Pipeline, jobs: Jobs) -> None:
        self._pipeline = pipeline
        self._jobs = jobs

    async def load(self, response_id: str, caller: Caller) -> tuple[m.Job, Facts]:
        """Return a response's job, and the queue's facts about its request. Raises NotFound."""
        found = None
        if response_id.startswith(ID_PREFIX):
            with suppress(NotFound):
                found = await self._jobs.load(response_id, caller)
        if found is not None and found.endpoint == RESPONSES:
            facts = await self._jobs.facts(found)
            if None not in facts:
                return found, facts
        text = f"Response with id {brief(response_id)} not found."
        raise NotFound(text, param="response_id", code="response_not_found")

    async def view(self, job: m.Job, facts: Facts, *, is_new: bool = False) -> dict[str, Any]:
        """Return a response as OpenAI's object. Raises NotFound.

        is_new: it answers the call that created it, so its state is `queued` whatever has happened since.
        """
        end, kept = End("queued") if is_new else end_of(job, facts), await self._jobs.request(job, keep=True)
        if end.status in ("queued", "in_progress"):
            _, writer = await self._open(job, facts, kept)
            return writer.object(end)
        writer, usage = await self._read(job, facts, kept)
        return writer.object(end, usage)

    async def stream(self, job: m.Job, facts: Facts, after: int) -> JobStream:
        """Return the stream of a response's events with numbers greater than `after`. Raises NotFound."""

        async def opened() -> JobEvents:
            choices, writer = await self._open(job, facts, await self._jobs.request(job))
            writer.after = -1
            return ResponseEvents(self._pipeline.bus, choices, writer)

        return JobStream(
            self._jobs.readers, job.jid, job.tenant, opened, lambda _: [after], with_ids=False, failed=error_event
        )

    async def input_items(self, job: m.Job) -> list[Item]:
        """Return a response's input items. Raises NotFound."""
        kept = await self._jobs.request(job, keep=True)
        with as_kept(f"what {job.jid} asked for"):
            return kept["items"]

    async def all_items(self, job: m.Job, facts: Facts) -> list[Item]:
        """Return the items of a response that has an answer, its output last. Raises NotFound."""
        kept = await self._jobs.request(job, keep=True)
        with as_kept(f"what {job.jid} asked for"):
            items = kept["items"]
        return [*items, *await self._output(job, facts, kept)]

    async def turn(self, job: m.Job, facts: Facts) -> list[Item]:
        """Return the items that a response with an answer adds to its conversation: its own input, and its output.

        Raises NotFound.
        """
        kept = await self._jobs.request(job)
        with as_kept(f"what {job.jid} asked for"):
            own = kept["items"][len(kept["items"]) - kept["num_own"] :]
        items = [*own, *await self._output(job, facts, kept)]
        done = [kept]
        del kept
        await large.freed(done)
        return items

    async def _output(self, job: m.Job, facts: Facts, kept: Any) -> list[Item]:
        writer, _ = await self._read(job, facts, kept)
        return await self._pipeline.checks.in_thread(
            lambda: orjson.loads(orjson.dumps(writer.output.items)), job.tenant
        )

    async def _read(self, job: m.Job, facts: Facts, kept: Any) -> tuple[ResponseWriter, CallUsage]:
        """Return the writer of an ended response with its whole output, and the usage. Raises NotFound."""
        choices, writer = await self._open(job, facts, kept)
        try:
            await self._jobs.read(choices, writer)
        except LorafleetError:
            if not choices[0].cursor.ended:
                raise
            writer.output.cut()
        return writer, usage_of(choices)

    async def _open(self, job: m.Job, facts: Facts, kept: Any) -> tuple[Sequence[Choice], ResponseWriter]:
        """Return the choice and the writer of a response, before its first token. Raises NotFound."""
        _, call = await self._jobs.call(job, facts, kept)
        choices = choices_of(call)
        with as_kept(f"what {job.jid} asked for"):
            return choices, writer_of(call, choices)


def end_of(job: m.Job, facts: Facts) -> End:
    """Return how a response has ended, or that it has not."""
    state, _ = state_of(facts)
    [fact] = facts
    assert fact is not None, "an expired response is not found"
    if state == "failed":
        return failure_of(error_from(fact.error))
    if state == "cancelled":
        return End(state)
    if state == "completed":
        return End("incomplete" if fact.finish == "length" else state, None, fact.ended_ms)
    return End("queued" if state == "queued" and job.background else "in_progress")

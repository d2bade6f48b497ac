"""Responses: made now or in the background, found again, gone on with, ended and deleted, by any gateway.

A response that is kept is a job, whose record has the whole conversation up to it. So each stands alone, whatever
becomes of those before it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import orjson
from starlette.responses import Response

from gateway.auth.callers import Caller
from gateway.bodies.json_bodies import json_answer
from gateway.calls.choices import Choice
from gateway.calls.earlier import check_same_body
from gateway.calls.follow import choices_of, usage_of
from gateway.calls.jobs import Facts, Jobs, state_of
from gateway.calls.parse import Sent
from gateway.calls.pipeline import Pipeline
from gateway.calls.writers import Usage
from gateway.http.list_page import list_page
from gateway.http.paths import RESPONSES
from gateway.responses.bodies import ResponseRequest
from gateway.responses.items import Item, items_of, references
from gateway.responses.parse import Context, check_input, parse, to_be_stored
from gateway.responses.stream import ResponseStream
from gateway.responses.write import ID_PREFIX, End, FollowedResponse, ResponseWriter, failure_of, writer_of
from protocol.wire import messages as m
from protocol.wire.error_codec import error_from
from protocol.wire.errors import BadRequest, LorafleetError, NotFound

CANCEL_WAIT_S = 10.0
"""Most time until a worker has let go of a response that is cancelled."""

MAX_REFERRED = 16
"""Responses that the items of one input may refer to: each is read from its log."""


class Responses:
    """The responses of the fleet."""

    def __init__(self, pipeline: Pipeline, jobs: Jobs) -> None:
        self._pipeline = pipeline
        self._settings = pipeline.settings
        self._jobs = jobs

    async def create(self, body: ResponseRequest, sent: Sent, caller: Caller) -> Response:
        """Answer a body. Raises what the client did wrong, Overloaded and Unavailable."""
        check_input(body, self._settings, caller)
        pipeline = self._pipeline
        earlier = await pipeline.earlier.find(sent, caller)
        if earlier is not None:
            check_same_body(earlier, sent)
            if body.background:
                return await self._of_background(body, earlier.jid, caller)
            generation = await pipeline.attach(parse(body, caller, self._settings, sent), earlier)
            return FollowedResponse(generation, self._settings.keepalive_s)
        call_id = uuid.uuid4().hex
        context = await self._context(body, caller)
        items = [*context.items, *items_of(body.input, call_id, context.known, len(context.items))]
        call = parse(body, caller, self._settings, sent, items, call_id)
        if not call.shown["store"]:
            return FollowedResponse(await pipeline.run(call), self._settings.keepalive_s)
        kept = to_be_stored(call, body, items, self._settings.max_body_bytes)
        if not body.background:
            job = partial(self._jobs.new, sent=sent, request=kept, background=False)
            return FollowedResponse(await pipeline.run(call, job), self._settings.keepalive_s)
        made = await self._jobs.submit(await pipeline.prepare(call), sent, kept)
        return await self._of_background(body, made.jid, caller)

    async def _of_background(self, body: ResponseRequest, response_id: str, caller: Caller) -> Response:
        if body.stream:
            return await self.stream(response_id, caller, -1)
        return json_answer(await self.get(response_id, caller))

    async def _context(self, body: ResponseRequest, caller: Caller) -> Context:
        """Return what a body's input goes on with, and refers to. Raises BadRequest."""
        items: list[Item] = []
        if body.previous_response_id is not None:
            try:
                items = await self._conversation(body.previous_response_id, caller)
            except NotFound as error:
                text = f"Previous response with id {body.previous_response_id!r:.100} not found."
                raise BadRequest(text, param="previous_response_id", code="previous_response_not_found") from error
        known: dict[str, Item] = {item["id"]: item for item in items}
        asked: set[str] = set()
        for call, id_ in references(body.input):
            if id_ in known or call in asked:
                continue
            asked.add(call)
            if len(asked) > MAX_REFERRED:
                text = f"input refers to items of more than {MAX_REFERRED} responses, which is the limit"
                raise BadRequest(text, param="input", code="limit_exceeded")
            with suppress(NotFound):
                known |= {item["id"]: item for item in await self._conversation(ID_PREFIX + call, caller)}
        for _, id_ in references(body.input):
            if id_ not in known:
                raise BadRequest(f"Item with id {id_!r:.100} not found.", param="input", code="item_not_found")
        return Context(items, known)

    async def _conversation(self, response_id: str, caller: Caller) -> list[Item]:
        """Return the items of a response, those of its output at their end. Raises NotFound, BadRequest."""
        job, facts = await self._load(response_id, caller)
        end, kept = end_of(job, facts), await self._jobs.request(job)
        if end.status not in ("completed", "incomplete"):
            text = f"response {response_id} is {end.status}: only one with an answer can be gone on with"
            raise BadRequest(text, param="previous_response_id", code="previous_response_not_completed")
        writer, _ = await self._read(job, facts, kept)
        return [*kept["items"], *orjson.loads(orjson.dumps(writer.output.items))]

    # ------------------------------------------------------------ one response

    async def get(self, response_id: str, caller: Caller) -> dict[str, Any]:
        """Return a response. Raises NotFound."""
        return await self._view(*(await self._load(response_id, caller)))

    async def stream(self, response_id: str, caller: Caller, after: int) -> Response:
        """Return the events of a response with numbers greater than `after`, as they come. Raises NotFound."""
        job, facts = await self._load(response_id, caller)
        choices, writer = await self._open(job, facts, await self._jobs.request(job))
        writer.after = after
        return ResponseStream(self._pipeline.bus, choices, writer, self._settings.keepalive_s)

    async def cancel(self, response_id: str, caller: Caller) -> dict[str, Any]:
        """End a response of the background and return it. A second time does nothing. Raises NotFound, BadRequest."""
        job, _ = await self._load(response_id, caller)
        if not job.background:
            raise BadRequest("Cannot cancel a synchronous response: end its connection", code="not_background")
        await self._jobs.cancel(response_id, caller)
        await self._jobs.wait_ended(job, CANCEL_WAIT_S)
        return await self.get(response_id, caller)

    async def delete(self, response_id: str, caller: Caller) -> dict[str, Any]:
        """Delete a response, ending it if it is not done. Raises NotFound."""
        job, _ = await self._load(response_id, caller)
        await self._jobs.forget(job)
        return {"id": response_id, "object": "response", "deleted": True}

    async def input_items(
        self, response_id: str, caller: Caller, limit: int, after: str | None, *, newest_first: bool
    ) -> dict[str, Any]:
        """Return a page of the items that a response was made of. Raises NotFound, also for an unknown `after`."""
        job, _ = await self._load(response_id, caller)
        items: list[Item] = (await self._jobs.request(job))["items"]
        if newest_first:
            items.reverse()
        start = 0
        if after is not None:
            start = 1 + next((i for i, item in enumerate(items) if item["id"] == after), len(items))
            if start > len(items):
                raise NotFound(f"there is no item {after!r:.100}", param="after")
        page = items[start : start + limit]
        return list_page(page, has_more=len(items) > start + limit)

    # ------------------------------------------------------------ what is kept

    async def _load(self, response_id: str, caller: Caller) -> tuple[m.Job, Facts]:
        """Return a response's job, and what the queue knows of its request. Raises NotFound."""
        found = None
        if response_id.startswith(ID_PREFIX):
            with suppress(NotFound):
                found = await self._jobs.load(response_id, caller)
        if found is not None and found.endpoint == RESPONSES:
            facts = await self._jobs.facts(found)
            if None not in facts:
                return found, facts
        text = f"Response with id {response_id!r:.100} not found."
        raise NotFound(text, param="response_id", code="response_not_found")

    async def _read(self, job: m.Job, facts: Facts, kept: Any) -> tuple[ResponseWriter, Usage]:
        """Return the writer of a response that has ended, with all that this has come to. Raises NotFound."""
        choices, writer = await self._open(job, facts, kept)
        try:
            await self._jobs.read(choices, writer)
        except LorafleetError:
            if not choices[0].cursor.ended:
                raise
            writer.output.cut()
        return writer, usage_of(choices)

    async def _open(self, job: m.Job, facts: Facts, kept: Any) -> tuple[Sequence[Choice], ResponseWriter]:
        """Return a response to be read from its first token. Raises NotFound."""
        _, call = await self._jobs.call(job, facts, kept)
        choices = choices_of(call)
        return choices, writer_of(call, choices)

    async def _view(self, job: m.Job, facts: Facts) -> dict[str, Any]:
        end, kept = end_of(job, facts), await self._jobs.request(job)
        if end.status in ("queued", "in_progress"):
            _, writer = await self._open(job, facts, kept)
            return writer.object(end)
        writer, usage = await self._read(job, facts, kept)
        return writer.object(end, usage)


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

"""Responses: created, read, continued, cancelled and deleted, at any gateway."""

from __future__ import annotations

import uuid
from contextlib import suppress
from functools import partial
from typing import Any

import orjson

from gateway.answers.call_response import CallResult, SentAnswer
from gateway.auth.callers import Caller
from gateway.bodies.json_bodies import json_answer
from gateway.bodies.parameter_check import ignore
from gateway.calls.earlier import check_same_body
from gateway.calls.parsed_call import ChatPrompt, Models, ParsedCall, Sent
from gateway.calls.pipeline import Pipeline
from gateway.calls.tokenize import tokenize
from gateway.jobs.jobs import Jobs
from gateway.overload import large
from gateway.responses.conversations import Conversations
from gateway.responses.items import Item, item_page, items_of, references
from gateway.responses.response_bodies import InputTokensRequest, PromptRequest, ResponseRequest, conversation_id_of
from gateway.responses.response_parse import Context, check_input, check_prompt, parse, parse_count, to_be_stored
from gateway.responses.response_write import ID_PREFIX, FollowedAnswer
from gateway.responses.stored import GOES_ON, StoredResponses, end_of
from gateway.text.counted import most_tokenized
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest, NotFound

CANCEL_WAIT_S = 10.0
"""Maximum seconds to wait for a worker to end a cancelled response."""

MAX_REFERRED = 16
"""Maximum responses whose items an input may reference: each is read from its log."""


class Responses:
    """The responses of the fleet."""

    def __init__(self, pipeline: Pipeline, jobs: Jobs, stored: StoredResponses, conversations: Conversations) -> None:
        self._pipeline = pipeline
        self._settings = pipeline.settings
        self._jobs = jobs
        self._stored = stored
        self._conversations = conversations

    async def create(self, body: ResponseRequest, sent: Sent, caller: Caller) -> CallResult:
        """Answer a body. Raises client errors, Overloaded and Unavailable."""
        check_input(body, self._settings, caller)
        pipeline = self._pipeline
        earlier = await pipeline.earlier.find(sent, caller)
        if earlier is not None:
            check_same_body(earlier.record, sent)
            if body.background:
                return await self._of_background(body, earlier.record.jid, caller)
            again = partial(parse, body, caller, self._settings, sent)
            generation = await pipeline.attach(await pipeline.parsed(body, caller, len(sent.raw), again), earlier)
            return FollowedAnswer(generation)
        call_id = uuid.uuid4().hex
        context = await self._context(body, caller)

        def make() -> tuple[list[Item], list[Item], ParsedCall]:
            renamed = body.conversation is not None
            own = items_of(body.input, call_id, context.known, context.items, renamed=renamed)
            if not (own or context.items):
                raise BadRequest("input: it is missing, and the conversation is empty", param="input")
            items = [*context.items, *own]
            return own, items, parse(body, caller, self._settings, sent, items, call_id)

        num_bytes = len(sent.raw) + context.num_bytes
        own, items, call = await pipeline.parsed(body, caller, num_bytes, make)
        assert isinstance(call.inputs, ChatPrompt), "a response's input becomes messages"
        large.keep(items, num_bytes)
        large.keep(call.inputs.messages, num_bytes)
        if not call.shown["store"]:
            return FollowedAnswer(await pipeline.run(call))
        store = partial(to_be_stored, call, body, items, len(own), self._settings.max_body_bytes)
        kept = await pipeline.parsed(body, caller, num_bytes, store)
        conversation = conversation_id_of(body)
        if not body.background:
            job = partial(self._jobs.new, sent=sent, request=kept, background=False, conversation=conversation)
            return FollowedAnswer(await pipeline.run(call, job))
        made = await self._jobs.submit(await pipeline.prepare(call), sent, kept, conversation)
        return await self._of_background(body, made.jid, caller, is_new=True)

    async def _of_background(
        self, body: ResponseRequest, response_id: str, caller: Caller, *, is_new: bool = False
    ) -> CallResult:
        if body.stream:
            return await self.stream(response_id, caller, -1)
        return json_answer(await self._stored.view(*(await self._stored.load(response_id, caller)), is_new=is_new))

    async def count(self, body: InputTokensRequest, caller: Caller, num_bytes: int) -> dict[str, Any]:
        """Return the number of tokens of a body's prompt. num_bytes: size of the body.

        Raises client errors, Overloaded and Unavailable.
        """
        check_prompt(body, self._settings)
        context = await self._context(body, caller)
        resolver = self._pipeline.call_resolver
        base = await resolver.base_of(Models([body.model]), caller, worker=False)

        def make() -> ParsedCall:
            items = [*context.items, *items_of(body.input, uuid.uuid4().hex, context.known, context.items)]
            return parse_count(body, caller, self._settings, items, most_tokenized(base))

        call = await self._pipeline.parsed(body, caller, num_bytes + context.num_bytes, make)
        ignore(caller.headers, call.served_without)
        resolved = await resolver.resolve(call)
        [prompt] = (await large.work(lambda: tokenize(resolved))).prompts
        call.rules.most_tokens(call.options, prompt.num_tokens, prompt.target.within(base).max_model_len)
        return {"object": "response.input_tokens", "input_tokens": prompt.num_tokens}

    async def _context(self, body: PromptRequest, caller: Caller) -> Context:
        """Return the conversation that a body continues, and referenced items. Raises BadRequest, NotFound."""
        items: list[Item] = []
        if body.conversation is not None:
            items = await self._conversations.all_items(conversation_id_of(body), caller)
        if body.previous_response_id is not None:
            try:
                items = await self._items(body.previous_response_id, caller)
            except NotFound as error:
                text = f"Previous response with id {brief(body.previous_response_id)} not found."
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
                known |= {item["id"]: item for item in await self._items(ID_PREFIX + call, caller)}
        for _, id_ in references(body.input):
            if id_ not in known:
                raise BadRequest(f"Item with id {brief(id_)} not found.", param="input", code="item_not_found")
        return Context(items, known)

    async def _items(self, response_id: str, caller: Caller) -> list[Item]:
        """Return the items of a response, its output last. Raises NotFound, BadRequest."""
        job, facts = await self._stored.load(response_id, caller)
        end = end_of(job, facts)
        if end.status not in GOES_ON:
            text = f"response {response_id} is {end.status}: only a response with an answer can be continued"
            raise BadRequest(text, param="previous_response_id", code="previous_response_not_completed")
        return await self._stored.all_items(job, facts)

    # ------------------------------------------------------------ one response

    async def get(self, response_id: str, caller: Caller) -> dict[str, Any]:
        """Return a response. Raises NotFound."""
        return await self._stored.view(*(await self._stored.load(response_id, caller)))

    async def stream(self, response_id: str, caller: Caller, after: int) -> SentAnswer:
        """Return the stream of a response's events with numbers greater than `after`. Raises NotFound."""
        return await self._stored.stream(*(await self._stored.load(response_id, caller)), after)

    async def cancel(self, response_id: str, caller: Caller) -> dict[str, Any]:
        """Cancel a background response and return it. Idempotent. Raises NotFound, BadRequest."""
        job, _ = await self._stored.load(response_id, caller)
        if not job.background:
            raise BadRequest("Cannot cancel a synchronous response: close its connection", code="not_background")
        await self._jobs.cancel(response_id, caller)
        await self._jobs.wait_ended(job, CANCEL_WAIT_S)
        return await self.get(response_id, caller)

    async def delete(self, response_id: str, caller: Caller) -> dict[str, Any]:
        """Delete a response, cancelling it if it runs. Its conversation keeps its turn. Raises NotFound."""
        job, _ = await self._stored.load(response_id, caller)
        await self._jobs.forget(job)
        return {"id": response_id, "object": "response", "deleted": True}

    async def input_items(
        self, response_id: str, caller: Caller, limit: int, after: str | None, *, newest_first: bool
    ) -> dict[str, Any]:
        """Return a page of a response's input items. Raises NotFound, also for an unknown `after`."""
        job, _ = await self._stored.load(response_id, caller)
        items = await self._stored.input_items(job)
        if newest_first:
            items.reverse()
        start = 0
        if after is not None:
            start = 1 + next((i for i, item in enumerate(items) if item["id"] == after), len(items))
            if start > len(items):
                raise NotFound(f"there is no item {brief(after)}", param="after")
        page = items[start : start + limit]
        texts = await self._pipeline.checks.in_thread(lambda: [orjson.dumps(item) for item in page], caller.owner)
        return item_page([item["id"] for item in page], texts, has_more=len(items) > start + limit)

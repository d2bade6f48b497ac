"""Calls of OpenAI's routes: run at once, run in the background as jobs, or found by an Idempotency-Key."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from gateway.answers.call_response import CallResult
from gateway.auth.callers import Caller
from gateway.bodies.json_bodies import json_answer
from gateway.calls.earlier import check_same_body
from gateway.calls.parsed_call import Sent
from gateway.calls.pipeline import Pipeline
from gateway.jobs.jobs import JobApi, Jobs
from gateway.openai.openai_bodies import BODIES, AnyRequest
from gateway.openai.openai_parse import parse, parse_stored, to_be_stored
from gateway.openai.openai_write import write, writer_of


class OpenAICalls:
    """Takes calls of OpenAI's routes from *parse* to *write*."""

    def __init__(self, pipeline: Pipeline, others: Mapping[str, JobApi]) -> None:
        """others: path -> reader of another API's jobs, which are stored together with OpenAI's."""
        self._pipeline = pipeline
        self._settings = pipeline.settings
        apis = {path: JobApi(partial(parse_stored, path, settings=pipeline.settings), writer_of) for path in BODIES}
        self.jobs = Jobs(pipeline, {**apis, **others})

    async def answer(self, body: AnyRequest, sent: Sent, caller: Caller) -> CallResult:
        """Answer a call. Raises client errors, Overloaded and Unavailable."""
        earlier = await self._pipeline.earlier.find(sent, caller) if sent.key else None
        if earlier is not None:
            check_same_body(earlier.record, sent)
            if earlier.record.jid:
                return json_answer(await self.jobs.get(earlier.record.jid, caller), 202)
        make = partial(parse, body, caller, self._settings, sent)
        call = await self._pipeline.parsed(body, caller, len(sent.raw), make)
        if earlier is not None:
            return write(await self._pipeline.attach(call, earlier))
        if call.options.background:
            prepared, store = await self._pipeline.prepare(call), partial(to_be_stored, body, call.answer_id)
            kept = await self._pipeline.parsed(body, caller, len(sent.raw), store)
            return json_answer(await self.jobs.create(prepared, sent, kept), 202)
        return write(await self._pipeline.run(call))

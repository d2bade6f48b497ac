"""Calls to an encoder: each text becomes a request in the queue, and all results form the answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import msgspec
from pydantic import BaseModel

from gateway.answers.call_response import CallResult
from gateway.auth.callers import Caller
from gateway.bodies.json_bodies import json_answer
from gateway.calls.earlier import check_same_body
from gateway.calls.follow import Generation
from gateway.calls.parsed_call import ParsedCall, Sent, Texts
from gateway.calls.pipeline import Pipeline
from gateway.encoders.encoder_bodies import (
    ClassifyRequest,
    EmbeddingsRequest,
    EncoderBatchRequest,
    EncoderRequest,
    RerankRequest,
    ScoreRequest,
)
from gateway.encoders.encoder_parse import (
    parse_classify,
    parse_embeddings,
    parse_native,
    parse_rerank,
    parse_score,
    parse_stored,
    to_be_stored,
)
from gateway.encoders.encoder_write import (
    ClassifyAnswer,
    EmbeddingsWriter,
    EncoderAnswer,
    Write,
    write_embedding,
    write_embeddings,
    write_entities,
)
from gateway.encoders.scores import write_labels, write_ranks, write_scores, write_text_labels
from gateway.http.paths import EMBEDDINGS
from gateway.jobs.jobs import JobApi, Jobs
from protocol.wire.messages import Task

T = TypeVar("T")


class EncoderCalls:
    """Takes an encoder's calls from *parse* to *write*: at once, in the background, or by an Idempotency-Key."""

    def __init__(self, pipeline: Pipeline, jobs: Jobs) -> None:
        """jobs: the gateway's jobs, to which calls for embeddings are added."""
        self._pipeline = pipeline
        self._settings = pipeline.settings
        self._jobs = jobs
        jobs.serve(
            EMBEDDINGS, JobApi(partial(parse_stored, settings=pipeline.settings), EmbeddingsWriter, generates=False)
        )

    async def embeddings(self, request: EmbeddingsRequest, sent: Sent, caller: Caller) -> CallResult:
        """Answer `/v1/embeddings`. Raises client errors, Overloaded and Unavailable."""
        earlier = await self._pipeline.earlier.find(sent, caller)
        if earlier is not None and earlier.record.jid:
            check_same_body(earlier.record, sent)
            return json_answer(await self._jobs.get(earlier.record.jid, caller), 202)
        call = await self._parsed(request, sent, caller, partial(parse_embeddings, request, caller, self._settings))
        if call.options.background:
            prepared = await self._pipeline.prepare(msgspec.structs.replace(call, sent=sent))
            kept = await self._pipeline.parsed(request, caller, len(sent.raw), partial(to_be_stored, request))
            return json_answer(await self._jobs.create(prepared, sent, kept), 202)
        return self._answer(await self._run(call, sent), write_embeddings(request))

    async def embed(self, request: EncoderRequest, sent: Sent | None, caller: Caller) -> EncoderAnswer:
        """Answer `/embed`. Raises as `embeddings`, and GenerationFailed."""
        make = partial(parse_native, request, "embed", caller, self._settings)
        generation = await self._run(await self._parsed(request, sent, caller, make), sent)
        return EncoderAnswer(generation, write_embedding, native=True)

    async def classify(
        self, request: EncoderRequest | EncoderBatchRequest, sent: Sent | None, caller: Caller, started_s: float
    ) -> EncoderAnswer:
        """Answer `/classify` and `/classify_batch`. started_s: monotonic time of arrival. Raises as `embed`."""
        make = partial(parse_native, request, "classify", caller, self._settings)
        call = await self._parsed(request, sent, caller, make)
        find = self._pipeline.call_resolver.base_of
        base = await find(call.models, caller, worker=True, refused=call.rules.refused_adapter)
        of_texts = base.does("score") and not base.does("classify")
        if of_texts and isinstance(call.inputs, Texts):
            call = msgspec.structs.replace(
                call, task="score", inputs=msgspec.structs.replace(call.inputs, with_offsets=False)
            )
        generation = await self._run(call, sent)
        write = write_text_labels(request) if of_texts else write_entities(request)
        return ClassifyAnswer(generation, write, started_s)

    async def probe(self, text: str, task: Task, caller: Caller) -> Generation:
        """Start a call that suits a base model's task. Raises as `embed`."""
        request = EncoderRequest(inputs=text)
        if task == "embed":
            return (await self.embed(request, None, caller)).generation
        return (await self.classify(request, None, caller, time.monotonic())).generation

    async def labels(self, request: ClassifyRequest, sent: Sent, caller: Caller) -> EncoderAnswer:
        """Answer `/v1/classify`. Raises as `embeddings`."""
        make = partial(parse_classify, request, caller, self._settings)
        generation = await self._run(await self._parsed(request, sent, caller, make), sent)
        return self._answer(generation, write_labels(request))

    async def ranks(self, request: RerankRequest, sent: Sent, caller: Caller) -> EncoderAnswer:
        """Answer `/v1/rerank`. Raises as `embeddings`."""
        make = partial(parse_rerank, request, caller, self._settings)
        parsed, documents = await self._parsed(request, sent, caller, make)
        return self._answer(await self._run(parsed, sent), write_ranks(request, documents))

    async def scores(self, request: ScoreRequest, sent: Sent, caller: Caller) -> EncoderAnswer:
        """Answer `/v1/score`. Raises as `embeddings`."""
        make = partial(parse_score, request, caller, self._settings)
        parsed, num_firsts = await self._parsed(request, sent, caller, make)
        return self._answer(await self._run(parsed, sent), write_scores(request, num_firsts))

    async def _parsed(self, request: BaseModel, sent: Sent | None, caller: Caller, make: Callable[[], T]) -> T:
        return await self._pipeline.parsed(request, caller, len(sent.raw) if sent is not None else 0, make)

    async def _run(self, call: ParsedCall, sent: Sent | None) -> Generation:
        """Run a call, or attach to the earlier call with its Idempotency-Key. Raises as `Pipeline.run_once`."""
        if sent is None or not sent.key:
            return await self._pipeline.run(call)
        return await self._pipeline.run_once(msgspec.structs.replace(call, sent=sent))

    def _answer(self, generation: Generation, write: Write) -> EncoderAnswer:
        return EncoderAnswer(generation, write, native=False)

"""Calls of an encoder base: each text becomes a request in the queue, and the numbers of all an answer."""

from __future__ import annotations

from gateway.auth.callers import Caller
from gateway.calls.follow import Generation
from gateway.calls.pipeline import Pipeline
from gateway.encoders.bodies import (
    ClassifyRequest,
    EmbeddingsRequest,
    EncoderBatchRequest,
    EncoderRequest,
    RerankRequest,
    ScoreRequest,
)
from gateway.encoders.parse import parse_classify, parse_embeddings, parse_native, parse_rerank, parse_score
from gateway.encoders.scores import write_labels, write_ranks, write_scores, write_text_labels
from gateway.encoders.write import (
    ClassifyResponse,
    EncoderResponse,
    Write,
    write_embedding,
    write_embeddings,
    write_entities,
)
from protocol.wire.messages import Task


class EncoderCalls:
    """The way of an encoder's calls, from *parse* to *write*."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._settings = pipeline.settings

    async def embeddings(self, request: EmbeddingsRequest, caller: Caller) -> EncoderResponse:
        """Answer `/v1/embeddings`. Raises what the client did wrong, Overloaded and Unavailable."""
        generation = await self._pipeline.run(parse_embeddings(request, caller, self._settings))
        return self._answer(generation, write_embeddings(request))

    async def embed(self, request: EncoderRequest, caller: Caller) -> EncoderResponse:
        """Answer `/embed`. Raises as `embeddings`, and GenerationFailed."""
        generation = await self._pipeline.run(parse_native(request, "embed", caller, self._settings))
        return EncoderResponse(generation, write_embedding, native=True, keepalive_s=self._settings.keepalive_s)

    async def classify(
        self, request: EncoderRequest | EncoderBatchRequest, caller: Caller, started_s: float
    ) -> EncoderResponse:
        """Answer `/classify` and `/classify_batch`. started_s: monotonic, of its arrival. Raises as `embed`."""
        base = await self._pipeline.fleet.require(worker=True)
        of_texts = base.does("score") and not base.does("classify")
        task: Task = "score" if of_texts else "classify"
        generation = await self._pipeline.run(parse_native(request, task, caller, self._settings))
        write = write_text_labels(request) if of_texts else write_entities(request)
        return ClassifyResponse(generation, write, started_s, self._settings.keepalive_s)

    async def labels(self, request: ClassifyRequest, caller: Caller) -> EncoderResponse:
        """Answer `/v1/classify`. Raises as `embeddings`."""
        generation = await self._pipeline.run(parse_classify(request, caller, self._settings))
        return self._answer(generation, write_labels(request))

    async def ranks(self, request: RerankRequest, caller: Caller) -> EncoderResponse:
        """Answer `/v1/rerank`. Raises as `embeddings`."""
        parsed, documents = parse_rerank(request, caller, self._settings)
        return self._answer(await self._pipeline.run(parsed), write_ranks(request, documents))

    async def scores(self, request: ScoreRequest, caller: Caller) -> EncoderResponse:
        """Answer `/v1/score`. Raises as `embeddings`."""
        parsed, num_firsts = parse_score(request, caller, self._settings)
        return self._answer(await self._pipeline.run(parsed), write_scores(request, num_firsts))

    def _answer(self, generation: Generation, write: Write) -> EncoderResponse:
        return EncoderResponse(generation, write, native=False, keepalive_s=self._settings.keepalive_s)

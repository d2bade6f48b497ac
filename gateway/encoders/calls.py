"""Calls of an encoder base: each text becomes a request in the queue, and the numbers of all an answer."""

from __future__ import annotations

from gateway.auth.callers import Caller
from gateway.calls.pipeline import Pipeline
from gateway.encoders.bodies import EmbeddingsRequest, EncoderBatchRequest, EncoderRequest
from gateway.encoders.parse import parse_embeddings, parse_native
from gateway.encoders.write import (
    ClassifyResponse,
    EncoderResponse,
    write_embedding,
    write_embeddings,
    write_entities,
)


class EncoderCalls:
    """The way of an encoder's calls, from *parse* to *write*."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._settings = pipeline.settings

    async def embeddings(self, request: EmbeddingsRequest, caller: Caller) -> EncoderResponse:
        """Answer `/v1/embeddings`. Raises what the client did wrong, Overloaded and Unavailable."""
        generation = await self._pipeline.run(parse_embeddings(request, caller, self._settings))
        write = write_embeddings(request)
        return EncoderResponse(generation, write, native=False, keepalive_s=self._settings.keepalive_s)

    async def embed(self, request: EncoderRequest, caller: Caller) -> EncoderResponse:
        """Answer `/embed`. Raises as `embeddings`, and GenerationFailed."""
        generation = await self._pipeline.run(parse_native(request, "embed", caller, self._settings))
        return EncoderResponse(generation, write_embedding, native=True, keepalive_s=self._settings.keepalive_s)

    async def classify(
        self, request: EncoderRequest | EncoderBatchRequest, caller: Caller, started_s: float
    ) -> EncoderResponse:
        """Answer `/classify` and `/classify_batch`. started_s: monotonic, of its arrival. Raises as `embed`."""
        generation = await self._pipeline.run(parse_native(request, "classify", caller, self._settings))
        return ClassifyResponse(generation, write_entities(request), started_s, self._settings.keepalive_s)

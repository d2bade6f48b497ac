"""The routes for vectors, labels and scores, of OpenAI, vLLM, Cohere, Jina and LoRAX."""

from __future__ import annotations

import time

from fastapi import FastAPI, Request
from starlette.responses import Response

from gateway.answers.respond import Answers, sent_of
from gateway.auth.callers import caller_of
from gateway.bodies.json_bodies import JsonRoute
from gateway.calls.parsed_call import Sent
from gateway.encoders.encoder_bodies import (
    ClassifyRequest,
    EitherClassifyRequest,
    EmbeddingsRequest,
    EncoderBatchRequest,
    EncoderRequest,
    RerankRequest,
    ScoreRequest,
)
from gateway.encoders.encoder_calls import EncoderCalls
from gateway.http import openapi
from gateway.http.access import CALL, Routes
from gateway.http.errors import OPENAI_ERRORS
from gateway.http.paths import CLASSIFY, EMBEDDINGS, RERANK, SCORE
from gateway.lorax.lorax_errors import LORAX_ERRORS


class EncoderEndpoints:
    """The routes' handlers."""

    def __init__(self, answers: Answers, encoders: EncoderCalls) -> None:
        self._respond = answers.respond
        self._encoders = encoders

    async def embeddings(self, body: EmbeddingsRequest, request: Request) -> Response:
        """Answer `/v1/embeddings`."""
        return await self._respond(self._encoders.embeddings(body, await _sent(request), caller_of(request)))

    async def embed(self, body: EncoderRequest, request: Request) -> Response:
        """Answer `/embed`."""
        answer = self._encoders.embed(body, await _sent(request), caller_of(request))
        return await self._respond(answer, errors=LORAX_ERRORS)

    async def classify(self, body: EitherClassifyRequest, request: Request) -> Response:
        """Answer `/classify`, in LoRAX's or vLLM's form."""
        if isinstance(body, ClassifyRequest):
            return await self.labels(body, request)
        answer = self._encoders.classify(body, await _sent(request), caller_of(request), time.monotonic())
        return await self._respond(answer, errors=LORAX_ERRORS)

    async def classify_batch(self, body: EncoderBatchRequest, request: Request) -> Response:
        """Answer `/classify_batch`."""
        answer = self._encoders.classify(body, await _sent(request), caller_of(request), time.monotonic())
        return await self._respond(answer, errors=LORAX_ERRORS)

    async def labels(self, body: ClassifyRequest, request: Request) -> Response:
        """Answer `/v1/classify`."""
        answer = self._encoders.labels(body, await _sent(request), caller_of(request))
        return await self._respond(answer, errors=OPENAI_ERRORS)

    async def rerank(self, body: RerankRequest, request: Request) -> Response:
        """Answer `/rerank`, `/v1/rerank` and `/v2/rerank`."""
        return await self._respond(self._encoders.ranks(body, await _sent(request), caller_of(request)))

    async def score(self, body: ScoreRequest, request: Request) -> Response:
        """Answer `/score` and `/v1/score`."""
        return await self._respond(self._encoders.scores(body, await _sent(request), caller_of(request)))


async def _sent(request: Request) -> Sent:
    return await sent_of(request.scope["path"], request)


def add_encoder_routes(app: FastAPI, encoders: EncoderEndpoints) -> None:
    """Bind paths to handlers."""
    routes = Routes(app, JsonRoute)
    routes.post(EMBEDDINGS, CALL, responses=openapi.EMBEDDINGS)(encoders.embeddings)
    routes.post("/embed", CALL, responses=openapi.EMBEDDING)(encoders.embed)
    routes.post("/classify", CALL, responses=openapi.ENTITIES)(encoders.classify)
    routes.post(CLASSIFY, CALL, responses=openapi.LABELS)(encoders.labels)
    for path in RERANK:
        routes.post(path, CALL, responses=openapi.RANKS)(encoders.rerank)
    for path in SCORE:
        routes.post(path, CALL, responses=openapi.SCORES)(encoders.score)
    routes.post("/classify_batch", CALL, responses=openapi.ENTITIES_OF_SEVERAL)(encoders.classify_batch)

"""The routes of encoder bases: OpenAI's `/v1/embeddings`; LoRAX's `/embed`, `/classify` and `/classify_batch`."""

from __future__ import annotations

import time
from collections.abc import Coroutine
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from gateway.auth.callers import caller_of
from gateway.calls.calls import Calls
from gateway.encoders.api import EMBEDDINGS, EmbeddingsRequest, EncoderBatchRequest, EncoderRequest
from gateway.encoders.calls import EncoderCalls
from gateway.http import openapi
from gateway.http.errors import OPENAI_ERRORS, ErrorShape
from gateway.http.keep_alive import KeepAliveResponse
from gateway.http.routes import Endpoints, JsonRoute
from gateway.lorax.errors import LORAX_ERRORS
from protocol.wire.errors import Unavailable


class EncoderEndpoints:
    """The routes' handlers."""

    def __init__(self, endpoints: Endpoints, calls: Calls) -> None:
        self._endpoints = endpoints
        self._keepalive_s = calls.settings.keepalive_s
        self._encoders = EncoderCalls(calls)

    async def embeddings(self, body: EmbeddingsRequest, request: Request) -> Response:
        return self._respond(self._encoders.embeddings(body, caller_of(request)), OPENAI_ERRORS)

    async def embed(self, body: EncoderRequest, request: Request) -> Response:
        return self._respond(self._encoders.embed(body, caller_of(request)), LORAX_ERRORS)

    async def classify(self, body: EncoderRequest, request: Request) -> Response:
        answer = self._encoders.classify(body, caller_of(request), time.monotonic())
        return self._respond(answer, LORAX_ERRORS)

    async def classify_batch(self, body: EncoderBatchRequest, request: Request) -> Response:
        answer = self._encoders.classify(body, caller_of(request), time.monotonic())
        return self._respond(answer, LORAX_ERRORS)

    def _respond(self, answer: Coroutine[Any, Any, Response], errors: ErrorShape) -> Response:
        if self._endpoints.draining:
            answer.close()
            raise Unavailable("this gateway is shutting down; another one can take the request", code="shutting_down")
        return KeepAliveResponse(answer, stream=False, keepalive_s=self._keepalive_s, errors=errors)


def add_encoder_routes(app: FastAPI, encoders: EncoderEndpoints) -> None:
    """Bind paths to handlers."""
    app.router.route_class = JsonRoute
    app.post(EMBEDDINGS, responses=openapi.EMBEDDINGS)(encoders.embeddings)
    app.post("/embed", responses=openapi.EMBEDDING)(encoders.embed)
    app.post("/classify", responses=openapi.ENTITIES)(encoders.classify)
    app.post("/classify_batch", responses=openapi.ENTITIES_OF_SEVERAL)(encoders.classify_batch)

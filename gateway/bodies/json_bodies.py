"""JSON in and out: bodies are read and answers written by orjson, each within the limits of `json_values`."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from gateway.auth.callers import caller_of
from gateway.bodies import json_values
from gateway.bodies.parameter_check import IGNORED_HEADER, JsonBody, check_parameters
from gateway.http.errors import ERROR_SHAPE, OPENAI_ERRORS
from gateway.http.paths import TOKENIZE
from gateway.overload.large import working
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

logger = logging.getLogger(__name__)

Handler = Callable[..., Coroutine[Any, Any, Response]]


def body_value(raw: bytes) -> Any:
    """Return the value of a body. Raises JSONDecodeError, and HTTPException, as FastAPI lets it pass, for too many."""
    try:
        return json_values.loads(raw)
    except BadRequest as error:
        raise HTTPException(400, error.message) from error


class _JsonRequest(Request):
    """Parses bodies with `body_value`, and notes whose errors a body of `/tokenize` is answered with."""

    async def json(self) -> Any:
        value = body_value(await self.body())
        if self.url.path == TOKENIZE and isinstance(value, dict) and value.keys() & {"prompt", "messages"}:
            self.scope[ERROR_SHAPE] = OPENAI_ERRORS
        return value


class JsonRoute(APIRoute):
    """A route whose bodies are parsed by `_JsonRequest`: a large one in its turn, once all of it is there.

    A body that is a `JsonBody` may have no parameter that would have no effect; a handler takes it with its request.
    Calls take the way of `direct.py`.
    """

    any_type = False
    """Whether a body is taken for JSON whatever its content type says."""

    def __init__(self, path: str, endpoint: Handler, **options: Any) -> None:
        super().__init__(path, _checked(endpoint), **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler."""
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def handle(request: Request) -> Response:
            scope = request.scope
            if self.any_type:
                rest = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
                scope = {**scope, "headers": [*rest, (b"content-type", b"application/json")]}
            request = _JsonRequest(scope, request.receive)
            try:
                await request.body()
            except ClientDisconnect:
                raise HTTPException(400, "the client left before its body was complete") from None
            async with working():
                return await handler(request)

        return handle


class AnyTypeRoute(JsonRoute):
    """A route whose clients need not say that their bodies are JSON, such as curl in Ollama's documentation."""

    any_type = True


def _checked(endpoint: Handler) -> Handler:
    """Return a handler that is called with bodies whose parameters `check_parameters` has judged."""

    @functools.wraps(endpoint)
    async def checked(*, request: Request, body: JsonBody, **others: Any) -> Response:
        settings: Settings = request.app.state.settings
        ignored = check_parameters(body, settings.unknown_parameters)
        if ignored:
            logger.warning("%s is served without %s", request.url.path, ignored)
            caller_of(request).headers[IGNORED_HEADER] = ignored
        return await endpoint(request=request, body=body, **others)

    return checked if "body" in inspect.signature(endpoint).parameters else endpoint


def json_response(value: Any, status: int = 200) -> Response:
    """Return a value as a JSON answer."""
    return Response(orjson.dumps(value), status, media_type="application/json")

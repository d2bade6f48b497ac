"""Errors as HTTP: the OpenAI shape on every status, and what tells a client whether to try again."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from protocol.queue.bus import CONNECTION_ERRORS
from protocol.wire.errors import BadRequest, ClientError, Internal, LorafleetError, NotFound, TooLarge, Unavailable

logger = logging.getLogger(__name__)

MAX_RETRY_AFTER_S = 60
"""OpenAI's clients do not try again at all when they are told to wait for much longer."""

_MAX_LISTED = 3  # reasons of one field that are shown
_OWN_WORDS = {  # pydantic's error type -> what it means to who wrote the JSON
    "missing": "it is missing",
    "string_type": "it must be a string",
    "int_type": "it must be an integer",
    "float_type": "it must be a number",
    "bool_type": "it must be true or false",
    "list_type": "it must be a list",
    "dict_type": "it must be an object",
    "model_type": "it must be an object",
    "model_attributes_type": "it must be an object",
    "finite_number": "it must be a finite number",
    "string_unicode": "it is not valid Unicode",
}


class ErrorShape(Protocol):
    """How an API writes errors."""

    def body(self, error: LorafleetError) -> bytes:
        """Return the JSON of an error."""
        ...

    def response(self, error: LorafleetError, headers: Mapping[str, str] | None = None) -> Response:
        """Return the response that an error is."""
        ...


class OpenAIErrors:
    """OpenAI's shape."""

    def body(self, error: LorafleetError) -> bytes:
        fields = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
        return orjson.dumps({"error": fields})

    def response(self, error: LorafleetError, headers: Mapping[str, str] | None = None) -> Response:
        all_headers = {**retry_headers(error), **(headers or {})}
        return Response(self.body(error), error.status, all_headers, "application/json")


OPENAI_ERRORS = OpenAIErrors()


def retry_headers(error: LorafleetError) -> dict[str, str]:
    """Return the headers that tell a client whether and when to try again."""
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers["retry-after"] = str(min(math.ceil(retry_after_s), MAX_RETRY_AFTER_S))
    return headers


def unreachable_queue(cause: Exception) -> Unavailable:
    """Log a lost connection to the queue and return what its client is told."""
    logger.error("the queue cannot be reached: %r", cause)
    return Unavailable("the queue cannot be reached", code="queue_unavailable")


def error_of(cause: Exception) -> LorafleetError:
    """Return what a client is told of a failure in the middle of its answer; log it if it is not the client's."""
    if isinstance(cause, LorafleetError):
        return cause
    if isinstance(cause, CONNECTION_ERRORS):
        return unreachable_queue(cause)
    logger.error("a call failed", exc_info=cause)
    return Internal("the gateway failed while answering")


def add_handlers(app: FastAPI, shape_of: Callable[[str], ErrorShape]) -> None:
    """Make every error that leaves a route a response in the shape that belongs to the request's path."""

    def error_response(request: Request, error: LorafleetError, headers: Mapping[str, str] | None = None) -> Response:
        return shape_of(request.url.path).response(error, headers)

    async def own(request: Request, error: Exception) -> Response:
        assert isinstance(error, LorafleetError)
        return error_response(request, error)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(request, _from_validation(error.errors(), request.headers.get("content-type", "")))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(request, _from_http(request, error), error.headers)

    async def queue(request: Request, error: Exception) -> Response:
        return error_response(request, unreachable_queue(error))

    async def fault(request: Request, error: Exception) -> Response:
        return error_response(request, Internal("the gateway failed"))

    app.add_exception_handler(Exception, fault)
    app.add_exception_handler(LorafleetError, own)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    for kind in CONNECTION_ERRORS:
        app.add_exception_handler(kind, queue)


def _from_http(request: Request, error: HTTPException) -> LorafleetError:
    if error.status_code == 404:
        return NotFound(f"Unknown request URL: {request.method} {request.url.path}", code="unknown_url")
    if error.status_code == 405:
        own: LorafleetError = ClientError(f"{request.method} is not allowed on {request.url.path}")
        own.code = "method_not_allowed"
    elif error.status_code == 413:
        own = TooLarge(str(error.detail), code="body_too_large")
    else:
        own = ClientError(str(error.detail))
    own.status = error.status_code
    return own


def _from_validation(errors: Sequence[Any], content_type: str) -> LorafleetError:
    """Return the first wrong field's error. The alternatives of a union appear as one error each: all are named."""
    first = errors[0]
    if first["type"] == "json_invalid":
        message = f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
        return BadRequest(message, code="invalid_json")
    depth = 3 if tuple(first["loc"][1:2]) == ("parameters",) else 2  # LoRAX's bodies have all but one field in there
    place: tuple[Any, ...] = tuple(first["loc"][1:depth])
    if not place:
        if content_type and "json" not in content_type and first["type"] != "missing":
            error = ClientError(f"the body must be JSON, not {content_type}", code="unsupported_media_type")
            error.status = 415
            return error
        return BadRequest("the body must be a JSON object")
    field = ".".join(map(str, place))
    reasons = [_words(e) for e in errors if tuple(e["loc"][1:depth]) == place]
    listed = " or ".join(list(dict.fromkeys(reasons))[:_MAX_LISTED])
    return BadRequest(f"{field}: {listed}", param=field)


def _words(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return f"it has no field {error['loc'][-1]}"
    return _OWN_WORDS.get(error["type"]) or error["msg"][:1].lower() + error["msg"][1:]

"""Errors as HTTP: their JSON bodies, and the headers that tell whether a client should retry."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gateway.http.access import MATCH
from gateway.http.unknown import NOT_SERVED, unknown_url
from protocol.queue.bus import CONNECTION_ERRORS, DiskFull, MemoryFull
from protocol.runtime.tracing import TRACE_ID
from protocol.wire.errors import (
    BadRequest,
    ClientError,
    Internal,
    LorafleetError,
    NotFound,
    QueueFull,
    TooLarge,
    Unavailable,
)

logger = logging.getLogger(__name__)

MAX_RETRY_AFTER_S = 60
"""Maximum Retry-After, in seconds; OpenAI's clients give up on a much longer one."""

MAX_TEXT_CHARACTERS = 1900
"""Maximum characters of an error's message."""

_WITH_FIELDS = frozenset(
    ("parameters", "merged_adapters", "stream_options", "thinking", "output_config", "text", "reasoning")
)
"""Fields that are objects; errors name the inner field. LoRAX's bodies have most fields in one."""

FORM = "form "
"""Prefix of the tags of a body's alternative forms; errors leave these tags out."""

_RANGES = {"gt", "ge", "lt", "le"}
_MAX_LISTED = 3  # reasons shown for one field
_OWN_WORDS = {  # pydantic's error type -> text for the author of the JSON
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
    """The error format of an API."""

    def body(self, error: LorafleetError) -> bytes:
        """Return an error's body as JSON."""
        ...

    def response(self, error: LorafleetError, headers: Mapping[str, str] | None = None) -> Response:
        """Return an error's response. headers: added to those of the error's kind."""
        ...


ShapeOf = Callable[[Mapping[str, Any]], ErrorShape]
"""Returns the error format for a request, given its path and headers as in an ASGI scope."""

REQUEST_ID_OF: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the current task's request, which some error bodies include; "" if there is none."""


@dataclass(slots=True)
class Outcome:
    """Facts about a request's handling that its response does not show."""

    began_ms: int = 0  # unix time
    model: str = ""  # the requested model, once the body is read
    is_queued: bool = False  # it was queued; the queue records its end
    error: LorafleetError | None = None  # the last error written to the client


OUTCOME_OF: ContextVar[Outcome] = ContextVar("outcome")
"""The outcome of the current request, shared with its tasks; unset outside a request."""


def note(error: LorafleetError) -> LorafleetError:
    """Record the error that answers the current request; return it."""
    outcome = OUTCOME_OF.get(None)
    if outcome is not None:
        outcome.error = error
    return error


class OpenAIErrors:
    """OpenAI's error format."""

    def body(self, error: LorafleetError) -> bytes:
        """Return an error's body as JSON."""
        param = None if error.param is None else cut(error.param)
        fields = {"message": cut(error.message), "type": error.type, "param": param, "code": error.code}
        return orjson.dumps({"error": traced(fields)})

    def response(self, error: LorafleetError, headers: Mapping[str, str] | None = None) -> Response:
        """Return an error's response."""
        all_headers = {**retry_headers(error), **(headers or {})}
        return Response(self.body(error), error.status, all_headers, "application/json")


OPENAI_ERRORS = OpenAIErrors()

ERROR_SHAPE = "lorafleet.errors"
"""Scope key of a request's error format, set where the body, not the path, determines the API."""


def cut(text: str) -> str:
    """Return a text for a client, shortened if the client's input made it long."""
    return text if len(text) <= MAX_TEXT_CHARACTERS else text[: MAX_TEXT_CHARACTERS - 1] + "…"


def traced(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an error's body, with the request's trace id if it is traced."""
    trace_id = TRACE_ID.get()
    return {**fields, "trace_id": trace_id} if trace_id else fields


class HttpError(ClientError):
    """A request that is invalid as HTTP, with its status."""

    def __init__(self, status: int, message: str, *, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.status = status


def retry_headers(error: LorafleetError) -> dict[str, str]:
    """Return the headers that tell whether and when a client should retry, and record the error."""
    note(error)
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers["retry-after"] = str(min(math.ceil(retry_after_s), MAX_RETRY_AFTER_S))
    return headers


def unreachable_queue(cause: BaseException) -> Unavailable:
    """Log why the queue failed, and return the error for the client."""
    if isinstance(cause, MemoryFull):
        logger.error("the queue's memory is full")
        return QueueFull("the queue's memory is full: nothing can be stored until requests end or expire")
    if isinstance(cause, DiskFull):
        logger.error("the queue's server cannot write to its disk: %s", cause)
        return Unavailable("the queue's server cannot write to its disk", code="queue_unavailable")
    logger.error("the queue cannot be reached: %r", cause)
    return Unavailable("the queue cannot be reached", code="queue_unavailable")


def error_of(cause: BaseException) -> LorafleetError:
    """Return the error for a client whose answer has failed; log the failure unless the client caused it."""
    if isinstance(cause, LorafleetError):
        return note(cause)
    if isinstance(cause, CONNECTION_ERRORS):
        return note(unreachable_queue(cause))
    logger.error("a call failed", exc_info=cause)
    return note(Internal("the gateway failed while answering"))


def is_foreseen(error: Exception) -> bool:
    """Return whether an error raised by a route has a defined meaning for clients; any other is a bug."""
    return isinstance(error, (LorafleetError, RequestValidationError, HTTPException, *CONNECTION_ERRORS))


def response_to(error: Exception, request: Request, shape_of: ShapeOf) -> Response:
    """Return the response to an error raised by a route, in the request's error format."""
    headers: Mapping[str, str] | None = None
    if isinstance(error, LorafleetError):
        answer = error
    elif isinstance(error, RequestValidationError):
        answer = _from_validation(error.errors(), request.headers.get("content-type", ""))
    elif isinstance(error, HTTPException):
        allowed: Sequence[str] = request.scope[MATCH].allowed  # the router does not see paths, so it raises only 404
        answer, headers = _from_http(request, error, allowed), error.headers
        if answer.status == 405:
            headers = {**(headers or {}), "Allow": ", ".join(allowed)}
    elif isinstance(error, CONNECTION_ERRORS):
        answer = unreachable_queue(error)
    else:
        answer = Internal("the gateway failed")
    shape = request.scope.get(ERROR_SHAPE) or shape_of(request.scope)
    return shape.response(answer, headers)


def let_go(error: BaseException) -> None:
    """Clear the traceback of a foreseen error: its frames hold the body, in a reference cycle with the task.

    The garbage collector would free it late, and traverse a million token ids on each run until then.
    """
    related: BaseException | None = error
    while related is not None and related.__traceback__ is not None:  # a chain of re-raised errors may be cyclic
        related.__traceback__ = None
        related = related.__cause__ or related.__context__


def add_handlers(app: FastAPI, shape_of: ShapeOf) -> None:
    """Install handlers that turn every error raised by a route into a response."""

    async def handle(request: Request, error: Exception) -> Response:
        response = response_to(error, request, shape_of)
        if is_foreseen(error):
            let_go(error)
        return response

    for kind in (Exception, LorafleetError, RequestValidationError, HTTPException, *CONNECTION_ERRORS):
        app.add_exception_handler(kind, handle)


def _from_http(request: Request, error: HTTPException, allowed: Sequence[str]) -> LorafleetError:
    method, path = request.method, request.scope["path"]
    if error.status_code == 404:
        if not allowed or path in NOT_SERVED:
            return NotFound(unknown_url(method, path, request.app.routes), code="unknown_url")
        return HttpError(
            405, f"{method} is not allowed on {path}: only {', '.join(allowed)}", code="method_not_allowed"
        )
    if error.status_code == 413:
        return TooLarge(str(error.detail), code="body_too_large")
    return HttpError(error.status_code, str(error.detail))


def _from_validation(errors: Sequence[Any], content_type: str) -> LorafleetError:
    """Return the error of the first invalid field, with a reason for each alternative of a union."""
    first = errors[0]
    if first["type"] == "json_invalid":
        message = f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
        return BadRequest(message, code="invalid_json")
    loc = _loc(first)
    depth = 1 + len(list(takewhile(_WITH_FIELDS.__contains__, loc)))
    place = loc[:depth]
    if not place:
        if content_type and "json" not in content_type and first["type"] != "missing":
            return HttpError(415, f"the body must be JSON, not {content_type}", code="unsupported_media_type")
        return BadRequest("the body must be a JSON object")
    field = ".".join(map(str, place))
    reasons = [_words(e) for e in errors if _loc(e)[:depth] == place]
    listed = " or ".join(list(dict.fromkeys(reasons))[:_MAX_LISTED])
    return BadRequest(f"{field}: {listed}", param=field)


def _loc(error: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return an error's location in the body, without the tag of an alternative form."""
    loc = tuple(error["loc"][1:])
    return loc[1:] if loc and str(loc[0]).startswith(FORM) else loc


def _words(error: Mapping[str, Any]) -> str:
    kind, given = error["type"], error.get("input")
    if kind == "int_type" and isinstance(given, float) and abs(given) >= 1 << 63:  # a large integer, as orjson reads it
        return f"it must be an integer from {-(1 << 63)} to {(1 << 63) - 1}, not {given:g}"
    words = _OWN_WORDS.get(kind) or error["msg"][:1].lower() + error["msg"][1:]
    if not _RANGES.isdisjoint(error.get("ctx") or {}):  # pydantic names only the limit
        return f"{words}, not {given!s:.40}"
    if isinstance(given, str) and kind in ("string_too_long", "string_too_short"):
        return f"{words}, not {len(given)}"
    return words

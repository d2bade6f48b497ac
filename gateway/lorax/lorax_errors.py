"""Errors in LoRAX's format: `{"error", "error_type"}`, its status codes, and the beginnings of its messages."""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from starlette.responses import Response

from gateway.http.errors import cut, retry_headers, traced
from protocol.wire.errors import ClientError, LorafleetError

_BY_STATUS = {  # statuses that mean the same in both APIs -> error_type
    401: "authentication",
    403: "permission",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "payload_too_large",
    415: "unsupported_media_type",
    431: "headers_too_large",
    503: "unavailable",
    504: "timeout",
}


class GenerationFailed(ClientError):
    """An adapter cannot be served, or the engine failed; LoRAX answers both with 424."""

    status = 424

    def __init__(self, cause: LorafleetError) -> None:
        super().__init__(cause.message, param=cause.param, code=cause.code)
        self.retryable = cause.retryable


class LoraxErrors:
    """LoRAX's error format."""

    def __init__(self, *, generating: bool) -> None:
        """Set the phase. generating: the parameters were valid, so every error is a failed generation."""
        self._generating = generating

    def body(self, error: LorafleetError) -> bytes:
        """Return an error's body as JSON."""
        return self._parts(error)[1]

    def response(self, error: LorafleetError, headers: Mapping[str, str] | None = None) -> Response:
        """Return an error's response."""
        status, body = self._parts(error)
        return Response(body, status, {**retry_headers(error), **(headers or {})}, "application/json")

    def _parts(self, error: LorafleetError) -> tuple[int, bytes]:
        status, kind, text = self._told(error)
        return status, orjson.dumps(traced({"error": text, "error_type": kind}))

    def _told(self, error: LorafleetError) -> tuple[int, str, str]:
        message = cut(error.message)
        if error.status == 429:
            return 429, "overloaded", f"Model is overloaded: {message}"
        if error.status in (503, 504):
            return error.status, _BY_STATUS[error.status], message
        if isinstance(error, GenerationFailed) or self._generating:
            return 424, "generation", f"Request failed during generation: Server error: {message}"
        if error.status >= 500:
            return 500, "incomplete_generation", f"Incomplete generation: {message}"
        if error.status in _BY_STATUS:
            return error.status, _BY_STATUS[error.status], message
        if error.code in ("invalid_json", "invalid_http"):
            return 400, "bad_request", message
        return 422, "validation", f"Input validation error: {message}"


LORAX_ERRORS = LoraxErrors(generating=False)
LORAX_GENERATION_ERRORS = LoraxErrors(generating=True)

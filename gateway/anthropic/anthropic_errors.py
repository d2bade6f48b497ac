"""Errors in Anthropic's format, before a stream and within it.

`details.error_code` names the cause, `details.param` the invalid field; an unknown one is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from starlette.responses import Response

from gateway.http.errors import REQUEST_ID_OF, cut, retry_headers, traced
from protocol.wire.errors import LorafleetError

OVERLOADED = 529
"""Anthropic's status for 503."""

_STATUS = {503: OVERLOADED}

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}
"""Status -> `type`. Other statuses are `invalid_request_error` below 500 and `api_error` from there."""

_CODES = {("unsupported_parameter", "thread"): "thread_unsupported_request"}
"""Code and parameter -> Anthropic's code, on which its client acts by sending whole conversations from then on."""


class AnthropicErrors:
    """Anthropic's error format."""

    def body(self, error: LorafleetError) -> bytes:
        """Return an error's body as JSON."""
        status = _STATUS.get(error.status, error.status)
        kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "api_error")
        code = _CODES.get((error.code or "", error.param or ""), error.code)
        given = {"error_code": code, "param": None if error.param is None else cut(error.param)}
        details = {name: value for name, value in given.items() if value is not None}
        content = {"type": kind, "message": cut(error.message), **({"details": details} if details else {})}
        return orjson.dumps(traced({"type": "error", "error": content, "request_id": REQUEST_ID_OF.get() or None}))

    def response(self, error: LorafleetError, headers: Mapping[str, str] | None = None) -> Response:
        """Return an error's response."""
        all_headers = {**retry_headers(error), **(headers or {})}
        return Response(self.body(error), _STATUS.get(error.status, error.status), all_headers, "application/json")


ANTHROPIC_ERRORS = AnthropicErrors()

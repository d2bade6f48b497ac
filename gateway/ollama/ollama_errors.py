"""Errors in Ollama's format, `{"error": "…"}`: with an HTTP status before a stream, without one within it."""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from starlette.responses import Response

from gateway.http.errors import cut, retry_headers, traced
from protocol.wire.errors import LorafleetError


class OllamaErrors:
    """Ollama's error format."""

    def body(self, error: LorafleetError) -> bytes:
        """Return an error's body as JSON."""
        return orjson.dumps(traced({"error": cut(error.message)}))

    def response(self, error: LorafleetError, headers: Mapping[str, str] | None = None) -> Response:
        """Return an error's response."""
        all_headers = {**retry_headers(error), **(headers or {})}
        return Response(self.body(error), error.status, all_headers, "application/json")


OLLAMA_ERRORS = OllamaErrors()

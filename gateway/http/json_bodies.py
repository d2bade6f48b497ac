"""JSON in and out: bodies are read and answers written by orjson."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gateway.text.nesting import MAX_DEPTH, is_deeper


class JsonBody(BaseModel):
    """A JSON object of typed fields; fields that it does not know are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class _JsonRequest(Request):
    """Parses bodies with orjson, which refuses NaN, which is not JSON, and lone surrogates, which are not text."""

    async def json(self) -> Any:
        raw = await self.body()
        value = orjson.loads(raw)
        if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and is_deeper(value, MAX_DEPTH):
            raise HTTPException(400, f"the body is nested too deeply; the limit is {MAX_DEPTH} levels")
        return value


class JsonRoute(APIRoute):
    """A route whose bodies are parsed by `_JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_JsonRequest(request.scope, request.receive))

        return handle


def json_response(value: Any, status: int = 200) -> Response:
    """Return a value as a JSON answer."""
    return Response(orjson.dumps(value), status, media_type="application/json")

"""JSON in and out: bodies are read and answers written by orjson, each within the limits of `json_values`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from gateway.http import json_values
from gateway.overload.large import working
from protocol.wire.errors import BadRequest


class JsonBody(BaseModel):
    """A JSON object of typed fields; fields that it does not know are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class _JsonRequest(Request):
    """Parses bodies with `json_values.loads`."""

    async def json(self) -> Any:
        try:
            return json_values.loads(await self.body())
        except BadRequest as error:  # FastAPI lets pass nothing but this
            raise HTTPException(400, error.message) from error


class JsonRoute(APIRoute):
    """A route whose bodies are parsed by `_JsonRequest`: a large one in its turn, once all of it is there."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler."""
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def handle(request: Request) -> Response:
            request = _JsonRequest(request.scope, request.receive)
            try:
                await request.body()
            except ClientDisconnect:
                raise HTTPException(400, "the client left before its body was complete") from None
            async with working():
                return await handler(request)

        return handle


def json_response(value: Any, status: int = 200) -> Response:
    """Return a value as a JSON answer."""
    return Response(orjson.dumps(value), status, media_type="application/json")

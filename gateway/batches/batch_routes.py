"""OpenAI's routes for batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import FastAPI, Query, Request
from starlette.responses import Response

from gateway.auth.callers import caller_of
from gateway.batches.batch_bodies import BatchRequest
from gateway.batches.batches import BatchService, view
from gateway.bodies.json_bodies import JsonRoute, json_response
from gateway.http import openapi
from gateway.http.access import INFER, Routes
from gateway.http.paths import BATCHES


class BatchEndpoints:
    """The routes' handlers."""

    def __init__(self, batches: BatchService, wake: Callable[[], None]) -> None:
        """wake: called after a batch was created."""
        self._batches = batches
        self._wake = wake

    async def create(self, body: BatchRequest, request: Request) -> Response:
        """Answer `POST /v1/batches`."""
        made = await self._batches.create(body, caller_of(request))
        self._wake()
        return json_response(made)

    async def list(
        self, request: Request, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
    ) -> Response:
        """Answer `GET /v1/batches`."""
        return json_response(await self._batches.list(caller_of(request), limit, after))

    async def batch(self, batch_id: str, request: Request) -> Response:
        """Answer `GET /v1/batches/{id}`."""
        return json_response(view(await self._batches.get(batch_id, caller_of(request))))

    async def cancel(self, batch_id: str, request: Request) -> Response:
        """Answer `POST /v1/batches/{id}/cancel`."""
        return json_response(view(await self._batches.cancel(batch_id, caller_of(request))))


def add_batch_routes(app: FastAPI, batches: BatchEndpoints) -> None:
    """Bind paths to handlers."""
    routes = Routes(app, JsonRoute)
    routes.post(BATCHES, INFER, responses=openapi.BATCH)(batches.create)
    routes.get(BATCHES, INFER, responses=openapi.PAGE)(batches.list)
    routes.get(f"{BATCHES}/{{batch_id}}", INFER, responses=openapi.BATCH)(batches.batch)
    routes.post(f"{BATCHES}/{{batch_id}}/cancel", INFER, responses=openapi.BATCH)(batches.cancel)

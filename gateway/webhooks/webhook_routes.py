"""OpenAI's routes for webhook endpoints, and the routes of failed deliveries."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Query, Request
from starlette.responses import Response

from gateway.auth.callers import caller_of
from gateway.bodies.json_bodies import JsonRoute, json_response
from gateway.http import openapi
from gateway.http.access import INFER, Routes
from gateway.http.paths import WEBHOOKS
from gateway.webhooks.endpoints import WebhookService, view
from gateway.webhooks.sign import EVENTS
from gateway.webhooks.webhook_bodies import WebhookChange, WebhookRequest, WebhookRotation, WebhookTest

DELIVERIES = "/v1/webhook_deliveries"


class WebhookRoutes:
    """The routes' handlers."""

    def __init__(self, webhooks: WebhookService) -> None:
        self._webhooks = webhooks

    async def create(self, body: WebhookRequest, request: Request) -> Response:
        """Answer `POST /v1/webhook_endpoints`."""
        return json_response(await self._webhooks.create(body, caller_of(request)))

    async def list(
        self, request: Request, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
    ) -> Response:
        """Answer `GET /v1/webhook_endpoints`."""
        return json_response(await self._webhooks.list(caller_of(request), limit, after))

    async def event_types(self) -> Response:
        """Answer `GET /v1/webhook_event_types`."""
        return json_response({"object": "list", "data": list(EVENTS)})

    async def endpoint(self, endpoint_id: str, request: Request) -> Response:
        """Answer `GET /v1/webhook_endpoints/{id}`."""
        return json_response(view(await self._webhooks.get(endpoint_id, caller_of(request))))

    async def change(self, endpoint_id: str, body: WebhookChange, request: Request) -> Response:
        """Answer `POST /v1/webhook_endpoints/{id}`."""
        return json_response(await self._webhooks.change(endpoint_id, body, caller_of(request)))

    async def delete(self, endpoint_id: str, request: Request) -> Response:
        """Answer `DELETE /v1/webhook_endpoints/{id}`."""
        await self._webhooks.delete(endpoint_id, caller_of(request))
        return json_response({"id": endpoint_id, "object": "webhook_endpoint.deleted", "deleted": True})

    async def rotate(self, endpoint_id: str, body: WebhookRotation, request: Request) -> Response:
        """Answer `POST /v1/webhook_endpoints/{id}/rotate_secret`."""
        keep_old = bool(body.keep_old_secret_active_for_24_hours)
        return json_response(await self._webhooks.rotate(endpoint_id, caller_of(request), keep_old=keep_old))

    async def test(self, endpoint_id: str, body: WebhookTest, request: Request) -> Response:
        """Answer `POST /v1/webhook_endpoints/{id}/test`."""
        return json_response(await self._webhooks.test(endpoint_id, body.event_type, caller_of(request)))

    async def given_up(self, request: Request) -> Response:
        """Answer `GET /v1/webhook_deliveries`: the failed deliveries."""
        return json_response(await self._webhooks.given_up(caller_of(request)))

    async def retry(self, delivery_id: str, request: Request) -> Response:
        """Answer `POST /v1/webhook_deliveries/{id}/retry`."""
        return json_response(await self._webhooks.retry(delivery_id, caller_of(request)))


def add_webhook_routes(app: FastAPI, webhooks: WebhookRoutes) -> None:
    """Bind paths to handlers."""
    routes = Routes(app, JsonRoute)
    one = f"{WEBHOOKS}/{{endpoint_id}}"
    routes.post(WEBHOOKS, INFER, responses=openapi.WEBHOOK)(webhooks.create)
    routes.get(WEBHOOKS, INFER, responses=openapi.PAGE)(webhooks.list)
    routes.get(one, INFER, responses=openapi.WEBHOOK)(webhooks.endpoint)
    routes.post(one, INFER, responses=openapi.WEBHOOK)(webhooks.change)
    routes.delete(one, INFER, responses=openapi.DELETED)(webhooks.delete)
    routes.post(f"{one}/rotate_secret", INFER, responses=openapi.WEBHOOK)(webhooks.rotate)
    routes.post(f"{one}/test", INFER, responses=openapi.WEBHOOK_TEST)(webhooks.test)
    routes.get("/v1/webhook_event_types", INFER, responses=openapi.NAMES)(webhooks.event_types)
    routes.get(DELIVERIES, INFER, responses=openapi.PAGE)(webhooks.given_up)
    routes.post(f"{DELIVERIES}/{{delivery_id}}/retry", INFER, responses=openapi.DELIVERY)(webhooks.retry)

"""The routes for operators: workers, bases, dead letters, API keys and tenants. All need the scope admin."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Query, Request
from starlette.responses import Response

from gateway.auth.callers import caller_of
from gateway.bodies.json_bodies import json_response
from gateway.books.audit import AuditedRoute, about
from gateway.http import openapi
from gateway.http.access import ADMIN, Routes
from gateway.http.paths import BASES, DEAD_LETTERS, KEYS, TENANTS, WORKERS
from gateway.operators.bases import BaseAdministration, BaseRequest
from gateway.operators.keys import KeyAdministration, KeyRequest, TenantChange
from gateway.operators.workers import WorkerViews
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire.letters import view

MAX_WAIT_S = 60.0
Wait = Annotated[float, Query(ge=0, le=MAX_WAIT_S)]
Limit = Annotated[int, Query(ge=1, le=1000)]
After = Annotated[str, Query(max_length=200)]


class FleetEndpoints:
    """The routes' handlers."""

    def __init__(self, bus: Bus, settings: Settings, bases: BaseAdministration) -> None:
        self._letters = bus.dead_letters
        self._retry_s = settings.request_timeout_s
        self._workers = WorkerViews(bus)
        self._bases = bases
        self._keys = KeyAdministration(bus.api_keys if settings.api_keys else None, writes=settings.console_keys)

    # ------------------------------------------------------------ workers

    async def workers(self, after: After = "", limit: Limit = 100) -> Response:
        """Answer with a page of workers."""
        return json_response(await self._workers.list(after, limit))

    async def drain(self, name: str, request: Request, wait_s: Wait = 5.0) -> Response:
        """Answer 200 once a worker has stopped taking requests, 202 if it has not confirmed that within `wait_s`."""
        worker, done = await self._workers.order(name, caller_of(request), drain=True, wait_s=wait_s)
        return json_response(worker, 200 if done else 202)

    async def resume(self, name: str, request: Request, wait_s: Wait = 5.0) -> Response:
        """Answer 200 once a worker takes requests again, 202 if it has not confirmed that within `wait_s`."""
        worker, done = await self._workers.order(name, caller_of(request), drain=False, wait_s=wait_s)
        return json_response(worker, 200 if done else 202)

    # ------------------------------------------------------------ bases

    async def bases(self) -> Response:
        """Answer with all bases."""
        return json_response(await self._bases.list())

    async def add_base(self, body: BaseRequest, request: Request) -> Response:
        """Answer 201 with a new base, 200 if it existed. Gateways and stores adopt it within seconds."""
        caller_of(request).require("admin")
        about(request, body.name or body.model, f"model={body.model}")
        base, is_new = await self._bases.add(body)
        about(request, base["id"], f"model={body.model}")
        return json_response(base, 201 if is_new else 200)

    async def remove_base(self, name: str, request: Request) -> Response:
        """Remove a base: its calls are refused, its waiting requests end, and its workers drain."""
        caller_of(request).require("admin")
        return json_response(await self._bases.remove(name))

    # ------------------------------------------------------------ dead letters

    async def letters(self, after: After = "", limit: Annotated[int, Query(ge=1, le=100)] = 50) -> Response:
        """Answer with a page of dead letters, newest first."""
        found = await self._letters.newest(limit + 1, after)
        page = [view(letter_id, letter) for letter_id, letter in found[:limit]]
        last = page[-1]["id"] if page else None
        return json_response({"object": "list", "data": page, "has_more": len(found) > limit, "last_id": last})

    async def letter(self, letter_id: str) -> Response:
        """Answer with one dead letter."""
        return json_response(view(letter_id, await self._letters.get(letter_id)))

    async def retry(self, letter_id: str, request: Request) -> Response:
        """Queue a dead letter's request again; answer with the request's id."""
        caller_of(request).require("admin")
        rid = await self._letters.retry(letter_id, self._retry_s)
        return json_response({"id": letter_id, "object": "dead_letter.retried", "request": rid})

    # ------------------------------------------------------------ keys and tenants

    async def keys(self, after: After = "", limit: Limit = 100, tenant: str | None = None) -> Response:
        """Answer with a page of API keys, without their secrets."""
        return json_response(await self._keys.list(after, limit, tenant))

    async def create_key(self, body: KeyRequest, request: Request) -> Response:
        """Answer 201 with a new key and its secret, which is shown only once."""
        asked = f"scopes={','.join(body.scopes)} expires_in_s={body.expires_in_s}"
        about(request, body.tenant, asked)
        made = await self._keys.create(body, caller_of(request))
        about(request, body.tenant, f"{made['id']} {asked}")
        return json_response(made, 201)

    async def revoke_key(self, key_id: str, request: Request) -> Response:
        """Revoke a key: every gateway refuses its next request."""
        return json_response(await self._keys.revoke(key_id, caller_of(request)))

    async def tenants(self, after: After = "", limit: Limit = 100) -> Response:
        """Answer with a page of tenants and their limits."""
        return json_response(await self._keys.tenants(after, limit))

    async def change_tenant(self, name: str, body: TenantChange, request: Request) -> Response:
        """Set limits of a tenant; omitted ones are unchanged."""
        about(request, name, " ".join(f"{key}={value}" for key, value in body.model_dump(exclude_none=True).items()))
        return json_response(await self._keys.change(name, body, caller_of(request)))


def add_fleet_routes(app: FastAPI, fleet: FleetEndpoints) -> None:
    """Bind paths to handlers."""
    routes = Routes(app, AuditedRoute)
    routes.get(WORKERS, ADMIN, responses=openapi.PAGE)(fleet.workers)
    routes.post(f"{WORKERS}/{{name}}/drain", ADMIN, responses=openapi.WORKER)(fleet.drain)
    routes.post(f"{WORKERS}/{{name}}/resume", ADMIN, responses=openapi.WORKER)(fleet.resume)
    routes.get(BASES, ADMIN, responses=openapi.PAGE)(fleet.bases)
    routes.post(BASES, ADMIN, responses=openapi.BASE, status_code=201)(fleet.add_base)
    routes.delete(f"{BASES}/{{name:path}}", ADMIN, responses=openapi.DELETED)(fleet.remove_base)
    routes.get(DEAD_LETTERS, ADMIN, responses=openapi.PAGE)(fleet.letters)
    routes.get(f"{DEAD_LETTERS}/{{letter_id}}", ADMIN, responses=openapi.LETTER)(fleet.letter)
    routes.post(f"{DEAD_LETTERS}/{{letter_id}}/retry", ADMIN, responses=openapi.RETRIED)(fleet.retry)
    routes.get(KEYS, ADMIN, responses=openapi.PAGE)(fleet.keys)
    routes.post(KEYS, ADMIN, responses=openapi.NEW_KEY, status_code=201)(fleet.create_key)
    routes.delete(f"{KEYS}/{{key_id}}", ADMIN, responses=openapi.DELETED)(fleet.revoke_key)
    routes.get(TENANTS, ADMIN, responses=openapi.PAGE)(fleet.tenants)
    routes.post(f"{TENANTS}/{{name}}", ADMIN, responses=openapi.TENANT)(fleet.change_tenant)

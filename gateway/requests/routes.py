"""The routes of single requests: what became of one, and whether it comes out the same again."""

from __future__ import annotations

import re

from fastapi import FastAPI, Request
from starlette.responses import Response

from gateway.auth.callers import Caller, caller_of
from gateway.bodies.json_bodies import JsonRoute, json_response
from gateway.calls import observe
from gateway.calls.pipeline import Pipeline
from gateway.http import openapi
from gateway.http.routes import Endpoints
from gateway.requests.replay import replay
from gateway.requests.timeline import described
from protocol.wire.errors import NotFound
from protocol.wire.records import RequestRecord

REQUESTS = "/v1/requests"

MAX_CHARACTERS = 200

_ID = re.compile(r"(?:(?:chatcmpl|cmpl)-|msg_|resp_)?(.+)")
_CHOICE = re.compile(r"-\d+$")


class RequestEndpoints:
    """The routes' handlers."""

    def __init__(self, endpoints: Endpoints, pipeline: Pipeline) -> None:
        self._endpoints = endpoints
        self._pipeline = pipeline

    async def explain(self, request_id: str, request: Request) -> Response:
        """Answer `GET /v1/requests/{id}`: of a call with several choices the first, or the one named: `ID-2`."""
        rid, record = await self._find(request_id, caller_of(request))
        return json_response(described(rid, record, observe.name_of_digest))

    async def replay(self, request_id: str, request: Request) -> Response:
        """Answer `POST /v1/requests/{id}/replay`."""
        return await self._endpoints.respond(self._replay(request_id, caller_of(request)))

    async def _replay(self, request_id: str, caller: Caller) -> Response:
        rid, _ = await self._find(request_id, caller)
        return json_response(await replay(self._pipeline, rid, caller))

    async def _find(self, request_id: str, caller: Caller) -> tuple[str, RequestRecord]:
        """Return a request's id and record. Raises NotFound, also for another tenant's."""
        found = _ID.fullmatch(request_id[:MAX_CHARACTERS])
        rid = found[1] if found else request_id[:MAX_CHARACTERS]
        for name in (rid,) if _CHOICE.search(rid) else (f"{rid}-0",):
            record = await self._pipeline.bus.record(name)
            if record is not None and (caller.is_admin or record.tenant == caller.name):
                return name, record
        text = f"there is no request {request_id:.100}: records live until 2 minutes after the end, those of jobs a day"
        raise NotFound(text, code="request_not_found")


def add_request_routes(app: FastAPI, requests: RequestEndpoints) -> None:
    """Bind paths to handlers."""
    app.router.route_class = JsonRoute
    app.get(f"{REQUESTS}/{{request_id}}", responses=openapi.EXPLAINED)(requests.explain)
    app.post(f"{REQUESTS}/{{request_id}}/replay", responses=openapi.REPLAYED)(requests.replay)

"""The routes of single requests: what became of one, and whether it comes out the same again."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import FastAPI, Query, Request
from starlette.responses import Response

from gateway.answers.respond import Answers
from gateway.auth.callers import Caller, caller_of
from gateway.bodies.json_bodies import json_response
from gateway.books.audit import AuditedRoute
from gateway.calls.pipeline import Pipeline
from gateway.http import openapi
from gateway.http.access import INFER, Routes
from gateway.http.paths import REQUESTS
from gateway.requests.listing import RequestList, State
from gateway.requests.replay import replay
from gateway.requests.timeline import described
from protocol.wire.errors import NotFound
from protocol.wire.records import RequestRecord

MAX_CHARACTERS = 200

_AT_ONCE = 16

_ID = re.compile(r"(?:(?:chatcmpl|cmpl)-|msg_|resp_)?(.+)")
_CHOICE = re.compile(r"-\d+$")


class RequestEndpoints:
    """The routes' handlers."""

    def __init__(self, answers: Answers, pipeline: Pipeline) -> None:
        self._answers = answers
        self._pipeline = pipeline
        self._list = RequestList(pipeline.bus)

    async def list(
        self,
        request: Request,
        state: State | None = None,
        tenant: Annotated[str, Query(max_length=64)] | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 50,
        after: Annotated[str, Query(max_length=200)] = "",
    ) -> Response:
        """Answer `GET /v1/requests`: those that run, that wait, and that have ended lately."""
        return json_response(await self._list.page(caller_of(request), state, tenant, limit, after))

    async def explain(self, request_id: str, request: Request) -> Response:
        """Answer `GET /v1/requests/{id}`: of a call with several choices the first, or the one named: `ID-2`."""
        rid, record = await self._find(request_id, caller_of(request))
        return json_response(described(rid, record))

    async def replay(self, request_id: str, request: Request) -> Response:
        """Answer `POST /v1/requests/{id}/replay`."""
        return await self._answers.respond(self._replay(request_id, caller_of(request)))

    async def cancel(self, request_id: str, request: Request) -> Response:
        """Answer `POST /v1/requests/{id}/cancel`: of a call all its choices, or the one named."""
        rid, _ = await self._find(request_id, caller_of(request))
        bus, rids = self._pipeline.bus, [rid]
        if rid not in request_id:  # a call was named, and this is its first choice
            name = rid.removesuffix("-0")
            more = [f"{name}-{number}" for number in range(1, self._pipeline.settings.max_choices)]
            for begin in range(0, len(more), _AT_ONCE):
                some = more[begin : begin + _AT_ONCE]
                known = [one for one, facts in zip(some, await bus.requests(some), strict=True) if facts is not None]
                rids += known
                if len(known) < len(some):
                    break
        states = {one: await bus.cancel(one) for one in rids}
        found = [{"id": one, "state": state or None} for one, state in states.items()]
        return json_response({"id": request_id, "object": "request.cancelled", "requests": found})

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
        text = f"there is no request {request_id:.100}: records live for 2 minutes after the end, those of jobs a day"
        raise NotFound(text, code="request_not_found")


def add_request_routes(app: FastAPI, requests: RequestEndpoints) -> None:
    """Bind paths to handlers."""
    routes = Routes(app, AuditedRoute)
    routes.get(REQUESTS, INFER, responses=openapi.PAGE)(requests.list)
    routes.post(f"{REQUESTS}/{{request_id}}/cancel", INFER, responses=openapi.CANCELLED)(requests.cancel)
    routes.get(f"{REQUESTS}/{{request_id}}", INFER, responses=openapi.EXPLAINED)(requests.explain)
    routes.post(f"{REQUESTS}/{{request_id}}/replay", INFER, responses=openapi.REPLAYED)(requests.replay)

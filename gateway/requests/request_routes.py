"""The routes of single requests: list, timeline, cancellation and replay."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

from fastapi import FastAPI, Query, Request
from starlette.responses import Response

from gateway.adapters.views import converted_object
from gateway.answers.respond import Answers
from gateway.auth.callers import Caller, caller_of
from gateway.bodies.json_bodies import json_response
from gateway.books.audit import AuditedRoute
from gateway.calls.pipeline import Pipeline
from gateway.http import openapi
from gateway.http.access import INFER, Routes
from gateway.http.paths import REQUESTS
from gateway.requests.listing import Filters, RequestList, State, Status
from gateway.requests.refusals import Refusals
from gateway.requests.replay import replay
from gateway.requests.texts import KeptTexts
from gateway.requests.timeline import described, recalled
from protocol.wire import messages as m
from protocol.wire.errors import NotFound
from protocol.wire.records import RequestRecord

if TYPE_CHECKING:  # its packages are optional
    from gateway.requests.database import Database

MAX_CHARACTERS = 200
MAX_MS = 1 << 45
"""Maximum unix ms accepted by a list's time filters: in the year 3084."""

_AT_ONCE = 16

_ID = re.compile(r"(?:(?:chatcmpl|cmpl|rerank)-|msg_|resp_|job_)?(.+)")
_CHOICE = re.compile(r"-\d+$")


class RequestEndpoints:
    """The routes' handlers."""

    def __init__(self, answers: Answers, pipeline: Pipeline, database: Database | None) -> None:
        """database: holds the history; None: the queue does."""
        self._answers = answers
        self._pipeline = pipeline
        self._list = RequestList(pipeline.bus, database)
        self._texts = KeptTexts(pipeline, database)
        self.refusals = Refusals(pipeline.bus, pipeline.settings.history_s)

    async def list(
        self,
        request: Request,
        state: State | None = None,
        status: Status | None = None,
        tenant: Annotated[str, Query(max_length=64)] | None = None,
        model: Annotated[str, Query(max_length=200)] = "",
        q: Annotated[str, Query(max_length=100)] = "",
        since: Annotated[int, Query(ge=0, le=MAX_MS)] = 0,
        until: Annotated[int, Query(ge=0, le=MAX_MS)] = 0,
        limit: Annotated[int, Query(ge=1, le=100)] = 50,
        after: Annotated[str, Query(max_length=200)] = "",
    ) -> Response:
        """Answer `GET /v1/requests`: running, queued and ended requests."""
        filters = Filters(state, status, tenant, model, q, since, until)
        return json_response(await self._list.page(caller_of(request), filters, limit, after))

    async def explain(self, request_id: str, request: Request) -> Response:
        """Answer `GET /v1/requests/{id}`. The id of a call means its first choice; `ID-2` names another one."""
        caller = caller_of(request)
        try:
            rid, record = await self._find(request_id, caller)
        except NotFound:
            past = await self._list.find(caller, {request_id, _name_of(request_id)})
            if past is None:
                raise
            return json_response(recalled(past) | {"text": await self._texts.shown(past)})
        bus = self._pipeline.bus
        adapter = await bus.get(bus.keys.adapter(record.digest), m.AdapterRecord) if record.digest else None
        found = described(rid, record, converted_object(adapter, num_layers=1))
        return json_response(found | {"text": await self._texts.shown(found)})

    async def replay(self, request_id: str, request: Request) -> Response:
        """Answer `POST /v1/requests/{id}/replay`."""
        return await self._answers.respond(self._replay(request_id, caller_of(request)))

    async def cancel(self, request_id: str, request: Request) -> Response:
        """Answer `POST /v1/requests/{id}/cancel`. The id of a call means all its choices; `ID-2` names one."""
        rid, _ = await self._find(request_id, caller_of(request))
        bus, rids = self._pipeline.bus, [rid]
        if rid not in request_id:  # the id is a call's, and rid its first choice
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
        """Return a request's id and record. Raises NotFound, also for another tenant's request."""
        name = _name_of(request_id)
        record = await self._pipeline.bus.record(name)
        if record is not None and (caller.is_admin or record.tenant == caller.name):
            return name, record
        kept_h = self._pipeline.settings.history_s / 3600
        text = (
            f"there is no request {request_id:.100}; timelines are kept for 2 minutes after the end (jobs: a day), and"
            f" the history for {kept_h:g} h"
        )
        raise NotFound(text, code="request_not_found")


def _name_of(request_id: str) -> str:
    """Return the queue's id of a request; for the id of a call, as its answer shows it, that of the first choice."""
    found = _ID.fullmatch(request_id[:MAX_CHARACTERS])
    rid = found[1] if found else request_id[:MAX_CHARACTERS]
    return rid if _CHOICE.search(rid) else f"{rid}-0"


def add_request_routes(app: FastAPI, requests: RequestEndpoints) -> None:
    """Bind paths to handlers."""
    routes = Routes(app, AuditedRoute)
    routes.get(REQUESTS, INFER, responses=openapi.PAGE)(requests.list)
    routes.post(f"{REQUESTS}/{{request_id}}/cancel", INFER, responses=openapi.CANCELLED)(requests.cancel)
    routes.get(f"{REQUESTS}/{{request_id}}", INFER, responses=openapi.EXPLAINED)(requests.explain)
    routes.post(f"{REQUESTS}/{{request_id}}/replay", INFER, responses=openapi.REPLAYED)(requests.replay)

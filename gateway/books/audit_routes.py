"""`GET /v1/audit`: the audit log, for operators."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from fastapi import FastAPI, Query
from starlette.responses import Response

from gateway.bodies.json_bodies import JsonRoute, json_response
from gateway.http import openapi
from gateway.http.access import ADMIN, Routes
from gateway.http.list_page import list_page
from gateway.http.paths import AUDIT
from protocol.queue.books.audit import AuditEntry, AuditLog


class AuditEndpoints:
    """The route's handler."""

    def __init__(self, log: AuditLog) -> None:
        self.log = log

    async def list(
        self,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[str, Query(max_length=64)] = "",
        by: Literal["operators", "tenants"] = "operators",
    ) -> Response:
        """Answer with a page of entries, newest first; `after` is the last id of the previous page."""
        found = await self.log.newest(limit + 1, after, of_tenants=by == "tenants")
        page = [_view(entry_id, entry) for entry_id, entry in found[:limit]]
        return json_response(list_page(page, has_more=len(found) > limit))


def _view(entry_id: str, entry: AuditEntry) -> dict[str, Any]:
    fields = msgspec.structs.asdict(entry)
    del fields["by_operator"]
    return {"id": entry_id, "object": "audit_entry", **fields}


def add_audit_routes(app: FastAPI, endpoints: AuditEndpoints) -> None:
    """Bind paths to handlers."""
    routes = Routes(app, JsonRoute)
    routes.get(AUDIT, ADMIN, responses=openapi.PAGE)(endpoints.list)

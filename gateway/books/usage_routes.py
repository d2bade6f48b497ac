"""`GET /v1/usage`, also under OpenAI's path: a tenant sees its own usage, operators see all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from gateway.auth.callers import Caller, caller_of
from gateway.bodies.json_bodies import JsonRoute, json_response
from gateway.books.usage import GROUPS, NOT_COUNTED, Day, Query, check_number, csv_text, day_of_page, page
from gateway.http import openapi
from gateway.http.access import INFER, Routes
from gateway.overload import reads
from protocol.queue.books.usage import DAY_S, UsageBook
from protocol.wire.brief import brief
from protocol.wire.clock import now_ms
from protocol.wire.errors import BadRequest, PermissionDenied

PATHS = ("/v1/usage", "/v1/organization/usage/completions")
CSV = "text/csv"

MAX_DAYS = 31
"""Maximum days in an answer, as in OpenAI's API."""

_LISTS = ("group_by", "models", "project_ids")
_SINGLE = ("start_time", "end_time", "bucket_width", "batch", "limit", "page", "format")
_NOT_SERVED = {f"{name}s": name for name in NOT_COUNTED[:2]}
_LAST_S = 100_000 * DAY_S  # far in the future


class UsageEndpoints:
    """The route's handler."""

    def __init__(self, usage: UsageBook) -> None:
        self._usage = usage

    async def usage(self, request: Request) -> Response:
        """Return usage by day, as JSON or CSV."""
        query, caller = query_of(request), caller_of(request)
        days: list[Day] = []
        num = 0
        for number in query.days:
            day = Day(number)
            for tenant in await self._tenants(number, query, caller):
                rows = await self._usage.rows(number, tenant)
                reads.owe(len(rows) / reads.ROWS_PER_READ)
                day.add(rows, query)
                check_number(num + len(day.sums))
            num += len(day.sums)
            if caller.is_admin and query.shows_residency:
                day.seconds = await self._usage.residency(number)
            days.append(day)
        answer = page(days, query)
        if _wants_csv(request):
            return Response(csv_text(answer), media_type=f"{CSV}; charset=utf-8")
        return json_response(answer)

    async def _tenants(self, day: int, query: Query, caller: Caller) -> Sequence[str]:
        """Return the tenants whose usage is requested. Raises PermissionDenied for another tenant's."""
        if caller.is_admin:
            return sorted(query.projects) or await self._usage.tenants(day)
        if query.projects - {caller.owner}:
            raise PermissionDenied(
                "only keys with the scope admin may see the usage of other tenants", param="project_ids"
            )
        return [caller.owner]


def query_of(request: Request) -> Query:
    """Parse a request's query. Raises BadRequest naming a parameter that is invalid or not supported."""
    given = request.query_params
    for name in given:
        plain = name.removesuffix("[]")
        if plain in _NOT_SERVED:
            raise BadRequest(f"usage is not counted by {_NOT_SERVED[plain]}", param=plain)
        if plain not in _LISTS and name not in _SINGLE:
            raise BadRequest(f"{brief(name)} is not a parameter of this route", param=name[:100])
    lists = {name: [*given.getlist(name), *given.getlist(f"{name}[]")] for name in _LISTS}
    for value in lists["group_by"]:
        if value not in GROUPS:
            what = "is not counted here" if value in NOT_COUNTED else "is not known"
            raise BadRequest(f"group_by: {brief(value)} {what}; it may be {', '.join(GROUPS)}", param="group_by")
    if (width := given.get("bucket_width", "1d")) != "1d":
        raise BadRequest(
            f"bucket_width: {brief(width)} is not served; usage is counted by day: 1d", param="bucket_width"
        )
    if (form := given.get("format", "json")) not in ("json", "csv"):
        raise BadRequest(f"format: {brief(form)} is neither json nor csv", param="format")
    if (batch := given.get("batch")) not in (None, "true", "false"):
        raise BadRequest(f"batch: {brief(batch)} is neither true nor false", param="batch")
    if "start_time" not in given:
        raise BadRequest("start_time is missing: unix time in seconds", param="start_time")
    start_s = _number(request, "start_time", 0, 0, _LAST_S)
    now_s = now_ms() // 1000
    end_s = min(_number(request, "end_time", now_s + 1, 0, _LAST_S), now_s + 1)
    first_day = start_s // DAY_S
    if "page" in given:
        first_day = max(first_day, day_of_page(given["page"]))
    return Query(
        first_day,
        -(-end_s // DAY_S),
        _number(request, "limit", 7, 1, MAX_DAYS),
        tuple(dict.fromkeys(lists["group_by"])),
        frozenset(lists["models"]),
        frozenset(lists["project_ids"]),
        None if batch is None else batch == "true",
    )


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 16 and least <= int(text) <= most):
        raise BadRequest(f"{name}: {brief(text)} is not a number from {least} to {most}", param=name)
    return int(text)


def _wants_csv(request: Request) -> bool:
    form = request.query_params.get("format")
    return form == "csv" or (form is None and request.headers.get("accept", "").startswith(CSV))


def add_usage_routes(app: FastAPI, endpoints: UsageEndpoints) -> None:
    """Bind paths to handlers."""
    routes = Routes(app, JsonRoute)
    for path in PATHS:
        routes.get(path, INFER, responses=openapi.USAGE, openapi_extra={"parameters": _parameters()})(endpoints.usage)


def _parameters() -> list[dict[str, Any]]:
    """Return the query parameters for `/openapi.json`; `query_of` also accepts names with OpenAI's suffix `[]`."""
    time_s = {"type": "integer", "minimum": 0, "maximum": _LAST_S}
    texts = {"type": "array", "items": {"type": "string"}}
    schemas: dict[str, dict[str, Any]] = {
        "start_time": time_s, "end_time": time_s, "bucket_width": {"enum": ["1d"]}, "batch": {"type": "boolean"},
        "limit": {"type": "integer", "minimum": 1, "maximum": MAX_DAYS},
        "page": {"type": "string", "pattern": "^page_[0-9]{1,7}$"}, "format": {"enum": ["json", "csv"]},
        "group_by": {"type": "array", "items": {"enum": list(GROUPS)}}, "models": texts, "project_ids": texts,
    }  # fmt: skip
    return [
        {"name": name, "in": "query", "required": name == "start_time", "schema": schema}
        for name, schema in schemas.items()
    ]

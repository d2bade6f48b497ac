"""`GET /v1/timeseries`: what charts show of the last minutes to days. A tenant sees its own calls, operators all."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import FastAPI, Query, Request
from starlette.responses import Response

from gateway.auth.callers import caller_of
from gateway.bodies.json_bodies import JsonRoute, json_response
from gateway.fleet.sampler import Sampler
from gateway.fleet.timeseries import RANGES_S, TimeSeries
from gateway.http import openapi
from gateway.http.access import INFER, Routes
from gateway.http.paths import TIMESERIES
from gateway.overload import reads

READ_COST = 100
"""What an answer costs beside its bytes, in reads: it takes some 40 ms of the event loop, in turns of less than one."""


class TimeSeriesEndpoints:
    """The route's handler."""

    def __init__(self, series: TimeSeries, sampler: Sampler) -> None:
        self._series = series
        self._sampler = sampler

    async def read(
        self,
        request: Request,
        span: Annotated[Literal["15m", "1h", "6h", "24h", "7d"], Query(alias="range")] = "1h",
        group_by: Literal["tenant", "model"] | None = None,
    ) -> Response:
        """Answer with counts, times to first token and, for operators, the fleet's numbers, each over time."""
        caller = caller_of(request)
        reads.spend(READ_COST)
        found = await self._series.read(RANGES_S[span], None if caller.is_admin else caller.owner, group_by)
        return json_response({**found, "range": span, "gateways": self._sampler.num_gateways})


def add_timeseries_routes(app: FastAPI, endpoints: TimeSeriesEndpoints) -> None:
    """Bind the path to its handler."""
    Routes(app, JsonRoute).get(TIMESERIES, INFER, responses=openapi.TIMESERIES)(endpoints.read)

"""`GET /v1/timeseries`: charts of the last minutes to months. A tenant sees its own calls, operators see all."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import FastAPI, Query, Request
from starlette.responses import Response

from gateway.auth.callers import caller_of
from gateway.bodies.json_bodies import JsonRoute, json_response
from gateway.books.prometheus import RANGES_S as PROMETHEUS_S
from gateway.books.prometheus import PrometheusCharts
from gateway.fleet.sampler import Sampler
from gateway.fleet.timeseries import RANGES_S, TimeSeries
from gateway.http import openapi
from gateway.http.access import INFER, Routes
from gateway.http.paths import TIMESERIES
from gateway.overload import reads
from protocol.wire.errors import BadRequest

LONGEST = "7d"
"""The longest range of the gateway's own numbers."""

READ_COST = 100
"""Cost of an answer besides its bytes, in reads: it takes some 40 ms of the event loop, in slices of less than one."""


class TimeSeriesEndpoints:
    """The route's handler."""

    def __init__(self, series: TimeSeries, sampler: Sampler, prometheus: PrometheusCharts | None = None) -> None:
        self._series = series
        self._sampler = sampler
        self._prometheus = prometheus

    async def read(
        self,
        request: Request,
        span: Annotated[Literal["15m", "1h", "6h", "24h", "7d", "30d", "90d"], Query(alias="range")] = "1h",
        group_by: Literal["tenant", "model"] | None = None,
    ) -> Response:
        """Answer with counts, times to first token and, for operators, the fleet's numbers over time.

        Operators get longer ranges from Prometheus. If it fails, they get the gateway's own numbers and a note.
        """
        caller = caller_of(request)
        reads.spend(READ_COST)
        prometheus = self._prometheus if caller.is_admin else None
        ranges = list(dict.fromkeys([*RANGES_S, *(PROMETHEUS_S if prometheus is not None else ())]))
        if span not in ranges:
            raise BadRequest(
                f"range {span} needs a Prometheus (--prometheus-url) and, with API keys, one with the scope admin; the"
                f" gateway itself has {', '.join(RANGES_S)}"
            )
        about = {"gateways": self._sampler.num_gateways, "ranges": ranges, "source": "gateway", "note": None}
        if prometheus is not None and span in PROMETHEUS_S:
            found = await prometheus.read(span, group_by)
            if isinstance(found, dict):
                return json_response({**found, **about, "range": span, "source": "prometheus"})
            span = span if span in RANGES_S else LONGEST
            about["note"] = f"Prometheus: {found}. These are the last {span} of this gateway's own numbers."
        found = await self._series.read(RANGES_S[span], None if caller.is_admin else caller.owner, group_by)
        return json_response({**found, **about, "range": span})


def add_timeseries_routes(app: FastAPI, endpoints: TimeSeriesEndpoints) -> None:
    """Bind the path to its handler."""
    Routes(app, JsonRoute).get(TIMESERIES, INFER, responses=openapi.TIMESERIES)(endpoints.read)

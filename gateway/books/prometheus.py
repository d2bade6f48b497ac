"""The console's charts for ranges of hours to months, from a Prometheus server that scrapes the fleet.

Its numbers survive restarts of gateways, and cover all gateways. Whatever it replies, a caller gets numbers, or a line
that says why there are none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import orjson

from gateway.fleet.timeseries import FIELDS, MAX_GROUPS, MAX_NAME
from gateway.http.http_client import HttpClient
from protocol.metrics import charts
from protocol.metrics.charts import Group
from protocol.metrics.names import OTHER
from protocol.wire.clock import now_s as fleet_now_s

logger = logging.getLogger(__name__)

RANGES_S: Mapping[str, tuple[int, int]] = {
    "6h": (21_600, 300),
    "24h": (86_400, 300),
    "7d": (604_800, 1800),
    "30d": (2_592_000, 7200),
    "90d": (7_776_000, 21_600),
}
"""Ranges read from Prometheus -> their length and the length of a period, in seconds. None has more than 360
periods."""

TIMEOUT_S = 15.0
"""Maximum seconds for a range in total."""

MAX_BYTES, MAX_ROWS = 2 << 20, 100
"""Maximum bytes of a reply, and maximum results read from it; all charts of 360 periods are 70 results in some 800
kB."""

MAX_LABEL = 500
"""Maximum characters of a name used in a query; longer names count among the others."""

RETRY_S = 30.0
"""Seconds without a new query for a range that failed."""

_TTFT = ("ttft_p50_ms", "ttft_p95_ms")

Column = list[float | None]


class UnreadReply(Exception):
    """A reply that is not used; the message says why, for the caller."""


@dataclass(slots=True)
class _Asked:
    task: asyncio.Task[dict[str, Any] | str]
    from_s: float
    until_s: float  # valid in [from_s, until_s) of the fleet's clock, which may be set back


class PrometheusCharts:
    """Queries Prometheus for each range once per period, for all callers."""

    def __init__(
        self,
        url: str,
        matchers: str,
        client: HttpClient,
        timeout_s: float = TIMEOUT_S,
        now_s: Callable[[], float] = fleet_now_s,
    ) -> None:
        """url: of the server, without the API's path. matchers: select the fleet's series, "" for all series."""
        self._url = url.rstrip("/") + "/api/v1/"
        self._matchers = matchers
        self._client = client
        self._timeout_s = timeout_s
        self._now_s = now_s
        self._asked: dict[tuple[str, Group | None], _Asked] = {}
        self._reading = asyncio.Lock()  # one at a time: parsing takes several times a reply's size

    async def read(self, span: str, group: Group | None) -> dict[str, Any] | str:
        """Return a range as `TimeSeries.read` does, or a line that says why there is none. span: key of `RANGES_S`."""
        now_s, step_s = self._now_s(), RANGES_S[span][1]
        asked = self._asked.get((span, group))
        if asked is None or not asked.from_s <= now_s < asked.until_s:
            newest_s = int(now_s) // step_s * step_s
            task = asyncio.create_task(self._asking(span, group, newest_s))
            asked = self._asked[span, group] = _Asked(task, newest_s, newest_s + step_s)
        return await asyncio.shield(asked.task)

    async def _asking(self, span: str, group: Group | None, newest_s: int) -> dict[str, Any] | str:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._ask(span, group, newest_s)
        except TimeoutError:
            problem = f"it takes longer than {self._timeout_s:g} s"
        except UnreadReply as error:
            problem = str(error)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ExceptionGroup) as error:  # the last: invalid port
            problem = f"it can't be reached ({type(error).__name__})"
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError):
            problem = "its reply is not that of a Prometheus"
        logger.warning("no charts of %s from Prometheus: %s", span, problem)
        self._asked[span, group].until_s = self._now_s() + RETRY_S
        return problem

    async def _ask(self, span: str, group: Group | None, newest_s: int) -> dict[str, Any]:
        """Return a range whose last period begins at `newest_s`. Raises as `_post`; ValueError and similar errors."""
        range_s, step_s = RANGES_S[span]
        elapsed_s = min(step_s, max(1, int(self._now_s()) - newest_s))
        names: list[str] = []
        if group is not None:
            raw = await self._post("query", query=charts.busiest(group, MAX_GROUPS, range_s, self._matchers))
            async with self._reading:
                names = await asyncio.to_thread(_names, raw, charts.GROUPS[group][0])
        # A value covers the time before it, so a period's value is requested at its end.
        times = range(newest_s - range_s + 2 * step_s, newest_s + step_s + 1, step_s)
        query = charts.chart(group, names, step_s, self._matchers)
        raw = await self._post("query_range", query=query, start=times[0], end=times[-1], step=step_s)
        async with self._reading:
            made = await asyncio.to_thread(_charts, raw, group, names, times)
        about = {"start_time": times[0] - step_s, "step_s": step_s, "num": len(times), "elapsed_s": elapsed_s}
        return {"object": "timeseries", **about, **made}

    async def _post(self, path: str, **form: str | int) -> bytes:
        """Return a reply's body. Raises UnreadReply for an error or a long reply, and the client's errors."""
        client = await self._client.get()
        data = {name: str(value) for name, value in form.items()} | {"timeout": f"{self._timeout_s:g}s"}
        whole = {"accept-encoding": "identity"}  # a few compressed bytes may expand without limit
        raw = bytearray()
        async with client.stream("POST", self._url + path, data=data, headers=whole, timeout=self._timeout_s) as reply:
            if reply.status_code != 200:
                raise UnreadReply(f"it answers with status {reply.status_code}")
            async for part in reply.aiter_raw():
                raw += part
                if len(raw) > MAX_BYTES:
                    raise UnreadReply(f"its reply is longer than {MAX_BYTES} bytes")
        return bytes(raw)


def _names(raw: bytes, label: str) -> list[str]:
    """Return the names in the reply to `charts.busiest`, busiest first."""
    rows = sorted(orjson.loads(raw)["data"]["result"][:MAX_ROWS], key=lambda row: -float(row["value"][1]))
    return [name for row in rows[:MAX_GROUPS] if len(name := row["metric"][label]) <= MAX_LABEL]


def _charts(raw: bytes, group: Group | None, names: Sequence[str], times: range) -> dict[str, Any]:
    """Return the fleet's numbers and the groups in the reply to `charts.chart`, with one value per time."""
    label, known = charts.GROUPS[group] if group is not None else ("", {})
    nothing: Column = [None] * len(times)
    table: dict[tuple[str, str | None], Column] = {}
    for row in orjson.loads(raw)["data"]["result"][:MAX_ROWS]:
        found = {at_s: float(text) for at_s, text in row["values"]}
        values = (found.get(at_s, -1.0) for at_s in times)
        # Excludes NaN, infinity, and integers that JSON cannot represent.
        column: Column = [value if 0 <= value < 1 << 53 else None for value in values]
        table[row["metric"][charts.FIELD], row["metric"].get(label)] = column
    fleet = {field: table.get((charts.OF_FLEET + field, None), nothing) for field in charts.FLEET}

    def columns(name: str | None, fields: Mapping[str, str]) -> dict[str, Column]:
        """Return a list per field. A counter without a series never increased: it is 0 while the fleet was seen."""
        made = {field: table.get((field, name), nothing) for field in (*FIELDS, *_TTFT)}
        for field in [field for field in FIELDS if field in fields]:
            pairs = zip(made[field], fleet["workers"], strict=True)
            made[field] = [None if seen is None else value or 0.0 for value, seen in pairs]
        return made

    shown = [_shown(None, None, columns(None, charts.TOTAL))]
    shown += [_shown(name, group, columns(name, known)) for name in (names if group is None else [*names, OTHER])]
    if group is not None and not any(any(shown[-1][field]) for field in FIELDS):
        shown.pop()
    rounded = {field: _rounded(column, 1) for field, column in fleet.items()}
    return {"fleet": rounded, "groups": shown}


def _shown(name: str | None, group: Group | None, columns: Mapping[str, Column]) -> dict[str, Any]:
    rounded = {field: _rounded(column, 1 if field in _TTFT else None) for field, column in columns.items()}
    return {"name": name and name[:MAX_NAME], "group": group, **rounded}


def _rounded(column: Column, digits: int | None) -> Column:
    return [None if value is None else round(value, digits) for value in column]

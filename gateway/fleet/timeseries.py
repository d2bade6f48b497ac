"""What calls and workers did over the last week, in buckets of time and in bounded memory, for charts. Pure.

A gateway counts the calls that it answers itself; what is said of the fleet comes from heartbeats, so every gateway has
the same. Buckets of 10 s become buckets of 5 min, and those buckets of 30 min. Nothing is written anywhere: after a
restart of the gateway the charts begin again.
"""

from __future__ import annotations

import asyncio
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from operator import add
from typing import Any, Literal

from protocol.metrics.names import OTHER
from protocol.wire.clock import now_ms

TIERS = ((10, 360), (300, 288), (1800, 336))
"""Seconds of a bucket, and how many are kept: an hour, a day, a week."""

MAX_ROWS = 16
"""Pairs of a tenant and a model that a bucket keeps apart, the busiest; the others are counted together."""

MAX_OPEN_ROWS = 256
"""The same of the bucket of now, of which it is not known yet which will be the busiest."""

MAX_NAME = 100
"""Characters of a name that are kept."""

MAX_BYTES = 12 << 20
"""What all names and counts take at most, as tests/gateway/fleet measures."""

FIELDS = (
    "requests", "prompt_tokens", "output_tokens", "refused", "client_errors", "server_errors", "hits", "misses",
)  # fmt: skip
"""What is counted.

requests: that were queued; refused: calls answered 429; client_errors: other 4xx; server_errors: 5xx, and answers that
failed after their beginning; hits: requests that found their adapter in the pool.
"""

BOUNDS_MS = (10, 20, 35, 60, 100, 150, 250, 400, 700, 1200, 2000, 3500, 6000, 10_000, 20_000, 60_000)
"""Upper bounds of the buckets of the time to first token; one more has what took longer."""

RANGES_S: Mapping[str, int] = {"15m": 900, "1h": 3600, "6h": 21_600, "24h": 86_400, "7d": 604_800}
"""Ranges that may be asked for, in seconds."""

MAX_GROUPS = 6
"""Tenants or models that an answer shows apart, the busiest of the range."""

BUCKETS_AT_ONCE = 8  # read before others get their turn on the event loop: half a millisecond

Field = Literal[
    "requests", "prompt_tokens", "output_tokens", "refused", "client_errors", "server_errors", "hits", "misses"
]
Group = Literal["tenant", "model"]
_PLACES: dict[str, int] = {name: place for place, name in enumerate(FIELDS)}
_EMPTY = (0,) * (len(FIELDS) + len(BOUNDS_MS) + 1)
_OTHERS = (OTHER, OTHER)

Row = array  # FIELDS, then how many calls had their first token within each bound; uint64


@dataclass(slots=True)
class FleetSample:
    """The fleet at a time, or in a bucket: the highest numbers of requests, and what workers did in it."""

    queued: int = 0
    running: int = 0
    oldest_s: float = 0.0  # age of the oldest request that waits
    workers: int = 0
    output_tokens: int = 0  # of all workers, since the sample before
    computed_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the prefix cache

    def merge(self, other: FleetSample) -> None:
        """Add another sample of the same bucket."""
        self.queued, self.running = max(self.queued, other.queued), max(self.running, other.running)
        self.oldest_s, self.workers = max(self.oldest_s, other.oldest_s), max(self.workers, other.workers)
        self.output_tokens += other.output_tokens
        self.computed_tokens += other.computed_tokens
        self.cached_tokens += other.cached_tokens


@dataclass(slots=True)
class Bucket:
    """What happened from `start_s` on, unix time."""

    start_s: int
    fleet: FleetSample | None = None
    rows: dict[tuple[str, str], Row[int]] = field(default_factory=dict[tuple[str, str], "Row[int]"])

    def row(self, key: tuple[str, str]) -> Row[int]:
        """Return the row of a tenant and a model, which may be that of all others."""
        row = self.rows.get(key)
        if row is None:
            if len(self.rows) >= MAX_OPEN_ROWS:
                key = _OTHERS
            row = self.rows.setdefault(key, array("Q", _EMPTY))
        return row

    def merge(self, other: Bucket) -> None:
        """Add what another bucket counted."""
        for key, row in other.rows.items():
            mine = self.row(key)
            mine[:] = _sum(mine, row)
        if other.fleet is not None:
            self.fleet = self.fleet or FleetSample()
            self.fleet.merge(other.fleet)

    def trim(self) -> None:
        """Count all but the busiest pairs together."""
        if len(self.rows) <= MAX_ROWS:
            return
        rows = self.rows
        kept = nlargest(MAX_ROWS, (key for key in rows if key != _OTHERS), key=lambda key: _weight(rows[key]))
        self.rows = {key: rows[key] for key in kept}
        rest = array("Q", _EMPTY)
        for key, row in rows.items():
            if key not in self.rows:
                rest = _sum(rest, row)
        self.rows[_OTHERS] = rest


class TimeSeries:
    """Counts what happens now, and returns what happened in a range of time."""

    def __init__(self, now_s: Callable[[], float] | None = None) -> None:
        """now_s: returns the unix time; default: the queue's server's, as everywhere."""
        self._now_s = now_s or (lambda: now_ms() / 1000)
        self._open: list[Bucket | None] = [None for _ in TIERS]
        self._kept: list[deque[Bucket]] = [deque(maxlen=num) for _, num in TIERS]

    def count(self, tenant: str, model: str, what: Field, num: int = 1) -> None:
        """Count something that a tenant's calls of a model did."""
        self._now().row((tenant[:MAX_NAME], model[:MAX_NAME]))[_PLACES[what]] += num

    def first_token(self, tenant: str, model: str, seconds: float) -> None:
        """Count a call's time to its first token."""
        row = self._now().row((tenant[:MAX_NAME], model[:MAX_NAME]))
        row[len(FIELDS) + bisect_left(BOUNDS_MS, seconds * 1000)] += 1

    def sample(self, fleet: FleetSample) -> None:
        """Keep how the fleet is now."""
        now = self._now()
        now.fleet = now.fleet or FleetSample()
        now.fleet.merge(fleet)

    async def read(self, range_s: int, tenant: str | None, group: Group | None) -> dict[str, Any]:
        """Return a range up to now as JSON: the sums, then the busiest groups, each a list with a value per bucket.

        The last bucket is that of now, of which `elapsed_s` have passed. None in a list: the gateway did not run then,
        or nothing was measured. It takes some 30 ms, in turns of less than one.

        range_s: one of `RANGES_S`. tenant: whose calls, None: everybody's, and the fleet's numbers.
        """
        self._now()
        tier = next(number for number, (step, num) in enumerate(TIERS) if step * num >= range_s)
        step = TIERS[tier][0]
        newest = Bucket(self._start(tier))
        for bucket in self._open[: tier + 1]:
            if bucket is not None:
                newest.merge(bucket)
        first_s = newest.start_s - range_s + step
        found = {one.start_s: one for one in self._kept[tier] if one.start_s >= first_s} | {newest.start_s: newest}
        names = await self._busiest(found.values(), tenant, group)
        times = range(first_s, newest.start_s + 1, step)
        shown: dict[str | None, list[Sequence[int] | None]] = {name: [] for name in (None, *names)}
        rest: list[Sequence[int] | None] = []
        for number, time_s in enumerate(times):
            if number % BUCKETS_AT_ONCE == 0:
                await asyncio.sleep(0)
            sums, others = _grouped(found.get(time_s), tenant, group, names)
            for name, values in shown.items():
                values.append(sums.get(name))
            rest.append(others)
        await asyncio.sleep(0)
        fleet = _fleet([found.get(time_s) for time_s in times]) if tenant is None else None
        groups = [await _columns(name, group, rows) for name, rows in shown.items()]
        if any(row is not None and any(row) for row in rest):
            groups.append(await _columns(OTHER, group, rest))
        return {
            "object": "timeseries", "start_time": first_s, "step_s": step, "num": len(times),
            "elapsed_s": min(step, max(1, int(self._now_s()) - newest.start_s)),
            "fleet": fleet, "groups": groups,
        }  # fmt: skip

    async def _busiest(self, buckets: Iterable[Bucket], tenant: str | None, group: Group | None) -> list[str]:
        """Return the names of the groups that an answer shows apart, the busiest first."""
        weights: dict[str, int] = {}
        if group is not None:
            for number, bucket in enumerate(buckets):
                if number % BUCKETS_AT_ONCE == 0:
                    await asyncio.sleep(0)
                for key, row in bucket.rows.items():
                    name = key[group == "model"]
                    if tenant in (None, key[0]) and name != OTHER:
                        weights[name] = weights.get(name, 0) + _weight(row)
        return nlargest(MAX_GROUPS, weights, key=weights.__getitem__)

    # ------------------------------------------------------------ time

    def _start(self, tier: int) -> int:
        """Return when the bucket of now began."""
        bucket = self._open[0]
        assert bucket is not None
        return bucket.start_s - bucket.start_s % TIERS[tier][0]

    def _now(self) -> Bucket:
        """Return the bucket of now. A clock that goes back stays in the bucket that was begun."""
        now_s, step = int(self._now_s()), TIERS[0][0]
        return self._opened(0, now_s - now_s % step)

    def _opened(self, tier: int, start_s: int) -> Bucket:
        """Return a tier's open bucket, which begins at `start_s` unless a later one is open."""
        bucket = self._open[tier]
        if bucket is not None and start_s <= bucket.start_s:
            return bucket
        if bucket is not None:
            bucket.trim()
            self._kept[tier].append(bucket)
            if tier + 1 < len(TIERS):
                step = TIERS[tier + 1][0]
                self._opened(tier + 1, bucket.start_s - bucket.start_s % step).merge(bucket)
        self._open[tier] = opened = Bucket(start_s)
        return opened


def _sum(one: Row[int], other: Row[int]) -> Row[int]:
    return array("Q", map(add, one, other))


def _weight(row: Row[int]) -> int:
    """Return how much a row matters: calls that were queued or refused."""
    return row[0] + sum(row[_PLACES["refused"] : _PLACES["hits"]])


def _grouped(
    bucket: Bucket | None, tenant: str | None, group: Group | None, names: Sequence[str]
) -> tuple[dict[str | None, Row[int]], Row[int] | None]:
    """Return a bucket's sums, of all under None and of each name, and those of all other names."""
    sums: dict[str | None, Row[int]] = {}
    if bucket is None:
        return sums, None
    empty = array("Q", _EMPTY)
    sums[None], rest = empty, empty
    for key, row in bucket.rows.items():
        if tenant is not None and key[0] != tenant:
            continue
        sums[None] = _sum(sums[None], row)
        if group is not None:
            name = key[group == "model"]
            if name in names:
                sums[name] = _sum(sums.get(name, empty), row)
            else:
                rest = _sum(rest, row)
    return dict.fromkeys(names, empty) | sums, rest


async def _columns(name: str | None, group: Group | None, rows: Sequence[Sequence[int] | None]) -> dict[str, Any]:
    """Return rows as a list for each field, and the quantiles of their first tokens."""
    await asyncio.sleep(0)
    columns: dict[str, Any] = {"name": name, "group": group if name is not None else None}
    for place, title in enumerate(FIELDS):
        columns[title] = [None if row is None else row[place] for row in rows]
    for title, share in (("ttft_p50_ms", 0.5), ("ttft_p95_ms", 0.95)):
        values: list[float | None] = []
        for number, row in enumerate(rows):
            if number % (4 * BUCKETS_AT_ONCE) == 0:
                await asyncio.sleep(0)
            values.append(None if row is None else quantile(row[len(FIELDS) :], share))
        columns[title] = values
    return columns


def quantile(counts: Sequence[int], share: float) -> float | None:
    """Return a quantile in ms, by interpolation between `BOUNDS_MS`; None of nothing.

    What took longer than the last bound counts as the last bound, as `histogram_quantile` of Prometheus has it.
    """
    total = sum(counts)
    if not total:
        return None
    wanted, before, low = share * total, 0, 0.0
    for count, high in zip(counts, BOUNDS_MS, strict=False):
        if count and before + count >= wanted:
            return round(low + (high - low) * (wanted - before) / count, 1)
        before, low = before + count, float(high)
    return float(BOUNDS_MS[-1])


def _fleet(buckets: Sequence[Bucket | None]) -> dict[str, list[Any]]:
    """Return the fleet's numbers of buckets, as a list for each."""
    samples = [bucket.fleet if bucket is not None else None for bucket in buckets]
    return {
        name: [None if one is None else getattr(one, name) for one in samples]
        for name in FleetSample.__dataclass_fields__
    }

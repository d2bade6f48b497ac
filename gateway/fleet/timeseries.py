"""Counts of calls and workers over the last week for charts, in time buckets and bounded memory. Pure.

A gateway counts only its own calls; the fleet's numbers come from heartbeats, so they are the same in every gateway.
Buckets of 10 s are merged into buckets of 5 min, and those into buckets of 30 min. Nothing is stored: the charts
restart with the gateway.
"""

from __future__ import annotations

import asyncio
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from heapq import nlargest, nsmallest
from operator import add, itemgetter
from typing import Any, Literal

from gateway.overload.loop_slice import LoopSlice
from protocol.metrics.names import OTHER
from protocol.wire.clock import now_s as fleet_now_s

TIERS = ((10, 360), (300, 288), (1800, 336))
"""Seconds per bucket, and number of buckets kept: an hour, a day, a week."""

MAX_ROWS = 24
"""Maximum rows of a bucket, besides the row of all others: first one per tenant, then models, round-robin by tenant."""

MAX_TENANTS = 16
"""Number of tenants that a bucket counts separately, the busiest; the others share one row."""

MAX_OPEN_ROWS = 128
"""Maximum rows of the current bucket, whose busiest rows are not known yet."""

MAX_NAME = 100
"""Characters of a name that are kept."""

MAX_BYTES = 12 << 20
"""Maximum memory of all names and counts, as measured by tests/gateway/fleet."""

FIELDS = (
    "requests", "prompt_tokens", "output_tokens", "refused", "client_errors", "server_errors", "hits", "misses",
)  # fmt: skip
"""The counters of a row. requests: queued requests; refused: calls answered with 429; client_errors: other 4xx;
server_errors: 5xx, and answers that failed after they had begun; hits: requests whose adapter was in the pool."""

BOUNDS_MS = (10, 20, 35, 60, 100, 150, 250, 400, 700, 1200, 2000, 3500, 6000, 10_000, 20_000, 60_000)
"""Upper bounds of the histogram of the time to first token; one more bucket counts longer times."""

RANGES_S: Mapping[str, int] = {"15m": 900, "1h": 3600, "6h": 21_600, "24h": 86_400, "7d": 604_800}
"""Ranges that clients may request, in seconds."""

MAX_GROUPS = 6
"""Tenants or models that an answer shows separately, the busiest of the range."""


Field = Literal[
    "requests", "prompt_tokens", "output_tokens", "refused", "client_errors", "server_errors", "hits", "misses"
]
Group = Literal["tenant", "model"]
_PLACES: dict[str, int] = {name: place for place, name in enumerate(FIELDS)}
_EMPTY = (0,) * (len(FIELDS) + len(BOUNDS_MS) + 1)

Key = tuple[str | None, str | None]
"""A tenant and a model. None stands for all others: clients choose names, but no name is None."""

_OTHERS: Key = (None, None)

Row = array  # FIELDS, then the histogram of the time to first token; uint64


@dataclass(slots=True)
class FleetSample:
    """The fleet's state at a time or in a bucket: maximum numbers of requests and workers, and sums of tokens."""

    queued: int = 0
    running: int = 0
    oldest_s: float = 0.0  # age of the oldest waiting request
    workers: int = 0
    output_tokens: int = 0  # of all workers, since the previous sample
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
    """Counts of the period that begins at `start_s`, unix time."""

    start_s: int
    fleet: FleetSample | None = None
    rows: dict[Key, Row[int]] = field(default_factory=dict[Key, "Row[int]"])

    def row(self, key: Key) -> Row[int]:
        """Return the row of a tenant and a model; if there are too many rows, others are merged first."""
        row = self.rows.get(key)
        if row is None:
            if len(self.rows) >= MAX_OPEN_ROWS:
                self.trim()
            row = self.rows.setdefault(key, array("Q", _EMPTY))
        return row

    def add(self, key: Key, row: Row[int]) -> None:
        """Add a row of another bucket. Creates a new array, because a reader may hold the old one."""
        self.rows[key] = _sum(self.row(key), row)

    def merge(self, other: Bucket) -> None:
        """Add the counts of another bucket."""
        for key, row in other.rows.items():
            self.add(key, row)
        self.merge_fleet(other)

    def merge_fleet(self, other: Bucket) -> None:
        """Add another bucket's sample of the fleet."""
        if other.fleet is not None:
            self.fleet = self.fleet or FleetSample()
            self.fleet.merge(other.fleet)

    def trim(self) -> None:
        """Keep separate rows of the busiest tenants and of their busiest models, and merge the others.

        The sums of a kept tenant stay exact, and one tenant's models do not displace another's busiest ones.
        """
        if len(self.rows) <= MAX_ROWS:
            return
        weights = {key: _weight(row) for key, row in self.rows.items()}
        tenants: dict[str, int] = {}
        for (tenant, _), weight in weights.items():
            if tenant is not None:
                tenants[tenant] = tenants.get(tenant, 0) + weight
        turns = dict.fromkeys(nlargest(MAX_TENANTS, tenants, key=tenants.__getitem__), 0)
        pairs: list[tuple[int, Key]] = []
        for key in sorted(weights, key=weights.__getitem__, reverse=True):
            tenant, model = key
            if tenant in turns and model is not None:
                pairs.append((turns[tenant], key))
                turns[tenant] += 1
        kept = {key for _, key in nsmallest(MAX_ROWS - len(turns), pairs, key=itemgetter(0))}
        rows, self.rows = self.rows, {}
        for key, row in rows.items():
            place = key if key in kept else (key[0], None) if key[0] in turns else _OTHERS
            mine = self.rows.get(place)
            self.rows[place] = row if mine is None else _sum(mine, row)


class TimeSeries:
    """Counts current events, and returns the counts of a range of time."""

    def __init__(self, now_s: Callable[[], float] = fleet_now_s) -> None:
        """now_s: returns unix time; default: the clock of the queue's server, as everywhere."""
        self._now_s = now_s
        self._open: list[Bucket | None] = [None for _ in TIERS]
        self._kept: list[deque[Bucket]] = [deque(maxlen=num) for _, num in TIERS]

    def count(self, tenant: str, model: str, what: Field, num: int = 1) -> None:
        """Add to a counter of a tenant and a model."""
        self._now().row((tenant[:MAX_NAME], model[:MAX_NAME]))[_PLACES[what]] += num

    def queued(self, tenant: str, model: str, num_prompt_tokens: int) -> None:
        """Count a queued request and its prompt tokens."""
        row = self._now().row((tenant[:MAX_NAME], model[:MAX_NAME]))
        row[_PLACES["requests"]] += 1
        row[_PLACES["prompt_tokens"]] += num_prompt_tokens

    def first_token(self, tenant: str, model: str, seconds: float) -> None:
        """Count a call's time to its first token."""
        row = self._now().row((tenant[:MAX_NAME], model[:MAX_NAME]))
        row[len(FIELDS) + bisect_left(BOUNDS_MS, seconds * 1000)] += 1

    def sample(self, fleet: FleetSample) -> None:
        """Merge a sample of the fleet into the current bucket."""
        now = self._now()
        now.fleet = now.fleet or FleetSample()
        now.fleet.merge(fleet)

    async def read(self, range_s: int, tenant: str | None, group: Group | None) -> dict[str, Any]:
        """Return a range up to now as JSON: the sums, then the busiest groups, each with a list of values per field.

        The last bucket is the current one, of which `elapsed_s` have passed. None in a list means: the gateway did not
        run, nothing was measured, or the tenant was not among the separately counted ones. Groups named `other` are
        counted with all others. Takes some 40 ms, in slices of less than one.

        range_s: one of `RANGES_S`. tenant: whose calls; None: all calls, and the fleet's numbers.
        """
        self._now()
        tier = next(number for number, (step, num) in enumerate(TIERS) if step * num >= range_s)
        step = TIERS[tier][0]
        newest_s = self._start(tier)
        first_s = newest_s - range_s + step
        found = {one.start_s: one for one in self._kept[tier] if one.start_s >= first_s}
        found |= await self._copies(tier, first_s, tenant)
        names = await self._busiest(found.values(), tenant, group)
        times = range(first_s, newest_s + 1, step)
        shown: dict[str | None, list[Sequence[int] | None]] = {name: [] for name in (None, *names)}
        rest: list[Sequence[int] | None] = []
        turn = LoopSlice()
        for time_s in times:
            await turn.pause()
            sums, others = _grouped(found.get(time_s), tenant, group, names)
            for name, values in shown.items():
                values.append(sums.get(name))
            rest.append(others)
        await asyncio.sleep(0)
        fleet = _fleet([found.get(time_s) for time_s in times]) if tenant is None else None
        groups = [await _columns(name, group, rows) for name, rows in shown.items()]
        if group is not None and any(row is not None and any(row) for row in rest):
            groups.append(await _columns(OTHER, group, rest))
        return {
            "object": "timeseries",
            "start_time": first_s,
            "step_s": step,
            "num": len(times),
            "elapsed_s": min(step, max(1, int(self._now_s()) - newest_s)),
            "fleet": fleet,
            "groups": groups,
        }

    async def _copies(self, tier: int, first_s: int, tenant: str | None) -> dict[int, Bucket]:
        """Return the counts of open buckets since `first_s`, as buckets of a tier by start time.

        A bucket that has ended stays open until the next shorter one has ended too, so there are up to two. Nothing is
        counted twice: all rows are collected before other tasks run.
        """
        copies: dict[int, Bucket] = {}
        taken: list[tuple[Bucket, Key, Row[int]]] = []
        for bucket in self._open[: tier + 1]:
            if bucket is None or (start_s := bucket.start_s - bucket.start_s % TIERS[tier][0]) < first_s:
                continue
            copy = copies.setdefault(start_s, Bucket(start_s))
            copy.merge_fleet(bucket)
            taken += [(copy, *pair) for pair in bucket.rows.items() if tenant is None or pair[0][0] in (tenant, None)]
        turn = LoopSlice()
        for copy, key, row in taken:
            copy.add(key, row)
            await turn.pause()
        for copy in copies.values():
            await asyncio.sleep(0)
            copy.trim()
        return copies

    async def _busiest(self, buckets: Iterable[Bucket], tenant: str | None, group: Group | None) -> list[str]:
        """Return the names of the groups shown separately, the busiest first."""
        weights: dict[str, int] = {}
        if group is not None:
            turn = LoopSlice()
            for bucket in buckets:
                await turn.pause()
                for key, row in bucket.rows.items():
                    name = key[group == "model"]
                    if tenant in (None, key[0]) and name not in (None, OTHER):
                        weights[name] = weights.get(name, 0) + _weight(row)
        return nlargest(MAX_GROUPS, weights, key=weights.__getitem__)

    # ------------------------------------------------------------ time

    def _start(self, tier: int) -> int:
        """Return the start of the tier's current bucket."""
        bucket = self._open[0]
        assert bucket is not None
        return bucket.start_s - bucket.start_s % TIERS[tier][0]

    def _now(self) -> Bucket:
        """Return the current bucket. If the clock goes back, the bucket stays."""
        now_s, bucket = int(self._now_s()), self._open[0]
        if bucket is not None and now_s < bucket.start_s + TIERS[0][0]:
            return bucket
        return self._opened(0, now_s - now_s % TIERS[0][0])

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
    """Return a row's weight: its queued, refused and failed calls."""
    return row[0] + sum(row[_PLACES["refused"] : _PLACES["hits"]])


def _grouped(
    bucket: Bucket | None, tenant: str | None, group: Group | None, names: Sequence[str]
) -> tuple[dict[str | None, Row[int]], Row[int] | None]:
    """Return a bucket's sums, in total (None) and by name, and the sum of all other names.

    Nothing if there is no bucket, or if the tenant may be among its merged rows.
    """
    sums: dict[str | None, Row[int]] = {}
    if bucket is None:
        return sums, None
    if tenant is not None and _OTHERS in bucket.rows and all(key[0] != tenant for key in bucket.rows):
        return sums, None
    empty = rest = array("Q", _EMPTY)
    for key, row in bucket.rows.items():
        if tenant in (None, key[0]):
            name = key[group == "model"]
            if name in names:
                sums[name] = _sum(sums.get(name, empty), row)
            else:
                rest = _sum(rest, row)
    return dict.fromkeys(names, empty) | sums | {None: reduce(_sum, sums.values(), rest)}, rest


async def _columns(name: str | None, group: Group | None, rows: Sequence[Sequence[int] | None]) -> dict[str, Any]:
    """Return rows as a list per field, and quantiles of the time to first token."""
    turn = LoopSlice()
    columns: dict[str, Any] = {"name": name, "group": group if name is not None else None}
    for place, title in enumerate(FIELDS):
        columns[title] = [None if row is None else row[place] for row in rows]
        await turn.pause()
    for title, share in (("ttft_p50_ms", 0.5), ("ttft_p95_ms", 0.95)):
        values: list[float | None] = []
        for row in rows:
            await turn.pause()
            values.append(None if row is None else quantile(row[len(FIELDS) :], share))
        columns[title] = values
    return columns


def quantile(counts: Sequence[int], share: float) -> float | None:
    """Return a quantile in ms, interpolated between `BOUNDS_MS`; None if nothing was counted.

    Times beyond the last bound count as the last bound, as in Prometheus' `histogram_quantile`.
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
    """Return the fleet's numbers, as a list per field."""
    samples = [bucket.fleet if bucket is not None else None for bucket in buckets]
    return {
        name: [None if one is None else getattr(one, name) for one in samples]
        for name in FleetSample.__dataclass_fields__
    }

"""Metrics of where the fleet's adapters are, by name, for dashboards and for routers that choose between fleets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gateway.fleet.view import FleetView
from protocol.metrics.fleet import Holding, Seen
from protocol.queue.bus import Bus
from protocol.wire import messages as m

MAX_HOLDINGS = 1000
"""Maximum adapters shown per worker: those in the pool first, then loading ones, then those in host memory."""

NameOf = Callable[[str], str | None]
"""Returns an adapter's name by its digest, None if unknown."""


async def look(bus: Bus, fleet: FleetView, beats: Sequence[m.WorkerBeat], name_of: NameOf) -> Seen:
    """Return where adapters are; read the records of those shown. Raises a connection error."""
    held = {beat.name: _levels(beat) for beat in beats}
    status = fleet.status
    asked = (status.running_adapters, status.waiting_adapters) if status is not None else ([], [])
    records = await bus.adapters.records(
        {digest for levels in held.values() for digest in levels} | {*asked[0], *asked[1]}
    )

    def name(digest: str) -> str:
        return name_of(digest) or name_in(records, digest)

    total, free = (sum(getattr(beat, f"kv_blocks_{what}") for beat in beats) for what in ("total", "free"))
    # They are assigned, so they count as running. min(): heartbeats may be a second old.
    deferred = min(sum(beat.waiting_adapter for beat in beats), fleet.num_running)
    return Seen(
        fleet.base.name if fleet.base is not None else "",
        fleet.num_running - deferred,
        fleet.num_queued,
        deferred,
        1 - free / total if total else 0.0,
        sum(beat.counters.num_steps for beat in beats),
        sum(beat.counters.num_computed_tokens for beat in beats),
        [
            Holding(beat.name, name(digest), level, digest in beat.pinned, _rank_in(records, digest))
            for beat in beats
            for digest, level in held[beat.name].items()
        ],
        [name(digest) for digest in asked[0]],
        [name(digest) for digest in asked[1]],
        sum(map(_room, beats)),
    )


def _levels(beat: m.WorkerBeat) -> dict[str, str]:
    """Return the level of each shown adapter of a worker."""
    levels: dict[str, str] = {}
    for level, digests in (("resident", beat.resident), ("loading", beat.loading), ("host", beat.host)):
        for digest in digests:
            if len(levels) == MAX_HOLDINGS:
                return levels
            levels.setdefault(digest, level)
    return levels


def name_in(records: Mapping[str, m.AdapterRecord], digest: str) -> str:
    """Return an adapter's name at its source, without scheme and version; if unknown, the start of its digest."""
    record = records.get(digest)
    if record is None or not record.source:
        return digest[:12]
    return record.source if "://" in record.source else record.source.partition(":")[2].partition("@")[0]


def _rank_in(records: Mapping[str, m.AdapterRecord], digest: str) -> int:
    record = records.get(digest)
    return record.rank if record is not None else 0


def _room(beat: m.WorkerBeat) -> int:
    """Return the estimated number of adapters that fit into a worker's pool, by the mean size of its adapters."""
    used = beat.pool_bytes_total - beat.pool_bytes_free
    return round(len(beat.resident) * beat.pool_bytes_total / used) if used and beat.resident else len(beat.resident)

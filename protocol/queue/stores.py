"""Where the adapter stores are."""

from __future__ import annotations

from protocol.queue.bus import Bus

MAX_SILENCE_MS = 10_000


async def store_urls(bus: Bus) -> tuple[str, ...]:
    """Return the addresses of the adapter stores that are alive."""
    sids = await bus.members(bus.keys.stores, MAX_SILENCE_MS)
    if not sids:
        return ()
    raws = await bus.redis.mget([bus.keys.store_beat(sid) for sid in sids])
    return tuple(sorted(raw.decode() for raw in raws if raw))

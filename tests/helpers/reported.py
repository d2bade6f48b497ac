"""Bases that workers have reported."""

from __future__ import annotations

from protocol.queue.bus import Bus
from protocol.wire import messages as m


async def report(bus: Bus, *bases: m.ServedModel) -> None:
    """Write what workers of these bases write when they join."""
    for base in bases:
        await bus._redis.hset(bus.keys.bases, base.name, m.encode(base))

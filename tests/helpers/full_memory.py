"""A queue server without room for anything new."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from protocol.queue.bus import Bus


@asynccontextmanager
async def full_memory(bus: Bus, max_bytes: int = 1) -> AsyncIterator[None]:
    """Leave the server `max_bytes` meanwhile. Once they are used it rejects every write that its flags do not allow."""
    limit = (await bus._redis.config_get("maxmemory"))["maxmemory"]
    await bus._redis.config_set("maxmemory", max_bytes)
    try:
        yield
    finally:
        await bus._redis.config_set("maxmemory", limit)

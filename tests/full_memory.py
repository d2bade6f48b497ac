"""A queue server without room for anything new."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from protocol.queue.bus import Bus


@asynccontextmanager
async def full_memory(bus: Bus) -> AsyncIterator[None]:
    """Leave the server no memory meanwhile: it rejects every write that its flags do not allow."""
    limit = (await bus._redis.config_get("maxmemory"))["maxmemory"]
    await bus._redis.config_set("maxmemory", 1)
    try:
        yield
    finally:
        await bus._redis.config_set("maxmemory", limit)

"""A queue server without memory for new data."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from protocol.queue.bus import Bus


@asynccontextmanager
async def full_memory(bus: Bus, max_bytes: int = 1) -> AsyncIterator[None]:
    """Limit the server's memory during the block. Once it is used, the server rejects writes not flagged as allowed."""
    limit = (await bus._redis.config_get("maxmemory"))["maxmemory"]
    await bus._redis.config_set("maxmemory", max_bytes)
    try:
        yield
    finally:
        await bus._redis.config_set("maxmemory", limit)

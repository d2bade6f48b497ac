"""Fixtures for tests of the queue."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio
from helpers.script_queue import GATEWAY, Queue

from protocol.queue.bus import Bus


@pytest_asyncio.fixture
async def queue(bus: Bus) -> AsyncIterator[Queue]:
    """A queue with a gateway and a worker."""
    await bus.streams.create(bus.keys.out(GATEWAY), 300)
    for stream in (bus.keys.work("w"), bus.keys.ctl("w")):
        await bus.streams.create(stream, 3600)
    yield Queue(bus)

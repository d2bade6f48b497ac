"""Batches with lines as large as bodies may be, of which a file may have hundreds of megabytes."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from helpers.waiting import wait_until

from gateway.batches.inner_calls import CallAnswer
from gateway.files.storage import FolderStorage
from protocol.queue.bus import Bus
from tests.gateway.batches.test_runner import Endpoint, World
from tests.gateway.batches.test_trouble import SOON, ShakyWorld, batch_of


async def test_nothing_is_held_of_large_lines_that_wait(bus: Bus, tmp_path: Path) -> None:
    """Neither lines that wait for their turn nor those whose endpoint is busy stay in memory."""
    num, size, is_busy = 30, 1_000_000, True
    world, reads, most = World(bus, tmp_path), Counter[int](), 0

    class Watched(FolderStorage):
        async def read(self, name: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
            nonlocal most
            reads[start] += end is not None
            try:
                async for chunk in super().read(name, start, end):
                    most = max(most, tracemalloc.get_traced_memory()[0])
                    yield chunk
            finally:
                most = max(most, tracemalloc.get_traced_memory()[0])

    watched = ShakyWorld(bus, tmp_path)
    watched.shaky = Watched(tmp_path)  # type: ignore[assignment]
    await batch_of(world, [{"n": n, "x": "x" * size} for n in range(1, num + 1)])
    busy, done = CallAnswer(429, {"retry-after": "0"}, b"{}"), CallAnswer(200, {}, b"{}")
    endpoint = Endpoint(lambda number: busy if is_busy else done)
    tracemalloc.start()
    try:
        async with watched.gateway("g1", endpoint, replace(SOON, lease_s=60, min_calls=num)):
            await wait_until(lambda: len(endpoint.asked) > 3 * num, "they are asked again")
            is_busy = False
            batch = await watched.ended()
    finally:
        tracemalloc.stop()
    assert (batch.status, batch.completed) == ("completed", num)
    assert len(reads) == 2 * num, "each line was read, and then its body again"
    assert sorted(reads.values())[:num] == [1] * num, "none is looked through twice"
    assert most < 10 * size

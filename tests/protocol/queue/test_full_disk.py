"""A queue whose server cannot write to its disk: it takes no writes, lives on, and takes them again with room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.script_queue import Queue
from helpers.waiting import wait_until

from chaos.shortage import disk_again, no_disk
from lorafleet.launcher.embedded import EmbeddedServer, start_embedded
from protocol.queue.bus import Bus, DiskFull
from protocol.wire.keys import Keys


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[EmbeddedServer]:
    server = start_embedded(tmp_path / "durable")
    yield server
    server.stop()


async def test_a_full_disk_refuses_writes_until_there_is_room(durable: EmbeddedServer) -> None:
    queue = Queue(Bus(durable.url, Keys()))
    await queue.submit("a")
    no_disk(durable.process, durable.folder)

    async def refused() -> bool:
        """What the server had taken when it found the disk full it keeps, and writes later."""
        try:
            await queue.bus._redis.set(queue.keys.tag, "x", px=60_000)
        except DiskFull:
            return True
        return False

    await wait_until(refused, "the server refuses writes")
    with pytest.raises(DiskFull, match="MISCONF"):
        await queue.submit("b")
    assert await queue.queued() == [("a", 0)]
    assert durable.process.poll() is None
    disk_again(durable.process)

    async def taken() -> bool:
        return not await refused()

    await wait_until(taken, "the server takes writes again")
    await queue.submit("c")
    assert await queue.queued() == [("a", 0), ("c", 0)]
    await queue.bus.close()

"""Fixtures for every test: a real queue server per test process; no key may outlive its test without a TTL."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from lorafleet.embedded import EmbeddedServer, start_embedded
from protocol.queue.bus import Bus


@pytest.fixture(scope="session")
def queue_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    server = start_embedded(Path(tmp_path_factory.mktemp("queue")), durable=False)
    yield server
    server.stop()


@pytest_asyncio.fixture
async def bus(queue_server: EmbeddedServer) -> AsyncIterator[Bus]:
    """A client on an empty queue. After the test, every key must have a TTL or be on the permanent list."""
    client = Bus(queue_server.url)
    await client._redis.flushall()
    yield client
    leaks = await untimed_keys(client)
    await client.close()
    assert not leaks, f"keys left without a TTL: {leaks}"


async def untimed_keys(client: Bus) -> list[str]:
    """Return the keys that have no TTL and are not permanent."""
    keys = [key.decode() async for key in client._redis.scan_iter(count=1000)]
    return [key for key in keys if await client._redis.pttl(key) == -1 and not client.keys.is_permanent(key)]

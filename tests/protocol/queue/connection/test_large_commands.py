"""Commands of megabytes are sent in slices, so that the event loop continues, and completely or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from protocol.queue.bus import Bus
from protocol.queue.connection.redis_client import SENT_BYTES, RedisConnectionError, connect

LARGE = b"0\r\nSET stolen 1\r\n" * (1 << 16)
KEY = "t:large"


@pytest_asyncio.fixture
async def client(bus: Bus) -> AsyncIterator[Any]:
    client = connect(bus.url, timeout_s=60)
    yield client
    await client.aclose()


def watched(client: Any, at: int, act: Any) -> list[int]:
    """Record the sizes of a client's writes, and call `act` with its connection after `at` writes."""
    sizes: list[int] = []
    kind = client.connection_pool.connection_class

    class Watched(kind):  # type: ignore[misc, valid-type]
        async def _connect(self) -> None:
            await super()._connect()
            write = self._writer.transport.write

            def noted(data: bytes) -> None:
                sizes.append(len(data))
                write(data)
                if len(sizes) == at:
                    act(self)

            self._writer.writelines = lambda parts: noted(b"".join(parts))

    client.connection_pool.connection_class = Watched
    return sizes


async def test_a_large_command_is_sent_in_slices(client: Any) -> None:
    turns, others = 0, asyncio.Event()

    async def count() -> None:
        nonlocal turns
        while not others.is_set():
            turns += 1
            await asyncio.sleep(0)

    sizes = watched(client, -1, None)
    counting = asyncio.create_task(count())
    await client.set(KEY, LARGE, px=60_000)
    others.set()
    await counting
    assert await client.get(KEY) == LARGE
    assert max(sizes) < 2 * SENT_BYTES
    assert turns > len(LARGE) // SENT_BYTES
    for size in (SENT_BYTES - 100, SENT_BYTES, SENT_BYTES + 1, 3 * SENT_BYTES):
        await client.set(KEY, LARGE[:size], px=60_000)
        assert await client.get(KEY) == LARGE[:size]
    pipe = client.pipeline(transaction=False)
    for number in range(5):
        pipe.set(f"{KEY}:{number}", LARGE[: (number + 1) * 50_000], px=60_000)
    await pipe.execute()
    assert [await client.strlen(f"{KEY}:{number}") for number in range(5)] == [50_000 * n for n in range(1, 6)]


async def test_a_command_that_is_given_up_in_its_middle_is_not_half_sent(client: Any) -> None:
    """Otherwise the next command on its connection would be read as its rest, or its rest as commands."""
    sizes = watched(client, 8, lambda _: asking.cancel())  # includes the connection's own handshake
    asking = asyncio.create_task(client.set(KEY, LARGE, px=60_000))
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert sum(sizes) < len(LARGE)
    await client.set(KEY, b"after", px=60_000)
    assert await client.get(KEY) == b"after"
    assert await client.get("stolen") is None


async def test_the_rest_of_a_command_goes_to_no_other_connection(client: Any) -> None:
    client.connection_pool.connection_kwargs["retry"]._retries = 0

    def close(connection: Any) -> None:
        closing.append(asyncio.create_task(connection.disconnect(nowait=True)))

    closing: list[asyncio.Task[None]] = []
    watched(client, 8, close)
    with pytest.raises(RedisConnectionError):
        await client.set(KEY, LARGE, px=60_000)
    await closing[0]
    assert await client.get("stolen") is None
    assert await client.get(KEY) is None

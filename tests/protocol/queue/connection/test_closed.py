"""A connection that closes while somebody is about to use it, on the event loop that services run on."""

from __future__ import annotations

import asyncio

import pytest
import uvloop
from redis.exceptions import ConnectionError as RedisConnectionError

from lorafleet.launcher.embedded import EmbeddedServer
from protocol.queue.connection.redis_client import connect


@pytest.mark.parametrize("timeout_s", [2.0, None])
def test_a_closed_transport_is_a_lost_connection(queue_server: EmbeddedServer, timeout_s: float | None) -> None:
    """uvloop raises RuntimeError for a write to it, which no caller takes for a queue out of reach."""

    async def main() -> None:
        client = connect(queue_server.url, timeout_s=timeout_s)
        connection = client.connection_pool.make_connection()
        await connection.connect()
        connection._writer.close()
        await connection._writer.wait_closed()
        await asyncio.sleep(0.01)  # the loop has let go of it
        with pytest.raises(RedisConnectionError, match="was closed"):
            await connection.send_packed_command([b"*1\r\n$4\r\nPING\r\n"])
        assert not connection.is_connected
        await connection.disconnect()
        await client.aclose()

    uvloop.run(main())

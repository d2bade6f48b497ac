"""A queue that temporarily cannot serve counts as unreachable, whichever error its server or the event loop raises."""

from __future__ import annotations

import asyncio

import pytest
import uvloop
from helpers.waiting import wait_until
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from lorafleet.launcher.embedded import EmbeddedServer
from protocol.queue.bus import CONNECTION_ERRORS, Bus
from protocol.queue.connection.redis_client import connect


@pytest.mark.parametrize("timeout_s", [2.0, None])
def test_a_closed_transport_is_a_lost_connection(queue_server: EmbeddedServer, timeout_s: float | None) -> None:
    """uvloop raises RuntimeError for a write to it, which callers do not treat as an unreachable queue."""

    async def main() -> None:
        client = connect(queue_server.url, timeout_s=timeout_s)
        connection = client.connection_pool.make_connection()
        await connection.connect()
        connection._writer.close()
        await connection._writer.wait_closed()
        with pytest.raises(RedisConnectionError, match="was closed"):
            await connection.send_packed_command([b"*1\r\n$4\r\nPING\r\n"])
        assert not connection.is_connected
        await connection.disconnect()
        await client.aclose()

    uvloop.run(main())


async def test_a_server_that_runs_a_script_for_long_is_out_of_reach(bus: Bus, queue_server: EmbeddedServer) -> None:
    """It answers BUSY, even if it was suspended in the middle of a short script."""
    operator = connect(queue_server.url, timeout_s=None)
    threshold = (await operator.config_get("busy-reply-threshold"))["busy-reply-threshold"]
    await operator.config_set("busy-reply-threshold", 1)
    running = asyncio.create_task(bus._redis.eval("while true do end", 0))

    async def told() -> bool:
        try:
            await bus._redis.ping()
        except CONNECTION_ERRORS as error:
            return "BUSY" in str(error)
        return False

    try:
        await wait_until(told, "the server answers BUSY")
    finally:
        await operator.script_kill()
        with pytest.raises(ResponseError, match="SCRIPT KILL"):
            await running
        await operator.config_set("busy-reply-threshold", threshold)
        await operator.aclose()
    assert await bus._redis.ping()

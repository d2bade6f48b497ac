"""Connections to Redis that can be cancelled."""

from __future__ import annotations

import asyncio
from typing import Any

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import TimeoutError as RedisTimeoutError

CONNECT_TIMEOUT_S = 5
MAX_CONNECTIONS = 32  # of a client; more commands at once wait


class _Cancellable:
    """Sends under `asyncio.timeout`.

    redis-py sends under `asyncio.wait_for`. Before Python 3.12 that swallows a cancellation that comes while the send
    completes (20 % of those that met an XADD, 2026-11-25), so that a cancelled task goes on for ever; and it starts
    a task per command.
    """

    socket_timeout: float | None

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        limit_s, self.socket_timeout = self.socket_timeout, None  # without a timeout there is no wait_for
        try:
            async with asyncio.timeout(limit_s):
                await super().send_packed_command(command, check_health)  # type: ignore[misc]
        except TimeoutError:
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise RedisTimeoutError("timeout writing to the queue") from None
        finally:
            self.socket_timeout = limit_s


def connect(url: str, *, timeout_s: float | None) -> Any:
    """Return a client. `timeout_s` limits every read and write, with retries; None: blocking reads may take long."""
    retries = 4 if timeout_s is not None else 0
    # redis-py's default pool refuses the 101st command at a time; this one lets it wait its turn.
    pool = aioredis.BlockingConnectionPool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=20,
        socket_timeout=timeout_s,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.02), retries),
    )
    pool.connection_class = type("CancellableConnection", (_Cancellable, pool.connection_class), {})
    return aioredis.Redis.from_pool(pool)

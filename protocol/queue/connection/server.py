"""The queue's server: whether it is reachable and suitable as a queue, and what it reports about itself."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from redis.exceptions import AuthenticationError, NoPermissionError

from protocol.queue.connection.redis_client import CONNECTION_ERRORS, Client
from protocol.wire.errors import Internal

logger = logging.getLogger(__name__)

AWAY_S = 1.0
"""Seconds between attempts of a starting service to reach the server."""

_DENIED = (AuthenticationError, NoPermissionError)
"""Refusals of a service's user, which waiting does not resolve. redis-py wraps the first in a connection error."""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """The state of the queue's server. Sizes in bytes, times in ms."""

    version: str
    policy: str  # `maxmemory-policy`
    used_bytes: int
    max_bytes: int  # 0: no limit
    appends: bool  # whether it writes its data to a file (`appendonly`)
    append_ok: bool  # whether its last write to that file succeeded
    role: str  # "master", or a replica's role
    answer_ms: float
    ahead_ms: float  # its clock minus this machine's, as precise as the reply's duration allows
    cpu_s: float = 0.0  # CPU time of its main thread
    snapshot_ok: bool = True  # whether its last snapshot was written


class Server:
    """Reads the state of the queue's server and checks it."""

    def __init__(self, redis: Client) -> None:
        self._redis = redis

    async def facts(self) -> ServerFacts:
        """Return the state of the server. Raises connection errors and QueueError."""
        info: dict[str, Any] = await self._redis.info()
        before_s, started_s = time.time(), time.perf_counter()
        seconds, micros = await self._redis.time()
        took_s = time.perf_counter() - started_s
        ahead_s = int(seconds) + int(micros) / 1e6 - (before_s + took_s / 2)
        name = "valkey" if "valkey_version" in info else "redis"
        return ServerFacts(
            f"{name} {info.get(f'{name}_version', '?')}",
            str(info.get("maxmemory_policy", "")),
            int(info.get("used_memory", 0)),
            int(info.get("maxmemory", 0)),
            bool(info.get("aof_enabled", 0)),
            info.get("aof_last_write_status", "ok") == "ok",
            str(info.get("role", "")),
            took_s * 1000,
            ahead_s * 1000,
            float(info.get("used_cpu_user_main_thread", 0)) + float(info.get("used_cpu_sys_main_thread", 0)),
            info.get("rdb_last_bgsave_status", "ok") == "ok",
        )

    async def check(self) -> None:
        """Check that the server never evicts data of the queue. Raises Internal."""
        # INFO instead of CONFIG, which would also let a service change the server's settings.
        policy = (await self._redis.info("memory")).get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise Internal(f"Redis has maxmemory-policy {policy}; the queue needs noeviction, or it loses requests")

    async def reach(self, stop: asyncio.Event) -> bool:
        """Wait until the server replies, and check it; return False if `stop` was set first.

        Raises Internal for a server that is not suitable as a queue, or that refuses this service's user.
        """
        waiting, stopped = asyncio.create_task(self._answer()), asyncio.create_task(stop.wait())
        try:  # an attempt on a silent server takes many seconds to fail
            await asyncio.wait((waiting, stopped), return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                waiting.result()
            return waiting.done()
        finally:
            waiting.cancel()
            stopped.cancel()
            await asyncio.wait((waiting, stopped))

    async def _answer(self) -> None:
        told = ""
        while True:
            try:
                return await self.check()
            except (*CONNECTION_ERRORS, NoPermissionError) as error:
                if isinstance(error.__cause__ or error, _DENIED):
                    raise Internal(f"the queue refused this service: {error}") from error
                if str(error) != told:
                    logger.warning("the queue cannot be reached, waiting for it: %s", error)
                told = str(error)
                await asyncio.sleep(AWAY_S)

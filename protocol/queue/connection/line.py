"""A connection on which commands are sent as they come, whether those before have been answered or not.

redis-py lends every command a connection of its own, under locks and timeouts: 60 µs of CPU, where the command itself
takes 15. Scripts are most of what services ask of the queue, are short, and may run twice; so they share one line, and
whatever goes wrong on it is left to redis-py, which connects and tries again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import hiredis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from protocol.queue.connection.redis_client import Client

logger = logging.getLogger(__name__)

_pack: Callable[[tuple[str | bytes | int | float, ...]], bytes] = getattr(hiredis, "pack_command")  # noqa: B009  untyped
"""Redis-py's own is in Python, and takes ten times as long."""

MAX_COMMAND_BYTES = 1 << 16
"""Largest command that the line takes: a larger one would keep those behind it waiting."""

MAX_WAITING = 256
"""Most commands without a reply. With them the line holds 16 MB at most."""

REST_S = 1.0
"""Time after a failure to connect in which it is not tried again."""

LOST = (RedisConnectionError, RedisTimeoutError, OSError)
"""What `Line.ask` raises when the reply cannot be had; the command may have been carried out."""


class NotTakenError(Exception):
    """The command is too large for the line, or too many wait there already: it is for a connection of its own."""


class Line:
    """One connection to the queue's server, opened when it is first needed, and again after it was lost."""

    def __init__(self, client: Client, timeout_s: float | None) -> None:
        """`client`: connects, without a timeout of its own; `timeout_s`: most time until a reply; None: any."""
        self._client = client
        self._timeout_s = timeout_s
        self._connection: Any = None
        self._waiting: deque[asyncio.Future[Any]] = deque()  # for replies, which come in the order of the commands
        self._reader: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()
        self._rests_until_s = 0.0

    async def ask(self, command: tuple[str | bytes | int | float, ...]) -> Any:
        """Send a command and return the reply.

        Raises ResponseError for an error of the server's, one of `LOST`, and NotTakenError.
        """
        if self._connection is None or not self._connection.is_connected:
            await self._open()
        connection: Any = self._connection
        packed = _pack(command)
        if len(packed) > MAX_COMMAND_BYTES or len(self._waiting) >= MAX_WAITING:
            raise NotTakenError
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(reply)
        try:
            async with asyncio.timeout(self._timeout_s):
                await connection.send_packed_command(packed, check_health=False)
                return await reply
        except TimeoutError:
            await connection.disconnect(nowait=True)  # the others have waited as long, or will
            raise RedisTimeoutError("timeout waiting for the queue") from None
        finally:
            reply.cancel()  # whatever comes now, nobody waits for it

    async def close(self) -> None:
        """End the connection."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        async with self._opening:
            if self._connection is not None and self._connection.is_connected:
                return
            if loop.time() < self._rests_until_s:
                raise RedisConnectionError("the line to the queue is broken")
            await self.close()
            connection = self._client.connection_pool.make_connection()
            try:
                async with asyncio.timeout(self._timeout_s):
                    await connection.connect()
            except BaseException as error:
                self._rests_until_s = loop.time() + REST_S
                if isinstance(error, TimeoutError):
                    raise RedisTimeoutError("timeout connecting to the queue") from None
                raise
            self._connection, self._waiting = connection, deque()
            self._reader = loop.create_task(self._read(connection, self._waiting))

    async def _read(self, connection: Any, waiting: deque[asyncio.Future[Any]]) -> None:
        """Hand replies to those who wait for them, until the connection is lost."""
        try:
            while True:
                error = reply = None
                try:
                    reply = await connection.read_response(disconnect_on_error=False)
                except ResponseError as refused:
                    error = refused
                future = waiting.popleft()
                if future.done():  # whoever asked has been cancelled
                    continue
                if error is None:
                    future.set_result(reply)
                else:
                    future.set_exception(error)
        except Exception as error:  # noqa: BLE001  the loop's edge: whoever waits is told below
            logger.debug("the line to the queue was lost: %r", error)
        finally:
            await connection.disconnect(nowait=True)
            for future in waiting:
                if not future.done():
                    future.set_exception(RedisConnectionError("the line to the queue was lost"))

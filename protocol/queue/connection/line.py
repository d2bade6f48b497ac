"""A connection on which commands are sent as they come, whether those before have been answered or not.

redis-py lends every command a connection of its own, under locks and timeouts, and reads replies in a task: 60 µs of
CPU, where the command itself takes 15. Scripts are most of what services ask of the queue, are short, and may run
twice; so they share one line, and whatever goes wrong on it is left to redis-py, which connects and tries again.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import hiredis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from protocol.queue.connection.redis_client import NOTHING, Client, as_raised

_pack: Callable[[tuple[str | bytes | int | float, ...]], bytes] = getattr(hiredis, "pack_command")  # noqa: B009  untyped
"""Redis-py's own is in Python, and takes ten times as long."""

MAX_COMMAND_BYTES = 1 << 16
"""Largest command that the line takes: a larger one would keep those behind it waiting."""

MAX_WAITING = 256
"""Most commands without a reply. With them the line holds 16 MB at most."""

REST_S = 1.0
"""Time after a failure to connect in which it is not tried again."""

_LOST = "the connection to the queue was lost"

_Push: type = getattr(hiredis, "PushNotification")  # noqa: B009  untyped

LOST = (RedisConnectionError, RedisTimeoutError, OSError)
"""What `Line.ask` raises when the reply cannot be had; the command may have been carried out."""


class NotTakenError(Exception):
    """The command is too large for the line, or too many wait there already: it is for a connection of its own."""


class _Talk(asyncio.Protocol):
    """One open connection: hands replies to those who wait for them, in the order of their commands."""

    def __init__(self, timeout_s: float | None) -> None:
        self.is_over = False
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._writer: asyncio.StreamWriter
        self._transport: asyncio.WriteTransport
        self._replies: Any  # `hiredis.Reader`, which is untyped
        self._waiting: deque[tuple[asyncio.Future[Any], float]] = deque()  # with the time until which each may wait
        self._unsent: list[tuple[bytes, asyncio.Future[Any]]] = []  # commands of this turn of the loop
        self._timer: asyncio.TimerHandle | None = None  # one for all that wait: each of its own would cost more

    def begin(self, connection: Any) -> None:
        """Talk on what was the connection of redis-py's."""
        self._writer, self._replies = connection.give_away(self)
        self._transport = self._writer.transport

    def ask(self, command: tuple[str | bytes | int | float, ...]) -> asyncio.Future[Any]:
        """Send a command. See `Line.ask`."""
        for word in command:
            if type(word) is bytes and len(word) > MAX_COMMAND_BYTES:  # packing it would copy it
                raise NotTakenError
        packed = _pack(command)
        if len(packed) > MAX_COMMAND_BYTES or len(self._waiting) + len(self._unsent) >= MAX_WAITING:
            raise NotTakenError
        if self.is_over or self._transport.is_closing():
            raise RedisConnectionError(_LOST)
        reply: asyncio.Future[Any] = self._loop.create_future()
        if not self._unsent:
            self._loop.call_soon(self.send)
        self._unsent.append((packed, reply))
        return reply

    def send(self) -> None:
        """Send what was asked in this turn of the loop. A write for each command wakes the server for each.

        The time for a reply counts from here: this process may have stood still since the command was asked.
        """
        if not self._unsent:
            return
        unsent, self._unsent = self._unsent, []
        until_s = math.inf if self._timeout_s is None else self._loop.time() + self._timeout_s
        self._waiting.extend((reply, until_s) for _, reply in unsent)
        if self._timer is None and self._timeout_s is not None:
            self._timer = self._loop.call_at(until_s, self._look)
        self._transport.writelines([packed for packed, _ in unsent])

    def data_received(self, data: bytes) -> None:
        """Take what the server has sent."""
        self._replies.feed(data)
        while not self.is_over:
            reply = self._replies.gets()
            if reply is NOTHING:
                break
            if isinstance(reply, _Push):  # it answers nothing
                continue
            error = as_raised(reply) if isinstance(reply, Exception) else None
            if isinstance(error, RedisConnectionError):
                self.end(error)
                break
            future, _ = self._waiting.popleft()
            if future.done():  # its caller was cancelled
                continue
            if error is None:
                future.set_result(reply)
            else:
                future.set_exception(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail all waiting callers."""
        self.end(RedisConnectionError(_LOST))

    def end(self, error: Exception) -> None:
        """Close the connection; waiting callers get the reason."""
        self.is_over = True
        self._transport.abort()
        if self._timer is not None:
            self._timer.cancel()
        failed = [*(reply for reply, _ in self._waiting), *(reply for _, reply in self._unsent)]
        self._waiting.clear()
        self._unsent.clear()
        for reply in failed:
            if not reply.done():
                reply.set_exception(error)

    def _look(self) -> None:
        """Give up a server that has not answered in time: those who asked later have waited as long, or will."""
        self._timer = None
        if not self._waiting:
            return
        _, until_s = self._waiting[0]
        if until_s <= self._loop.time():
            self.end(RedisTimeoutError("timeout waiting for the queue"))
        else:
            self._timer = self._loop.call_at(until_s, self._look)


def _fail_late(reply: asyncio.Future[Any], rounds: int = 2) -> None:
    """Fail a reply that has not come, once the loop has read what waits in the socket: not at once, as timers do."""
    if reply.done():
        return
    if rounds:
        reply.get_loop().call_soon(_fail_late, reply, rounds - 1)
    else:
        reply.set_exception(TimeoutError())


class Line:
    """One connection to the queue's server, opened when it is first needed, and again after it was lost."""

    def __init__(self, client: Client, timeout_s: float | None) -> None:
        """`client`: connects, without a timeout of its own; `timeout_s`: most time until a reply; None: any."""
        self._client = client
        self._timeout_s = timeout_s
        self._talk: _Talk | None = None
        self._opening = asyncio.Lock()
        self._rests_until_s = 0.0

    async def ask(self, command: tuple[str | bytes | int | float, ...], within_s: float | None = None) -> Any:
        """Send a command and return the reply.

        Raises ResponseError for an error of the server's, one of `LOST`, NotTakenError, and TimeoutError when no reply
        has come within `within_s`. One that has come while this process did not run is there in time.
        """
        talk = self._talk
        if talk is None or talk.is_over:
            async with asyncio.timeout(within_s):
                talk = await self._open()
        reply = talk.ask(command)
        if within_s is None:
            return await reply
        talk.send()  # such reads have lines of their own, where nothing else is asked meanwhile
        late = asyncio.get_running_loop().call_later(within_s, _fail_late, reply)
        try:
            return await reply
        finally:
            late.cancel()

    async def close(self) -> None:
        """End the connection."""
        if self._talk is not None:
            self._talk.end(RedisConnectionError(_LOST))

    async def _open(self) -> _Talk:
        async with self._opening:
            if self._talk is not None and not self._talk.is_over:
                return self._talk
            if asyncio.get_running_loop().time() < self._rests_until_s:
                raise RedisConnectionError("the connection to the queue is broken")
            connection = self._client.connection_pool.make_connection()
            try:
                async with asyncio.timeout(self._timeout_s):
                    await connection.connect()
            except BaseException as error:
                self._rests_until_s = asyncio.get_running_loop().time() + REST_S
                if isinstance(error, TimeoutError):
                    raise RedisTimeoutError("timeout connecting to the queue") from None
                raise
            self._talk = _Talk(self._timeout_s)
            self._talk.begin(connection)
            return self._talk

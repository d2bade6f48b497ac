"""A pipelined connection: commands are sent without waiting for the replies to earlier ones.

redis-py gives every command its own connection, under locks and timeouts, and reads replies in a task. That takes 60 µs
of CPU, where the command itself takes 15. Most of a service's commands are scripts, which are short and safe to repeat.
So they share one line; after any failure of the line, redis-py reconnects and tries again.
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
"""redis-py's own function is in Python and takes ten times as long."""

MAX_COMMAND_BYTES = 1 << 16
"""Maximum bytes of a command on the line: a larger one would delay those behind it."""

MAX_WAITING = 256
"""Maximum number of commands without a reply; the line then holds at most 16 MB."""

REST_S = 1.0
"""Seconds after a failed connection attempt before the next one."""

_LOST = "the connection to the queue was lost"

_Push: type = getattr(hiredis, "PushNotification")  # noqa: B009  untyped

LOST = (RedisConnectionError, RedisTimeoutError, OSError)
"""Raised by `Line.ask` if the reply is lost; the command may have been executed."""


class NotTakenError(Exception):
    """The command is too large for the line, or too many commands wait there: it needs its own connection."""


class _Talk(asyncio.Protocol):
    """One open connection, which passes replies to the waiting callers in the order of their commands."""

    def __init__(self, timeout_s: float | None) -> None:
        self.is_over = False
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._writer: asyncio.StreamWriter
        self._transport: asyncio.WriteTransport
        self._replies: Any  # `hiredis.Reader`, which is untyped
        self._waiting: deque[tuple[asyncio.Future[Any], float]] = deque()  # with the time at which each times out
        self._unsent: list[tuple[bytes, asyncio.Future[Any]]] = []  # commands of this iteration of the event loop
        self._timer: asyncio.TimerHandle | None = None  # one timer for all replies: a timer for each would cost more

    def begin(self, connection: Any) -> None:
        """Take over the socket of a redis-py connection."""
        self._writer, self._replies = connection.give_away(self)
        self._transport = self._writer.transport

    def ask(self, command: tuple[str | bytes | int | float, ...]) -> asyncio.Future[Any]:
        """Queue a command for sending and return its future reply. See `Line.ask`."""
        for word in command:
            if type(word) is bytes and len(word) > MAX_COMMAND_BYTES:  # packing would copy it
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
        """Send the commands of this iteration of the event loop together: each write would wake the server.

        A reply's timeout begins here: this process may have been stopped since the command was queued.
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
        """Parse received bytes and resolve the futures of complete replies."""
        self._replies.feed(data)
        while not self.is_over:
            reply = self._replies.gets()
            if reply is NOTHING:
                break
            if isinstance(reply, _Push):  # a push message is not a reply
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
        """Close the connection and fail waiting callers with `error`."""
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
        """Give up a server that has not replied in time: later commands have waited as long, or will."""
        self._timer = None
        if not self._waiting:
            return
        _, until_s = self._waiting[0]
        if until_s <= self._loop.time():
            self.end(RedisTimeoutError("timeout waiting for the queue"))
        else:
            self._timer = self._loop.call_at(until_s, self._look)


def _fail_late(reply: asyncio.Future[Any], rounds: int = 2) -> None:
    """Fail a late reply, but only after the loop has read the socket: timers run before that."""
    if reply.done():
        return
    if rounds:
        reply.get_loop().call_soon(_fail_late, reply, rounds - 1)
    else:
        reply.set_exception(TimeoutError())


class Line:
    """One connection to the queue's server, opened when it is first needed and again after a loss."""

    def __init__(self, client: Client, timeout_s: float | None) -> None:
        """client: makes connections without a timeout. timeout_s: maximum seconds for a reply; None: no limit."""
        self._client = client
        self._timeout_s = timeout_s
        self._talk: _Talk | None = None
        self._opening = asyncio.Lock()
        self._rests_until_s = 0.0
        self._is_closed = False

    async def ask(self, command: tuple[str | bytes | int | float, ...], within_s: float | None = None) -> Any:
        """Send a command and return the reply.

        Raises ResponseError for an error reply, one of `LOST`, NotTakenError, or TimeoutError if no reply has come
        within `within_s`. A reply that has arrived while this process was stopped counts as in time.
        """
        talk = self._talk
        if talk is None or talk.is_over:
            async with asyncio.timeout(within_s):
                talk = await self._open()
        reply = talk.ask(command)
        if within_s is None:
            return await reply
        talk.send()  # such reads have their own lines, with no other command in this iteration
        late = asyncio.get_running_loop().call_later(within_s, _fail_late, reply)
        try:
            return await reply
        finally:
            late.cancel()

    async def close(self) -> None:
        """Close the connection, also one that is being opened. Later commands raise a connection error."""
        self._is_closed = True
        if self._talk is not None:
            self._talk.end(RedisConnectionError(_LOST))

    async def _open(self) -> _Talk:
        async with self._opening:
            if self._talk is not None and not self._talk.is_over:
                return self._talk
            if self._is_closed:
                raise RedisConnectionError(_LOST)
            if asyncio.get_running_loop().time() < self._rests_until_s:
                raise RedisConnectionError("the connection to the queue is broken")
            connection = self._client.connection_pool.make_connection()
            try:
                async with asyncio.timeout(self._timeout_s):
                    await connection.connect()
            except BaseException as error:
                await connection.disconnect(nowait=True)
                self._rests_until_s = asyncio.get_running_loop().time() + REST_S
                if isinstance(error, TimeoutError):
                    raise RedisTimeoutError("timeout connecting to the queue") from None
                raise
            if self._is_closed:  # meanwhile
                await connection.disconnect(nowait=True)
                raise RedisConnectionError(_LOST)
            self._talk = _Talk(self._timeout_s)
            self._talk.begin(connection)
            return self._talk

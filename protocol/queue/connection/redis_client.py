"""Connections to Redis that can be cancelled, and the errors of a lost connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Final, TypeAlias, cast
from urllib.parse import urlsplit

import hiredis
import redis
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, NoScriptError, OutOfMemoryError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry as SyncRetry

from protocol.queue.connection import failover
from protocol.runtime.guarded import QUEUE_AWAY
from protocol.wire.clock import CLOCK
from protocol.wire.errors import BadRequest

Client: TypeAlias = Any
"""An asynchronous client. redis-py types every reply as a union over its two protocols and two client kinds."""

MemoryFull = OutOfMemoryError
"""The error of a write while the server's memory is full (`maxmemory`); `lua/vital.lua` runs writes that it still
accepts.
"""


class DiskFull(ResponseError):
    """The server cannot write to its disk, and refuses all writes until it can."""


CONNECTION_ERRORS = (
    RedisConnectionError, RedisTimeoutError, ConnectionError, OSError, NoScriptError, MemoryFull, DiskFull,
)  # fmt: skip
"""The errors of a lost connection, or of a server without space; loops catch them, wait and continue. A script is
missing if the server was restarted after the script was loaded and before it was run.
"""

QUEUE_AWAY.update(CONNECTION_ERRORS)

QueueError = RedisError
"""Any error of the queue's server or of the connection to it."""

UNFIT = ("READONLY", "NOREPLICAS", "MASTERDOWN", "UNBLOCKED", "BUSY ")
"""The first words of errors from a server that cannot serve now. It is a replica, an old primary after a failover, a
primary without contact to its replicas (`min-replicas-to-write`), or it was stopped while it ran a script.
"""

NOTHING: Final = object()
"""Returned by the reply parser while no reply is complete."""

_DRIVER = redis.DriverInfo()
"""The library's name that connections report; redis-py would look it up among the installed packages for each
connection.
"""

SENT_BYTES = 1 << 16
"""Bytes of a large command that are sent at once."""

CONNECT_TIMEOUT_S = 5
MAX_CONNECTIONS = 32
"""Maximum number of connections of one client; further commands wait for one."""


class _Cancellable:
    """A connection that sends under `asyncio.timeout`.

    redis-py sends under `asyncio.wait_for`. Before Python 3.12, that swallows a cancellation that arrives while the
    send completes (20 % of those during an XADD, 2026-11-25), so that a cancelled task continues forever. It also
    starts a task per command.
    """

    socket_timeout: float | None
    _writer: asyncio.StreamWriter | None
    _reader: asyncio.StreamReader | None

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Send a command. Raises a connection error, as redis-py does with asyncio's own loop.

        With uvloop, writing to a closed transport raises RuntimeError instead.
        """
        if self._writer is not None and self._writer.is_closing():
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise RedisConnectionError("the connection to the queue was closed")
        limit_s = self.socket_timeout
        if limit_s is None:
            await self._send_slices(command, check_health)
            return
        self.socket_timeout = None  # without a timeout, redis-py does not use wait_for
        try:
            async with asyncio.timeout(limit_s):
                await self._send_slices(command, check_health)
        except TimeoutError:
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise RedisTimeoutError("timeout writing to the queue") from None
        finally:
            self.socket_timeout = limit_s

    async def _send_slices(self, command: Any, check_health: bool) -> None:
        """Send a command, a large one in slices: other tasks run between them, and nothing is copied as a whole."""
        first, *others = _slices(command)
        await super().send_packed_command(first, check_health)  # type: ignore[misc]
        writer = self._writer
        try:
            for some in others:
                await asyncio.sleep(0)
                if writer is None or self._writer is not writer:  # never continue a command on a new connection
                    raise RedisConnectionError("the connection to the queue was closed")
                writer.writelines(some)
                await writer.drain()
        except BaseException as error:
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            if isinstance(error, (OSError, RuntimeError)):
                raise RedisConnectionError(f"the connection to the queue was lost: {error}") from error
            raise

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """Read a reply. Raises a connection error for an `UNFIT` server, and DiskFull.

        After a connection error the caller reconnects, and then finds a server that can serve.
        """
        try:
            return await super().read_response(*args, **options)  # type: ignore[misc]
        except ResponseError as error:
            raised = as_raised(error)
            if isinstance(raised, RedisConnectionError):
                await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise raised from None

    def give_away(self, protocol: asyncio.Protocol) -> tuple[asyncio.StreamWriter, Any]:
        """Hand this open connection to `protocol`, which receives all further bytes.

        Returns the writer, which closes the connection when it is dropped, and a `hiredis.Reader` for replies, whose
        `gets` returns `NOTHING` while no reply is complete.
        """
        writer = self._writer
        assert writer is not None
        writer.transport.set_protocol(protocol)
        self._writer = self._reader = None
        parser: Any = getattr(self, "_parser")  # noqa: B009  untyped
        reader = hiredis.Reader(protocolError=InvalidResponse, replyError=parser.parse_error, notEnoughData=NOTHING)
        return writer, reader


def _slices(command: Any) -> list[Any]:
    """Return a packed command, bytes or a list of them, in slices of about `SENT_BYTES`; unchanged if short."""
    parts: list[bytes] = [command] if isinstance(command, bytes) else command
    if isinstance(command, str) or sum(map(len, parts)) <= SENT_BYTES:
        return [command]
    slices, some, num_bytes = list[Any](), list[memoryview](), 0
    for part in parts:
        for at in range(0, len(part), SENT_BYTES):
            some.append(memoryview(part)[at : at + SENT_BYTES])
            num_bytes += len(some[-1])
            if num_bytes >= SENT_BYTES:
                slices.append(some)
                some, num_bytes = [], 0
    return [*slices, some] if some else slices


def as_raised(error: Exception) -> Exception:
    """Return the exception to raise for an error reply of the server."""
    text = str(error)
    if text.startswith("MISCONF"):
        return DiskFull(text)
    if text.startswith(UNFIT) or isinstance(error, ReadOnlyError):
        return RedisConnectionError(f"the queue's server cannot serve now: {error}")
    return error


class _Timed:
    """A connection that asks the server for the time and sets this process's clock."""

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        """Authenticate, then ask the server for the time."""
        await super().on_connect_check_health(check_health)  # type: ignore[misc]
        asked_at_ns = time.monotonic_ns()
        await self.send_command("TIME", check_health=False)  # type: ignore[attr-defined]
        time_reply = cast(Any, await self.read_response(disable_decoding=True))  # type: ignore[attr-defined]
        seconds, micros = int(time_reply[0]), int(time_reply[1])
        CLOCK.learn(seconds * 10**9 + micros * 1000, asked_at_ns, time.monotonic_ns())


def connect(url: str, *, timeout_s: float | None, timed: bool = False) -> Client:
    """Return a client. timeout_s: limit of every read and write, with retries; None: for blocking reads.

    timed: the server is the fleet's queue, whose time becomes this process's time; a Sentinel has no such command.
    Raises BadRequest for an invalid URL, without showing it, as it may contain a password.
    """
    try:
        return _connect(url, timeout_s, timed=timed)
    except ValueError as error:
        raise BadRequest(
            "redis_url is not a queue URL: it must be redis://, rediss://, unix://PATH, or"
            " redis-sentinel://HOST:PORT,HOST:PORT/NAME/DB, with a port and a database that are numbers"
        ) from error


def _connect(url: str, timeout_s: float | None, *, timed: bool) -> Client:
    retries = 4 if timeout_s is not None else 0
    sentinels = None
    if urlsplit(url).scheme in failover.SCHEMES:
        sentinels, url = failover.split(url)
    # redis-py's default pool refuses the 101st concurrent command; this one makes it wait.
    pool_type: Any = aioredis.BlockingConnectionPool
    pool = pool_type.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=20,
        socket_timeout=timeout_s,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.02), retries),
        driver_info=_DRIVER,
    )
    kinds = (_Timed, _Cancellable) if timed else (_Cancellable,)
    pool.connection_class = type("CancellableConnection", (*kinds, pool.connection_class), {})
    if sentinels is not None:
        pool.connection_class = failover.found_by(sentinels, pool.connection_class)
    return aioredis.Redis.from_pool(pool)


async def read_many(client: Client, keys: Sequence[str]) -> list[bytes | None]:
    """Return the values of keys, None for each missing one."""
    return list(await client.mget(keys)) if keys else []


def ping(url: str, timeout_s: float) -> None:
    """Ping the server at `url` once, blocking until it replies.

    Raises ValueError for an invalid URL, and `QueueError` if the server cannot be reached or is still loading its data.
    """
    if urlsplit(url).scheme in failover.SCHEMES:
        asyncio.run(_ping_primary(url, timeout_s))
        return
    client_type: Any = redis.Redis
    client = client_type.from_url(
        url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=SyncRetry(NoBackoff(), 0)
    )
    with client:
        client.ping()


async def _ping_primary(url: str, timeout_s: float) -> None:
    client = connect(url, timeout_s=timeout_s)
    try:
        await client.ping()
    finally:
        await client.aclose()

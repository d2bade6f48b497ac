"""Connections to Redis that can be cancelled, and what a lost one looks like."""

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
"""An asynchronous client. redis-py types every reply as a union for its two protocols and two client kinds."""

MemoryFull = OutOfMemoryError
"""What the server answers to a write while its memory is full (`maxmemory`); see `lua/vital.lua` for those it takes."""


class DiskFull(ResponseError):
    """The server cannot write to its disk, and therefore takes no writes until it can."""


CONNECTION_ERRORS = (
    RedisConnectionError, RedisTimeoutError, ConnectionError, OSError, NoScriptError, MemoryFull, DiskFull,
)  # fmt: skip
"""What a lost connection looks like, and a server without room; loops catch it, wait and go on. A missing script comes
from a server that was restarted after the script was loaded and before it was run."""

QUEUE_AWAY.update(CONNECTION_ERRORS)

QueueError = RedisError
"""Whatever the queue's server or the connection to it can raise."""

UNFIT = ("READONLY", "NOREPLICAS", "MASTERDOWN", "UNBLOCKED", "BUSY ")
"""How errors of a server begin that cannot serve now: a replica, an old primary that a failover has left behind, a
primary that does not hear its replicas (`min-replicas-to-write`), or one that was stopped while it ran a script."""

NOTHING: Final = object()
"""What a parser of replies returns while none is whole."""

_DRIVER = redis.DriverInfo()
"""What connections say of their library: redis-py looks it up among the installed packages, for each one anew."""

SENT_BYTES = 1 << 16
"""Bytes of a large command that are sent at once."""

CONNECT_TIMEOUT_S = 5
MAX_CONNECTIONS = 32
"""Connections of one client; further commands wait for one."""


class _Cancellable:
    """A connection that sends under `asyncio.timeout`.

    redis-py sends under `asyncio.wait_for`. Before Python 3.12 that swallows a cancellation that comes while the send
    completes (20 % of those that met an XADD, 2026-11-25), so that a cancelled task goes on for ever; and it starts
    a task per command.
    """

    socket_timeout: float | None
    _writer: asyncio.StreamWriter | None
    _reader: asyncio.StreamReader | None

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Send a command. Raises a connection error, as redis-py does where the loop is asyncio's.

        A transport of uvloop raises RuntimeError when it is written to after it has closed.
        """
        if self._writer is not None and self._writer.is_closing():
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise RedisConnectionError("the connection to the queue was closed")
        limit_s = self.socket_timeout
        if limit_s is None:
            await self._send_slices(command, check_health)
            return
        self.socket_timeout = None  # without a timeout there is no wait_for
        try:
            async with asyncio.timeout(limit_s):
                await self._send_slices(command, check_health)
        except TimeoutError:
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise RedisTimeoutError("timeout writing to the queue") from None
        finally:
            self.socket_timeout = limit_s

    async def _send_slices(self, command: Any, check_health: bool) -> None:
        """Send a command, a large one in slices: others have their turn between two, and none is copied as a whole."""
        first, *others = _slices(command)
        await super().send_packed_command(first, check_health)  # type: ignore[misc]
        writer = self._writer
        try:
            for some in others:
                await asyncio.sleep(0)
                if writer is None or self._writer is not writer:  # nowhere else may a command begin with its middle
                    raise RedisConnectionError("the connection to the queue was closed")
                writer.writelines(some)
                await writer.drain()
        except BaseException as error:
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            if isinstance(error, (OSError, RuntimeError)):
                raise RedisConnectionError(f"the connection to the queue was lost: {error}") from error
            raise

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """Read a reply. Raises a connection error for those of a server that is `UNFIT`.

        The caller reconnects, and then finds one that is not. Raises DiskFull.
        """
        try:
            return await super().read_response(*args, **options)  # type: ignore[misc]
        except ResponseError as error:
            raised = as_raised(error)
            if isinstance(raised, RedisConnectionError):
                await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise raised from None

    def give_away(self, protocol: asyncio.Protocol) -> tuple[asyncio.StreamWriter, Any]:
        """Leave an open connection to `protocol`, which gets all that comes from now on.

        Returns its writer, which closes it when it is dropped, and what parses replies, a `hiredis.Reader`: `gets`
        returns `NOTHING` while none is whole.
        """
        writer = self._writer
        assert writer is not None
        writer.transport.set_protocol(protocol)
        self._writer = self._reader = None
        parser: Any = getattr(self, "_parser")  # noqa: B009  untyped
        reader = hiredis.Reader(protocolError=InvalidResponse, replyError=parser.parse_error, notEnoughData=NOTHING)
        return writer, reader


def _slices(command: Any) -> list[Any]:
    """Return a packed command, bytes or a list of them, in parts of about `SENT_BYTES`: the command itself if short."""
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
    """Return what is raised for an error that the server has answered with."""
    text = str(error)
    if text.startswith("MISCONF"):
        return DiskFull(text)
    if text.startswith(UNFIT) or isinstance(error, ReadOnlyError):
        return RedisConnectionError(f"the queue's server cannot serve now: {error}")
    return error


class _Timed:
    """A connection to a server that is asked for the time: it sets this process's clock."""

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        """Enter, and ask the server for the time."""
        await super().on_connect_check_health(check_health)  # type: ignore[misc]
        asked_at_ns = time.monotonic_ns()
        await self.send_command("TIME", check_health=False)  # type: ignore[attr-defined]
        time_reply = cast(Any, await self.read_response(disable_decoding=True))  # type: ignore[attr-defined]
        seconds, micros = int(time_reply[0]), int(time_reply[1])
        CLOCK.learn(seconds * 10**9 + micros * 1000, asked_at_ns, time.monotonic_ns())


def connect(url: str, *, timeout_s: float | None, timed: bool = False) -> Client:
    """Return a client. `timeout_s` limits every read and write, with retries; None: blocking reads may take long.

    timed: the server is the fleet's queue, whose time is this process's; a Sentinel could not tell any. Raises
    BadRequest for what is no URL of a queue, without showing it, as it may hold a password.
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
    # redis-py's default pool refuses the 101st command at a time; this one lets it wait its turn.
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
    """Return the values of keys, None for each that is not there."""
    return list(await client.mget(keys)) if keys else []


def ping(url: str, timeout_s: float) -> None:
    """Ask the server at `url` once whether it answers, and block until it does.

    Raises ValueError for what is no URL, and `QueueError` when the server cannot be reached or still loads its file.
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

"""uvicorn's server, without its signal handling, and accepting many connections per iteration of the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import uvicorn

from gateway.http.addresses import origin_of
from gateway.http.errors import OPENAI_ERRORS, ErrorShape, ShapeOf
from gateway.overload.memory import MemoryAccount, address_holder
from gateway.server.connection import Connection, ConnectionLimits, Parts
from protocol.metrics.series import HTTP_DROPPED

logger = logging.getLogger(__name__)

BACKLOG = 2048
ACCEPTS_PER_TURN = 256
MAX_FILES = 1 << 16
RESERVED_FILES = 512
"""File descriptors not available to clients: they are for other uses, mainly connections to the queue."""

OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


def _openai(_: object) -> ErrorShape:
    return OPENAI_ERRORS


class HttpServer(uvicorn.Server):
    """Serves the listening sockets passed to `serve`.

    uvloop's own servers accept one connection per iteration of the loop (libuv 1.45 and later). In a gateway that
    streams tokens to 800 clients an iteration takes 20 ms, so the last of 800 new connections would wait for 15 s.
    """

    def __init__(
        self, config: uvicorn.Config, max_connections: int = MAX_FILES, rest_s: float = 1.0, *,
        max_per_address: int = 0, limits: ConnectionLimits | None = None,
        shape_of: ShapeOf = _openai, origin_of: Callable[[Any], str] = origin_of,
        memory: MemoryAccount | None = None,
    ) -> None:  # fmt: skip
        """Store the limits. rest_s: seconds without accepting after a failure to accept; shape_of: see `Connection`.

        max_per_address: maximum connections per address, 0 for no limit. origin_of: maps a socket's address to the one
        that is counted. memory: account that is charged for connections' buffers; None: no limit.
        """
        super().__init__(config)
        self._max_connections = max_connections
        self._max_per_address = max_per_address
        self._origin_of = origin_of
        self._num_of: Counter[str] = Counter()
        self._rest_s = rest_s
        self._memory = memory or MemoryAccount(1 << 62)
        self._connection = partial(Connection, limits=limits or ConnectionLimits(), shape_of=shape_of, parts=Parts())
        self._listeners: tuple[socket.socket, ...] = ()
        self._opening: set[asyncio.Task[None]] = set()
        self._ending = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do not handle signals; `protocol.runtime.service` does."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        await self.lifespan.startup()
        self.servers = []
        self._listeners = tuple(sockets or ())
        self._protocol = partial(
            self._connection, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        for listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)
        self.started = True

    async def main_loop(self) -> None:
        """Run `on_tick` once a second until `end`, which takes effect at once."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._ending.wait()

    def end(self) -> None:
        """Make `serve` return once all answers have ended."""
        self.should_exit = True
        self._ending.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, close the listeners, and wait for answers to end."""
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)
        self._listeners = ()
        if self._opening:
            await asyncio.wait(self._opening)
        for listener in sockets or []:
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        for _ in range(2):  # iterations in which idle connections close; uvicorn would wait 100 ms
            await asyncio.sleep(0)
        if self.server_state.connections or self.server_state.tasks:
            await super().shutdown()

    def _accept(self, listener: socket.socket) -> None:
        """Accept pending connections, limited in number so that the iteration stays short."""
        loop = asyncio.get_running_loop()
        for _ in range(ACCEPTS_PER_TURN):
            if len(self.server_state.connections) + len(self._opening) >= self._max_connections:
                self._rest(listener, f"there are {self._max_connections}")
                return
            try:
                connection, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in OUT_OF_RESOURCES:
                    raise
                self._rest(listener, error)
                return
            origin = self._origin_of(address)
            if self._max_per_address and self._num_of[origin] >= self._max_per_address and origin:
                HTTP_DROPPED.labels("connections_of_address").inc()
                connection.close()
                continue
            self._num_of[origin] += 1
            connection.setblocking(False)
            task = loop.create_task(self._open(connection, origin))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    def _rest(self, listener: socket.socket, why: object) -> None:
        """Stop accepting for `rest_s`; new connections wait in the system's queue."""
        logger.error("no connections are accepted for %g s: %s", self._rest_s, why)
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)
        loop.call_later(self._rest_s, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    async def _open(self, connection: socket.socket, origin: str) -> None:
        charge = self._memory.open(address_holder(origin))
        is_counted = True

        def lost() -> None:
            """Stop counting the connection; idempotent, because an opened connection that fails also calls it."""
            nonlocal is_counted
            if is_counted:
                is_counted = False
                self._lost(origin)

        protocol = partial(self._protocol, on_lost=lost, charge=charge)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(protocol, connection)
        except BaseException as error:
            connection.close()
            charge.close()
            lost()
            if not isinstance(error, OSError):
                raise
            logger.debug("a connection could not be opened: %s", error)  # the client has already left

    def _lost(self, origin: str) -> None:
        self._num_of[origin] -= 1
        if not self._num_of[origin]:
            del self._num_of[origin]

    async def on_tick(self, counter: int) -> bool:
        """Close connections of clients that take too long; return whether to end."""
        now_s = asyncio.get_running_loop().time()
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.sweep(now_s)
        return await super().on_tick(counter)


def allow_connections() -> int:
    """Raise this process's limit of open files to the maximum; return how many client connections that allows.

    Shells often set a limit of 1,024, for programs that use `select`.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_files = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, hard))
    return max(num_files - RESERVED_FILES, num_files // 2)

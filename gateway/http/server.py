"""uvicorn's server, with the signals left to `protocol.runtime.service` and connections taken as fast as they come."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import uvicorn

logger = logging.getLogger(__name__)

BACKLOG = 2048
ACCEPTS_PER_TURN = 256
MAX_FILES = 1 << 16
RESERVED_FILES = 512
"""Open files that clients may not take: they are for other uses, above all connections to the queue."""

OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class HttpServer(uvicorn.Server):
    """Serves the listening sockets that `serve` is given.

    uvloop's own servers take one connection in each turn of the loop (libuv 1.45 and later). In a gateway that brings
    800 streams their tokens a turn takes 20 ms, so that of 800 new connections the last would wait for 15 s.
    """

    def __init__(self, config: uvicorn.Config, max_connections: int = MAX_FILES, rest_s: float = 1.0) -> None:
        """`rest_s`: pause in which no connection is taken after one could not be."""
        super().__init__(config)
        self._max_connections = max_connections
        self._rest_s = rest_s
        self._listeners: tuple[socket.socket, ...] = ()
        self._opening: set[asyncio.Task[None]] = set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept."""
        await self.lifespan.startup()
        self.servers = []
        self._listeners = tuple(sockets or ())
        protocol: Any = self.config.http_protocol_class
        self._protocol = partial(
            protocol, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        for listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, close the listeners, let answers end."""
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)
        self._listeners = ()
        if self._opening:
            await asyncio.wait(self._opening)
        await super().shutdown(sockets)

    def _accept(self, listener: socket.socket) -> None:
        """Take the connections that wait, but not so many that a turn of the loop becomes long."""
        loop = asyncio.get_running_loop()
        for _ in range(ACCEPTS_PER_TURN):
            if len(self.server_state.connections) + len(self._opening) >= self._max_connections:
                self._rest(listener, f"there are {self._max_connections}")
                return
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in OUT_OF_RESOURCES:
                    raise
                self._rest(listener, error)
                return
            connection.setblocking(False)
            task = loop.create_task(self._open(connection))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    def _rest(self, listener: socket.socket, why: object) -> None:
        """Leave new connections to the system's queue for a while."""
        logger.error("no connection can be taken for %g s: %s", self._rest_s, why)
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)
        loop.call_later(self._rest_s, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    async def _open(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)
        except OSError as error:  # The client has left already.
            logger.debug("a connection could not be opened: %s", error)
            connection.close()


def allow_connections() -> int:
    """Let this process open as many files as it may; return how many connections of clients that allows.

    Shells set a lower limit, often 1,024, for programs that use `select`.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_files = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, hard))
    return max(num_files - RESERVED_FILES, num_files // 2)

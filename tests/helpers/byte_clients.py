"""The gateway's server with a minimal app, and clients that send arbitrary bytes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
import uvloop

from gateway.app.shapes import shape_of
from gateway.server import server as http_server
from gateway.server.connection import CONNECTION, Connection, ConnectionLimits
from gateway.server.server import HttpServer

GET = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
LIMITS = ConnectionLimits(discarded_bytes=1 << 20)
LONG_S = 10_000.0


class App:
    """Reads a request, and answers with its body's size; on /wait only after `go`, on /stream without end."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.scopes: list[Any] = []
        self.ended = asyncio.Event()
        self.num_sent = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        try:
            await self._answer(scope, receive, send)
        finally:
            self.ended.set()

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            gone = asyncio.create_task(receive_disconnect(receive))
            while not gone.done():
                await send({"type": "http.response.body", "body": b"x" * 4096, "more_body": True})
                self.num_sent += 4096
                await asyncio.sleep(0)
            return
        if scope["path"] == "/parts":
            connection: Connection = scope[CONNECTION]
            assert not connection.takes_parts  # the response has not begun
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while connection.takes_parts:
                connection.write_part(b"x" * 4096)
                self.num_sent += 4096
                await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b"the end"})  # once its client has read enough
            assert not connection.takes_parts
            return
        if scope["path"] == "/silent":
            await receive_disconnect(receive)
            return
        if scope["path"] == "/refused":
            await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size, more = size + len(message["body"]), message["more_body"]
        if scope["path"] == "/wait":
            await self.go.wait()
        body = b"%d" % size
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})


async def receive_disconnect(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Running:
    """A server, its app, and its clients."""

    def __init__(self, server: HttpServer, app: App, port: int) -> None:
        self.server, self.app, self.port = server, app, port
        self.writers: list[asyncio.StreamWriter] = []

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        return reader, writer

    async def send(self, *parts: bytes) -> bytes:
        """Send bytes; return everything that the server sends until it closes the connection."""
        reader, writer = await self.connect()
        answer = asyncio.create_task(reader.read())
        for part in parts:
            writer.write(part)
            try:
                await writer.drain()
            except ConnectionError:
                break
        return await answer

    @property
    def connections(self) -> list[Connection]:
        return list(self.server.server_state.connections)  # type: ignore[arg-type]

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():  # noqa: ASYNC110  waits for turns of the loop, not for time
            await asyncio.sleep(0)

    def sweep(self) -> None:
        """Check for slow clients, as if LONG_S had passed."""
        for connection in self.connections:
            connection.sweep(asyncio.get_running_loop().time() + LONG_S)


@asynccontextmanager
async def running(limits: ConnectionLimits = LIMITS, **more: Any) -> AsyncIterator[Running]:
    app = App()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(http_server.BACKLOG)
        sock.setblocking(False)
        config = uvicorn.Config(app, http="httptools", lifespan="off", log_config=None)
        server = HttpServer(config, limits=limits, shape_of=shape_of, **more)
        task = asyncio.create_task(server.serve([sock]))
        run = Running(server, app, sock.getsockname()[1])
        await run.until(lambda: server.started)
        try:
            yield run
        finally:
            for writer in run.writers:
                writer.close()
            app.go.set()
            server.end()
            await task


def with_server(test: Callable[[Running], Awaitable[None]], **more: Any) -> None:
    async def main() -> None:
        async with running(**more) as run:
            await test(run)

    uvloop.run(main())

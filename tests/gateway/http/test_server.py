"""How the gateway accepts connections, on its own event loop."""

from __future__ import annotations

import asyncio
import errno
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import uvloop

from gateway.server import server as http_server
from gateway.server.server import HttpServer
from gateway.service import listen

NUM = 200
ROOT = Path(__file__).resolve().parents[3]
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


class Answered:
    """An ASGI app that counts its requests."""

    def __init__(self) -> None:
        self.num = 0
        self.all = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.num += 1
        if self.num == NUM:
            self.all.set()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})


class ShortOfFiles(socket.socket):
    """A listener that fails once, as in a process without free file descriptors."""

    num_refused = 0

    def accept(self) -> Any:
        if not self.num_refused:
            self.num_refused = 1
            raise OSError(errno.EMFILE, "too many open files")
        return super().accept()


@asynccontextmanager
async def serving(
    kind: Callable[[uvicorn.Config], uvicorn.Server],
    app: Answered,
    listener: type[socket.socket] = socket.socket,
) -> AsyncIterator[int]:
    with listener() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(http_server.BACKLOG)
        sock.setblocking(False)
        server = kind(uvicorn.Config(app, http="httptools", lifespan="off", log_config=None))
        task = asyncio.create_task(server.serve([sock]))
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0)
        yield sock.getsockname()[1]
        server.should_exit = True
        if isinstance(server, HttpServer):
            server.end()
        await task


async def turns_taken(kind: Callable[[uvicorn.Config], uvicorn.Server]) -> int:
    """Return how many turns of the loop it takes to answer NUM simultaneous clients."""
    loop, turns = asyncio.get_running_loop(), 0

    def turn() -> None:
        nonlocal turns
        turns += 1
        loop.call_soon(turn)

    app = Answered()
    async with serving(kind, app) as port:
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(NUM)]
        for client in clients:
            client.sendall(REQUEST)
        turn()
        await app.all.wait()
        taken = turns
        for client in clients:
            client.close()
    return taken


def test_many_connections_are_taken_in_few_turns_of_the_loop() -> None:
    """With uvicorn's server, each connection needs a turn, and turns are long in a gateway with many streams."""
    assert uvloop.run(turns_taken(uvicorn.Server)) >= NUM
    assert uvloop.run(turns_taken(HttpServer)) < NUM // 4


def test_a_server_without_file_descriptors_goes_on_when_there_are_some() -> None:
    async def ask() -> bytes:
        async with serving(partial(HttpServer, rest_s=0.01), Answered(), ShortOfFiles) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(REQUEST)
            answer = await reader.read()
            writer.close()
        return answer

    assert uvloop.run(ask()).startswith(b"HTTP/1.1 204")


def test_connections_are_limited_and_the_next_one_waits_for_its_turn(caplog: pytest.LogCaptureFixture) -> None:
    async def ask() -> bytes:
        async with serving(partial(HttpServer, max_connections=1, rest_s=0.01), Answered()) as port:
            _, first = await asyncio.open_connection("127.0.0.1", port)
            reader, second = await asyncio.open_connection("127.0.0.1", port)
            second.write(REQUEST)
            answer = asyncio.create_task(reader.read())
            while caplog.text.count("no connections are accepted") < 3:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert not answer.done()
            first.close()
            await answer
            second.close()
        return answer.result()

    assert uvloop.run(ask()).startswith(b"HTTP/1.1 204")


def test_a_process_may_have_more_connections_than_shells_allow() -> None:
    code = (
        "import resource as r; from gateway.server.server import allow_connections as allow;"
        "r.setrlimit(r.RLIMIT_NOFILE, (1024, 4096)); print(allow(), *r.getrlimit(r.RLIMIT_NOFILE))"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert told.split() == [str(4096 - http_server.RESERVED_FILES), "4096", "4096"]


def test_no_answer_waits_for_an_acknowledgement() -> None:
    """Also on asyncio's loop, which does not change the options of an accepted connection."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        listener.settimeout(30)
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


class FailingLoop(asyncio.SelectorEventLoop):
    """A loop in which each connection fails as soon as it is open."""

    failure: BaseException

    async def connect_accepted_socket(self, *args: Any, **options: Any) -> Any:
        transport, _ = await super().connect_accepted_socket(*args, **options)
        transport.abort()
        raise self.failure


@pytest.mark.parametrize("failure", [OSError("the client has left"), RuntimeError("a fault")])
def test_a_connection_that_fails_once_it_is_open_is_counted_once(failure: BaseException) -> None:
    async def open_one() -> None:
        server = HttpServer(uvicorn.Config(Answered(), http="httptools", lifespan="off", log_config=None))
        server._protocol = partial(server._connection, config=server.config, server_state=server.server_state,
                                   app_state={})  # fmt: skip
        server.config.load()
        server._num_of["here"] = 3
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        await asyncio.wait([asyncio.create_task(server._open(ours, "here"))])
        theirs.close()
        while server.server_state.connections:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0)
        assert server._num_of["here"] == 2

    loop = FailingLoop()
    loop.failure = failure
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(open_one())

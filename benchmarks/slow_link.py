"""A TCP relay that is as slow as a distant source: latency before every request, a rate for every answer."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

CHUNK_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Link:
    """What stands between a client and a port of this machine."""

    port: int
    latency_s: float
    bytes_per_s: float  # of one connection's answers

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay one connection until either side ends it."""
        try:
            upstream = await asyncio.open_connection("127.0.0.1", self.port)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._relay(reader, upstream[1], delay_s=self.latency_s))
                group.create_task(self._relay(upstream[0], writer, bytes_per_s=self.bytes_per_s))
        except* OSError:
            pass
        finally:
            writer.close()

    async def _relay(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, delay_s: float = 0, bytes_per_s: float = 0
    ) -> None:
        while chunk := await reader.read(CHUNK_BYTES):
            await asyncio.sleep(delay_s + (len(chunk) / bytes_per_s if bytes_per_s else 0))
            writer.write(chunk)
            await writer.drain()
        writer.close()


def free_port() -> int:
    """Return a port of this machine that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextmanager
def slow_link(link: Link) -> Iterator[int]:
    """Relay in a thread until the block is left; yields the port to connect to."""
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = Future()

    async def run() -> None:
        stop = asyncio.Event()
        async with await asyncio.start_server(link.serve, "127.0.0.1", 0) as server:
            started.set_result((asyncio.get_running_loop(), stop, server.sockets[0].getsockname()[1]))
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    loop, stop, port = started.result()
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()

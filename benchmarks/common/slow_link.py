"""A TCP relay that makes a server as slow as a remote one, by latency before requests and a rate limit on answers.

It stands for another machine, so it runs in its own process with the lowest CPU priority.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peft_adapters.format import FOLDER_HEADER
from protocol.runtime.environment import child_environment

CHUNK_BYTES = 256 << 10
HEAD_BYTES = 4 << 10
"""Bytes at the beginning of each piece of an answer that are searched for its header."""


@dataclass(frozen=True, slots=True)
class Link:
    """A slow connection to a port of this machine."""

    port: int
    latency_s: float
    bytes_per_s: float  # rate limit on the answers of one connection

    async def serve(self, client: socket.socket) -> None:
        """Relay one connection until either side closes it."""
        loop = asyncio.get_running_loop()
        with client, socket.socket() as server:
            server.setblocking(False)
            try:
                await loop.sock_connect(server, ("127.0.0.1", self.port))
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._relay(client, server, delay_s=self.latency_s))
                    group.create_task(self._relay(server, client, bytes_per_s=self.bytes_per_s))
            except* OSError:
                pass

    async def _relay(
        self, source: socket.socket, to: socket.socket, *, delay_s: float = 0, bytes_per_s: float = 0
    ) -> None:
        loop, memory = asyncio.get_running_loop(), memoryview(bytearray(CHUNK_BYTES))
        while num := await loop.sock_recv_into(source, memory):
            await asyncio.sleep(delay_s + (num / bytes_per_s if bytes_per_s else 0))
            # The store names a folder of this machine, which another machine would lack: hide that header.
            begin = bytes(memory[: min(num, HEAD_BYTES)]).replace(FOLDER_HEADER.encode(), b"X" * len(FOLDER_HEADER))
            memory[: len(begin)] = begin
            await loop.sock_sendall(to, memory[:num])
        to.shutdown(socket.SHUT_WR)


@contextmanager
def slow_link(link: Link) -> Iterator[int]:
    """Yield the port of a relay that runs during the block."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.common.slow_link",
        str(link.port),
        str(link.latency_s),
        str(link.bytes_per_s),
    ]
    environment = child_environment()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, env=environment
    ) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())


async def _run(link: Link) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        print(server.getsockname()[1], flush=True)
        parent = asyncio.create_task(asyncio.to_thread(sys.stdin.read))  # ends when the parent process does
        connections: set[asyncio.Task[None]] = set()
        accepting = asyncio.create_task(_accept(link, server, connections))
        await asyncio.wait([parent, accepting], return_when=asyncio.FIRST_COMPLETED)
        accepting.cancel()


async def _accept(link: Link, server: socket.socket, connections: set[asyncio.Task[None]]) -> None:
    while True:
        client, _ = await asyncio.get_running_loop().sock_accept(server)
        task = asyncio.create_task(link.serve(client))
        connections.add(task)
        task.add_done_callback(connections.discard)


if __name__ == "__main__":
    os.nice(19)
    group = Path("/proc/self/autogroup")  # with autogroups, priorities apply only within a session
    if group.exists():
        group.write_text("19")
    asyncio.run(_run(Link(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))))

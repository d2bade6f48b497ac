"""A TCP relay that makes a server as slow as a distant one: by latency before requests, and by a rate for answers.

It stands for another machine, so it runs in its own process with the lowest priority for this machine's cores.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peft_adapters.format import FOLDER_HEADER
from protocol.runtime.environment import child_environment

CHUNK_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Link:
    """A slow connection to a port of this machine."""

    port: int
    latency_s: float
    bytes_per_s: float  # of the answers on one connection

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay one connection until either side closes it."""
        try:
            upstream = await asyncio.open_connection("127.0.0.1", self.port, limit=CHUNK_BYTES)
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
            chunk = chunk.replace(FOLDER_HEADER.encode(), b"X" * len(FOLDER_HEADER))  # another machine lacks the folder
            await asyncio.sleep(delay_s + (len(chunk) / bytes_per_s if bytes_per_s else 0))
            writer.write(chunk)
            await writer.drain()
        writer.close()


@contextmanager
def slow_link(link: Link) -> Iterator[int]:
    """Yield the port of a relay that runs for the length of the block."""
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
    async with await asyncio.start_server(link.serve, "127.0.0.1", 0, limit=CHUNK_BYTES) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.to_thread(sys.stdin.read)  # until the parent process ends or closes the pipe


if __name__ == "__main__":
    os.nice(19)
    group = Path("/proc/self/autogroup")  # where it exists, priorities have an effect only within a session
    if group.exists():
        group.write_text("19")
    asyncio.run(_run(Link(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))))

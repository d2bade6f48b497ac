"""Two hosts on this machine with a cable between them: network namespaces below a user namespace, for any user."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FIRST, SECOND = "10.77.0.1", "10.77.0.2"


@dataclass(frozen=True)
class Host:
    """A network of its own: loopback, and the cable."""

    pid: int  # of the process that keeps it
    address: str

    @property
    def within(self) -> tuple[str, ...]:
        """A command that runs another one there, and becomes it."""
        return ("nsenter", f"--target={self.pid}", "--user", "--preserve-credentials", "--net", "--")

    def run(self, script: str) -> None:
        """Run a shell script there. Raises CalledProcessError."""
        subprocess.run([*self.within, "sh", "-ec", script], check=True)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make them; they go with the block, or this process, and the last process in them."""
    with _kept("unshare", "--map-root-user", "--net") as pid:
        first = Host(pid, FIRST)
        with _kept(*first.within, "unshare", "--net") as pid:
            second = Host(pid, SECOND)
            first.run(f"ip link add cable1 type veth peer name cable2 netns {second.pid}")
            for host, end in ((first, "cable1"), (second, "cable2")):
                host.run(f"ip address add {host.address}/30 dev {end}; ip link set {end} up; ip link set lo up")
            yield first, second


@contextmanager
def _kept(*command: str) -> Iterator[int]:
    """Yield the id of a process that `command` has brought into its namespaces."""
    script = ("sh", "-c", "echo; exec cat")  # until its input ends
    with subprocess.Popen([*command, *script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield process.pid


RELAY = """
import asyncio, sys
port, path = sys.argv[1:]
async def copy(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    writer.close()
async def serve(reader, writer):
    ahead = await asyncio.open_unix_connection(path)
    await asyncio.gather(copy(reader, ahead[1]), copy(ahead[0], writer))
async def main():
    async with await asyncio.start_server(serve, "0.0.0.0", int(port)):
        print(flush=True)
        await asyncio.Future()
asyncio.run(main())
"""


@contextmanager
def relay(host: Host, port: int, path: Path) -> Iterator[str]:
    """Yield an address of a host, `address:port`, at which the server of a Unix socket answers."""
    command = [*host.within, sys.executable, "-c", RELAY, str(port), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        try:
            yield f"{host.address}:{port}"
        finally:
            process.terminate()

"""Two hosts on this machine with a cable between them: network namespaces in a user namespace, for any user.

Also a memory limit for some processes, which needs root and the memory controller of cgroups v1.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

FIRST, SECOND = "10.77.0.1", "10.77.0.2"
MEMORY = Path("/sys/fs/cgroup/memory")


@dataclass(frozen=True)
class Host:
    """A network namespace with a loopback device and one end of the cable."""

    pid: int  # of the process that keeps the namespace
    address: str

    @property
    def within(self) -> tuple[str, ...]:
        """A command that executes another one on this host, in the same process."""
        return ("nsenter", f"--target={self.pid}", "--user", "--preserve-credentials", "--net", "--")

    def run(self, script: str) -> None:
        """Run a shell script on this host. Raises CalledProcessError."""
        subprocess.run([*self.within, "sh", "-ec", script], check=True)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Create two hosts for the duration of the block; they also end with this process."""
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
    """Yield the id of a process that keeps the namespaces of `command` alive."""
    script = ("sh", "-c", "echo; exec cat")  # runs until its input ends
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
    """Yield an address `address:port` of a host that is connected to a server's Unix socket."""
    command = [*host.within, sys.executable, "-c", RELAY, str(port), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        try:
            yield f"{host.address}:{port}"
        finally:
            process.terminate()


@dataclass(frozen=True)
class MemoryGroup:
    """A memory cgroup: when its limit is reached, the kernel kills its largest process."""

    folder: Path

    @property
    def within(self) -> tuple[str, ...]:
        """A command that executes another one in the group, in the same process."""
        return ("sh", "-ec", f'echo $$ > {self.folder}/cgroup.procs; exec "$@"', "sh")

    def exhaust(self) -> None:
        """Limit the group to its current usage and exceed it, so that the kernel kills its largest process."""
        usage = int((self.folder / "memory.usage_in_bytes").read_text())
        (self.folder / "memory.limit_in_bytes").write_text(str(usage))
        subprocess.run([*self.within, "tail", "/dev/zero"], check=False)  # `tail` keeps its input until it is killed

    @property
    def num_killed(self) -> int:
        lines = (self.folder / "memory.oom_control").read_text().splitlines()
        return int(dict(line.split() for line in lines)["oom_kill"])


@contextmanager
def memory_group(name: str) -> Iterator[MemoryGroup]:
    """Create a group whose processes are killed after the block. Raises OSError if that is not permitted."""
    group = MemoryGroup(MEMORY / name)
    group.folder.mkdir()
    try:
        yield group
    finally:
        while group.folder.exists():  # the kernel releases the group shortly after its last process ended
            with suppress(OSError):
                for pid in (group.folder / "cgroup.procs").read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
                group.folder.rmdir()
            time.sleep(0.01)

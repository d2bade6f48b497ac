"""Proxies between a queue's servers and all their peers, which hold data back without closing a connection.

It runs as its own process, `python -m chaos.cable PORT:SERVER_PORT ...`, reads commands, `cut 0`, `split 0` or `join
0`, from its input, and confirms each with one line. A cut cable carries nothing. A split cable carries the traffic of
services but none of servers and Sentinels: clients of a primary still reach it while the others consider it lost.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from typing import Literal, cast

from protocol.runtime.environment import child_environment

State = Literal["join", "cut", "split"]

OF_SERVERS = (b"REPLCONF", b"replconf", b"sentinel-", b"__sentinel__")
"""Words in the first messages of a replica's or a Sentinel's connection that no service sends."""

HEAD_BYTES = 4096
"""Bytes at a connection's beginning that are searched for `OF_SERVERS`."""


class _End(asyncio.Protocol):
    """One end of a proxied connection."""

    def __init__(self, cable: Cable) -> None:
        self.cable = cable
        self.transport: asyncio.Transport | None = None
        self.other: _End | None = None
        self.is_of_server = False
        self._head = b""
        self._held: list[bytes] = []  # received before the other end was connected

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.cable.add(self)
        for data in self.other.take_held() if self.other is not None else ():
            self.transport.write(data)

    def take_held(self) -> list[bytes]:
        """Return and clear the data received before the other end was connected."""
        held, self._held = self._held, []
        return held

    def data_received(self, data: bytes) -> None:
        if len(self._head) < HEAD_BYTES:
            self._head += data[:HEAD_BYTES]
            if any(word in self._head for word in OF_SERVERS) and self.other is not None:
                self.is_of_server = self.other.is_of_server = True
                self.cable.settle(self)
                self.cable.settle(self.other)
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)
        else:
            self._held.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.cable.ends.discard(self)
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class Cable:
    """Forwards connections to a port to the server's port. While cut, both ends see silence, not a closed socket."""

    def __init__(self, server_port: int) -> None:
        self.state: State = "join"
        self.ends: set[_End] = set()
        self._server_port = server_port
        self._opening: set[asyncio.Task[None]] = set()

    def add(self, end: _End) -> None:
        """Add a connected end."""
        self.ends.add(end)
        self.settle(end)

    def settle(self, end: _End) -> None:
        """Read from an end, or leave its data in the kernel, as the cable's state requires."""
        if end.transport is not None and not end.transport.is_closing():
            holds = self.state == "cut" or (self.state == "split" and end.is_of_server)
            (end.transport.pause_reading if holds else end.transport.resume_reading)()

    def become(self, state: State) -> None:
        """Set the state: forward everything, nothing, or only the traffic of services."""
        self.state = state
        for end in self.ends:
            self.settle(end)

    def accept(self) -> _End:
        """Return the near end of a new connection, and start to open the far end."""
        near, far = _End(self), _End(self)
        near.other, far.other = far, near
        task = asyncio.get_running_loop().create_task(self._open(near, far))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        return near

    async def _open(self, near: _End, far: _End) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: far, "127.0.0.1", self._server_port)
        except OSError:  # a server that is not there refuses connections
            if near.transport is not None:
                near.transport.abort()


async def _carry(pairs: Sequence[tuple[int, int]]) -> None:
    loop = asyncio.get_running_loop()
    cables = [Cable(server_port) for _, server_port in pairs]
    for cable, (port, _) in zip(cables, pairs, strict=True):
        await loop.create_server(cable.accept, "127.0.0.1", port)
    print("up", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        state, index = line.split()
        cables[int(index)].become(cast(State, state))
        print("done", flush=True)


class Cables:
    """Controls the process of several cables, which ends with its parent."""

    def __init__(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Start the process. pairs: (port to listen on, port of the server behind it)."""
        words = [f"{port}:{server_port}" for port, server_port in pairs]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "chaos.cable", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=child_environment(),
        )  # fmt: skip
        self._hear("up")

    def become(self, index: int, state: State) -> None:
        """Cut, split or join a cable."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{state} {index}\n")
        self._process.stdin.flush()
        self._hear("done")

    def stop(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _hear(self, word: str) -> None:
        assert self._process.stdout is not None
        told = self._process.stdout.readline().strip()
        if told != word:
            raise RuntimeError(f"the cables said {told!r} and not {word!r}")


if __name__ == "__main__":
    asyncio.run(_carry([(int(port), int(to)) for port, _, to in (word.partition(":") for word in sys.argv[1:])]))

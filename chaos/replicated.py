"""A queue of three servers that three Sentinels watch over: real processes on ports of this machine.

A primary whose replicas it has not heard for `MAX_LAG_S` takes no writes: one that was cut off while another became the
primary soon accepts nothing that would be lost. What it accepts before that gateways tell the new one again.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from chaos.cable import Cables
from chaos.fleet import free_port
from chaos.shortage import ask, disk_again, no_disk, no_memory
from lorafleet.launcher.embedded import server_binary
from lorafleet.launcher.queue_users import ACL_FILE, make_users, password_file
from protocol.queue.connection.failover import PASSWORD
from protocol.queue.connection.redis_client import CONNECTION_ERRORS, QueueError, ping
from protocol.runtime.environment import child_environment
from protocol.runtime.settings import Settings

NUM = 3
NAME = "fleet"
SENTINEL_PASSWORD = "between-sentinels"
DOWN_AFTER_MS = 500
MAX_LAG_S = 2
FENCED_S = 2 * MAX_LAG_S + 1
"""Time after which a primary without replicas must have noticed: it counts them once a second."""

RETRY_MS = 1000
"""`failover-timeout`: a Sentinel that has failed to be elected tries again after twice this time."""

UP_S = 60.0
"""Most time until the servers are in step again after a failover."""

FAILOVERS = frozenset({"kill", "power cut", "stop", "partition", "split", "disk full"})
"""Faults after which another server is the primary, which may not have got what the old one took last."""


class ReplicatedQueue:
    """A primary, two replicas, and three Sentinels, which have a password."""

    def __init__(self, folder: Path, *, guarded: bool = False, cabled: bool = False) -> None:
        """Start all in `folder`. guarded: nobody enters without the password of a fleet's user.

        cabled: the way to each server is a cable, which can be cut; `ports` lead around it.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.users = folder / "users" if guarded else None
        if self.users is not None:
            make_users(self.users, replicated=True)
        self.log = folder / "queue.log"
        self.ports = [free_port() for _ in range(NUM)]
        self._announced = [free_port() for _ in range(NUM)] if cabled else self.ports
        self._cables = Cables(list(zip(self._announced, self.ports, strict=True))) if cabled else None
        self._sentinel_ports = [free_port() for _ in range(NUM)]
        self._last_primary = 0
        self.servers = [self._start_server(index) for index in range(NUM)]
        self._sentinels = [self._start_sentinel(index) for index in range(NUM)]

    @property
    def url(self) -> str:
        """The queue's URL for who enters without a user, with the password of the Sentinels."""
        return f"{self._url('')}?{PASSWORD}={SENTINEL_PASSWORD}"

    def door(self, user: str) -> Settings:
        """Return the settings with which a user of a guarded queue enters."""
        assert self.users is not None
        file = self.folder / "sentinel-password"
        file.write_text(SENTINEL_PASSWORD)
        return Settings(
            redis_url=self._url(f"{user}@"), redis_password_file=password_file(self.users, user),
            redis_sentinel_password_file=file,
        )  # fmt: skip

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process of the server that was last seen to be the primary."""
        return self.servers[self._last_primary]

    def _url(self, user: str) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self._sentinel_ports)
        return f"redis-sentinel://{user}{hosts}/{NAME}/0"

    def _password(self, user: str) -> str:
        assert self.users is not None
        return password_file(self.users, user).read_text().strip()

    # ------------------------------------------------------------ processes

    def _run(self, folder: Path, lines: Sequence[str], *more: str) -> subprocess.Popen[bytes]:
        """Start a server with a file that it may write to, kept from its last start."""
        folder.mkdir(exist_ok=True)
        file = folder / "server.conf"
        if not file.exists():
            file.write_text("\n".join(["bind 127.0.0.1", f"dir {folder}", *lines, ""]))
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [server_binary(), str(file), *more], stdout=log, stderr=log, env=child_environment(),
                restore_signals=False,  # a full disk, played by a limit on files, must not kill it: see `no_disk`
            )  # fmt: skip

    def _start_server(self, index: int) -> subprocess.Popen[bytes]:
        lines = [
            f"port {self.ports[index]}", "appendonly yes", 'save ""', "maxmemory 1gb", "maxmemory-policy noeviction",
            "min-replicas-to-write 1", f"min-replicas-max-lag {MAX_LAG_S}", "repl-diskless-sync-delay 0",
            "repl-ping-replica-period 1", f"replica-announce-port {self._announced[index]}",
        ]  # fmt: skip
        if self.users is not None:
            lines += [
                f"aclfile {self.users / ACL_FILE}",
                "masteruser replica",
                f"masterauth {self._password('replica')}",
            ]
        if index:
            lines.append(f"replicaof 127.0.0.1 {self._announced[0]}")
        return self._run(self.folder / f"server{index}", lines)

    def _start_sentinel(self, index: int) -> subprocess.Popen[bytes]:
        port = self._sentinel_ports[index]
        lines = [
            f"port {port}", f"requirepass {SENTINEL_PASSWORD}", f"sentinel sentinel-pass {SENTINEL_PASSWORD}",
            f"sentinel monitor {NAME} 127.0.0.1 {self._announced[0]} 2",
            f"sentinel down-after-milliseconds {NAME} {DOWN_AFTER_MS}", f"sentinel failover-timeout {NAME} {RETRY_MS}",
        ]  # fmt: skip
        if self.users is not None:
            lines += [f"sentinel auth-user {NAME} sentinel", f"sentinel auth-pass {NAME} {self._password('sentinel')}"]
        process = self._run(self.folder / f"sentinel{index}", lines, "--sentinel")
        _insist(lambda: ping(f"redis://:{SENTINEL_PASSWORD}@127.0.0.1:{port}", 1.0))
        return process

    def stop(self) -> None:
        """End all."""
        for process in (*self._sentinels, *self.servers):
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
        if self._cables is not None:
            self._cables.stop()

    # ------------------------------------------------------------ what Sentinels say

    async def _ask_sentinel(self, index: int, *words: str) -> Any:
        url = f"redis://:{SENTINEL_PASSWORD}@127.0.0.1:{self._sentinel_ports[index]}"
        return await ask(url, "SENTINEL", *words)

    async def primary(self) -> int | None:
        """Return which server the Sentinels take for the primary, None while they do not agree or do not answer."""
        with contextlib.suppress(QueueError, *CONNECTION_ERRORS):
            answers = [await self._ask_sentinel(i, "GET-MASTER-ADDR-BY-NAME", NAME) for i in range(NUM)]
            ports = {int(port) for _, port in answers}
            if len(ports) == 1:
                self._last_primary = self._announced.index(ports.pop())
                return self._last_primary
        return None

    async def is_whole(self) -> bool:
        """Tell whether every Sentinel knows the others and two replicas, and these are in step with the primary."""
        with contextlib.suppress(QueueError, *CONNECTION_ERRORS):
            for index in range(NUM):
                facts = _facts(await self._ask_sentinel(index, "MASTER", NAME))
                if (facts["num-other-sentinels"], facts["num-slaves"], facts["flags"]) != ("2", "2", "master"):
                    # They look at their servers every ten seconds otherwise, and tell each other every two.
                    await self._ask_sentinel(index, "DEBUG", "info-period", "300", "publish-period", "300")
                    return False
            at = await self.primary()
            if at is not None:
                infos = [await self._info(index) for index in range(NUM)]
                # A primary counts replicas as good that are still fetching its first copy, and have nothing.
                up = [info.get("master_link_status") == "up" for index, info in enumerate(infos) if index != at]
                return all(up) and (infos[at]["role"], infos[at]["connected_slaves"]) == ("master", NUM - 1)
        return False

    async def _info(self, index: int) -> dict[str, Any]:
        return await ask(self._own_url(index), "INFO", "replication")

    def _own_url(self, index: int) -> str:
        """Return the URL of one server, around its cable."""
        who = "" if self.users is None else f"operator:{self._password('operator')}@"
        return f"redis://{who}127.0.0.1:{self.ports[index]}"

    async def until_whole(self) -> None:
        """Wait until all is in step. Raises TimeoutError."""
        await _until(self.is_whole)

    # ------------------------------------------------------------ faults

    async def hit(self, how: str, rng: random.Random, stop_s: float) -> list[str]:
        """Do something to the primary, wait until all is in step again, and return what went wrong.

        how: `kill`; `power cut`: its replicas have missed its last second besides; `stop`: it lives on and does not
        know that another has become the primary; `partition`: it is cut off from everybody; `split`: only from its
        replicas and the Sentinels, while those who work with it still reach it; `lag`: its replicas stand still;
        `memory full` and `disk full`.
        """
        await self.until_whole()
        at = await self.primary()
        assert at is not None
        others = [server for index, server in enumerate(self.servers) if index != at]
        wrong: list[str] = []
        if how == "memory full":
            async with no_memory(self._own_url(at)):
                await asyncio.sleep(rng.uniform(1, stop_s))
        elif how == "lag":
            await self._stop(others, rng.uniform(1, stop_s))
        elif how in ("partition", "split"):
            wrong = await self._cut_off(at, how, rng)
        elif how == "disk full":
            await self._fill_disk(at)
        elif how == "stop":
            await self._stop([self.servers[at]], stop_s, self._another(at))
        else:
            await self._end(at, others, rng.uniform(0, 1) if how == "power cut" else 0.0)
        await self.until_whole()
        return wrong

    def _another(self, at: int) -> Callable[[], Awaitable[bool]]:
        async def another() -> bool:
            return await self.primary() not in (at, None)

        return another

    async def _stop(
        self, servers: Sequence[subprocess.Popen[bytes]], stop_s: float,
        until: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:  # fmt: skip
        """Let servers stand still for a time, and then until something holds."""
        for server in servers:
            server.send_signal(signal.SIGSTOP)
        await asyncio.sleep(stop_s)
        if until is not None:
            await _until(until)
        for server in servers:
            server.send_signal(signal.SIGCONT)

    async def _end(self, at: int, others: Sequence[subprocess.Popen[bytes]], missed_s: float) -> None:
        """Kill the primary, of whose last `missed_s` the others know nothing, and start it again."""
        if missed_s:
            for server in others:
                server.send_signal(signal.SIGSTOP)
            await asyncio.sleep(missed_s)
        self.servers[at].kill()
        self.servers[at].wait()
        for server in others:
            server.send_signal(signal.SIGCONT)
        await _until(self._another(at))
        self.servers[at] = self._start_server(at)

    async def _cut_off(self, at: int, how: str, rng: random.Random) -> list[str]:
        """Cut a primary off until another one is the primary and the old one has noticed; look whether it has."""
        async with self.cut_off(how):
            await asyncio.sleep(FENCED_S)
            wrong = ["a primary that was cut off takes writes"] if await self._takes_writes(at) else []
            await asyncio.sleep(rng.uniform(0, 2))
        return wrong

    @asynccontextmanager
    async def cut_off(self, how: str) -> AsyncIterator[None]:
        """Cut the primary off for a block, which begins when another one is the primary. how: `partition`, `split`."""
        assert self._cables is not None, "there are no cables"
        at = await self.primary()
        assert at is not None
        self._cables.become(at, "cut" if how == "partition" else "split")
        try:
            await _until(self._another(at))
            yield
        finally:
            self._cables.become(at, "join")

    async def _takes_writes(self, index: int) -> bool:
        """Tell whether a server, which still answers those on its side, takes a write from them."""
        with contextlib.suppress(QueueError, *CONNECTION_ERRORS):
            assert await ask(self._own_url(index), "PING")
            await ask(self._own_url(index), "SET", "{lorafleet}side", "written", "PX", 1000)
            return True
        return False

    async def _fill_disk(self, at: int) -> None:
        """Leave the primary no disk until another one is: it refuses writes, which Sentinels take for an end."""
        no_disk(self.servers[at], self.folder / f"server{at}")
        try:
            await _until(self._another(at))
        finally:
            disk_again(self.servers[at])
        if self.servers[at].poll() is not None:  # as a replica it ends by itself when it cannot write
            self.servers[at] = self._start_server(at)


async def _until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait until something holds. Raises TimeoutError."""
    async with asyncio.timeout(UP_S):
        while True:
            if await holds():
                return
            await asyncio.sleep(0.1)


def _insist(ask: Callable[[], object]) -> None:
    """Ask until there is an answer. Raises `QueueError` after the time."""
    deadline = time.monotonic() + UP_S
    while True:
        try:
            ask()
            return
        except QueueError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.05)


def _facts(reply: Any) -> dict[str, str]:
    """Return a reply of names and values, as a dict or as a flat list, as texts."""
    words = [word for pair in reply.items() for word in pair] if isinstance(reply, dict) else list(reply)
    texts = [_text(word) for word in words]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)

"""A queue of three servers watched by three Sentinels: real processes on ports of this machine.

A primary whose replicas were silent for `MAX_LAG_S` refuses writes, so that one which was cut off during a failover
soon accepts nothing that would be lost. What it accepts before that, gateways submit again to the new primary.
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
"""Seconds after which a primary without replicas must have noticed: it counts them once a second."""

RETRY_MS = 1000
"""`failover-timeout`: a Sentinel whose election failed tries again after twice this time."""

UP_S = 60.0
"""Maximum seconds until the servers are in sync again after a failover."""

FAILOVERS = frozenset({"kill", "power cut", "stop", "partition", "split", "disk full"})
"""Faults after which another server is the primary; the last writes to the old one may be missing there."""


class ReplicatedQueue:
    """A primary, two replicas, and three Sentinels, which require a password."""

    def __init__(self, folder: Path, *, guarded: bool = False, cabled: bool = False) -> None:
        """Start everything in `folder`. guarded: the servers require the password of one of the fleet's users.

        cabled: each server is behind a cable, which can be cut; `ports` bypass the cables.
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
        """The queue's URL for clients without a user, with the password of the Sentinels."""
        return f"{self._url('')}?{PASSWORD}={SENTINEL_PASSWORD}"

    def door(self, user: str) -> Settings:
        """Return the settings with which a user connects to a guarded queue."""
        assert self.users is not None
        file = self.folder / "sentinel-password"
        file.write_text(SENTINEL_PASSWORD)
        return Settings(
            redis_url=self._url(f"{user}@"), redis_password_file=password_file(self.users, user),
            redis_sentinel_password_file=file,
        )  # fmt: skip

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process of the last known primary."""
        return self.servers[self._last_primary]

    def _url(self, user: str) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self._sentinel_ports)
        return f"redis-sentinel://{user}{hosts}/{NAME}/0"

    def _password(self, user: str) -> str:
        assert self.users is not None
        return password_file(self.users, user).read_text().strip()

    # ------------------------------------------------------------ processes

    def _run(self, folder: Path, lines: Sequence[str], *more: str) -> subprocess.Popen[bytes]:
        """Start a server with a configuration file that it may rewrite; a restart uses the same file."""
        folder.mkdir(exist_ok=True)
        file = folder / "server.conf"
        if not file.exists():
            file.write_text("\n".join(["bind 127.0.0.1", f"dir {folder}", *lines, ""]))
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [server_binary(), str(file), *more], stdout=log, stderr=log, env=child_environment(),
                restore_signals=False,  # SIGXFSZ stays ignored: exceeding the limit of `no_disk` must not kill it
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
        """End all processes."""
        for process in (*self._sentinels, *self.servers):
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
        if self._cables is not None:
            self._cables.stop()

    # ------------------------------------------------------------ state reported by Sentinels

    async def _ask_sentinel(self, index: int, *words: str) -> Any:
        url = f"redis://:{SENTINEL_PASSWORD}@127.0.0.1:{self._sentinel_ports[index]}"
        return await ask(url, "SENTINEL", *words)

    async def primary(self) -> int | None:
        """Return the index of the server that all Sentinels call the primary; None if they disagree or fail."""
        with contextlib.suppress(QueueError, *CONNECTION_ERRORS):
            answers = [await self._ask_sentinel(i, "GET-MASTER-ADDR-BY-NAME", NAME) for i in range(NUM)]
            ports = {int(port) for _, port in answers}
            if len(ports) == 1:
                self._last_primary = self._announced.index(ports.pop())
                return self._last_primary
        return None

    async def is_whole(self) -> bool:
        """Return whether every Sentinel knows all the others, and both replicas are in sync with the primary."""
        with contextlib.suppress(QueueError, *CONNECTION_ERRORS):
            for index in range(NUM):
                facts = _facts(await self._ask_sentinel(index, "MASTER", NAME))
                if (facts["num-other-sentinels"], facts["num-slaves"], facts["flags"]) != ("2", "2", "master"):
                    # By default they poll their servers every ten seconds, and publish to each other every two.
                    await self._ask_sentinel(index, "DEBUG", "info-period", "300", "publish-period", "300")
                    return False
            at = await self.primary()
            if at is not None:
                infos = [await self._info(index) for index in range(NUM)]
                # A primary also counts replicas that are still fetching their first copy and have no data.
                up = [info.get("master_link_status") == "up" for index, info in enumerate(infos) if index != at]
                return all(up) and (infos[at]["role"], infos[at]["connected_slaves"]) == ("master", NUM - 1)
        return False

    async def _info(self, index: int) -> dict[str, Any]:
        return await ask(self._own_url(index), "INFO", "replication")

    def _own_url(self, index: int) -> str:
        """Return the URL of one server, bypassing its cable."""
        who = "" if self.users is None else f"operator:{self._password('operator')}@"
        return f"redis://{who}127.0.0.1:{self.ports[index]}"

    async def until_whole(self) -> None:
        """Wait until all servers are in sync. Raises TimeoutError."""
        await _until(self.is_whole)

    # ------------------------------------------------------------ faults

    async def hit(self, how: str, rng: random.Random, stop_s: float) -> list[str]:
        """Inflict a fault on the primary, wait until all servers are in sync again, and return what went wrong.

        how: `kill`; `power cut`: a kill whose last second of writes the replicas have missed; `stop`: the primary is
        suspended, and does not know that another one has taken over; `partition`: it is cut off from everything;
        `split`: it is cut off only from its replicas and the Sentinels, while its clients still reach it; `lag`: its
        replicas are suspended; `memory full` and `disk full`.
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
        """Suspend servers for `stop_s`, and then until `until` holds."""
        for server in servers:
            server.send_signal(signal.SIGSTOP)
        await asyncio.sleep(stop_s)
        if until is not None:
            await _until(until)
        for server in servers:
            server.send_signal(signal.SIGCONT)

    async def _end(self, at: int, others: Sequence[subprocess.Popen[bytes]], missed_s: float) -> None:
        """Kill the primary, whose last `missed_s` of writes the others have missed, and start it again."""
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
        """Cut a primary off until another one has taken over and the old one must have noticed; check that it has."""
        async with self.cut_off(how):
            await asyncio.sleep(FENCED_S)
            wrong = ["a primary that was cut off takes writes"] if await self._takes_writes(at) else []
            await asyncio.sleep(rng.uniform(0, 2))
        return wrong

    @asynccontextmanager
    async def cut_off(self, how: str) -> AsyncIterator[None]:
        """Cut the primary off during a block that begins once another has taken over. how: `partition`, `split`."""
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
        """Return whether a server, which its own clients still reach, accepts a write from them."""
        with contextlib.suppress(QueueError, *CONNECTION_ERRORS):
            assert await ask(self._own_url(index), "PING")
            await ask(self._own_url(index), "SET", "{lorafleet}side", "written", "PX", 1000)
            return True
        return False

    async def _fill_disk(self, at: int) -> None:
        """Leave the primary no disk space until another takes over: Sentinels count one that refuses writes as down."""
        no_disk(self.servers[at], self.folder / f"server{at}")
        try:
            await _until(self._another(at))
        finally:
            disk_again(self.servers[at])
        if self.servers[at].poll() is not None:  # as a replica it exits when it cannot write
            self.servers[at] = self._start_server(at)


async def _until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait until `holds` returns true. Raises TimeoutError."""
    async with asyncio.timeout(UP_S):
        while True:
            if await holds():
                return
            await asyncio.sleep(0.1)


def _insist(ask: Callable[[], object]) -> None:
    """Repeat `ask` until it succeeds. Raises `QueueError` after `UP_S`."""
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
    """Return a reply of names and values, given as a dict or as a flat list, as a dict of strings."""
    words = [word for pair in reply.items() for word in pair] if isinstance(reply, dict) else list(reply)
    texts = [_text(word) for word in words]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)

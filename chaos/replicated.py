"""A queue of three servers that three Sentinels watch over: real processes on ports of this machine.

A primary whose replicas it has not heard for `MAX_LAG_S` takes no writes: one that was cut off while another became the
primary can accept nothing that would be lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import redis

from chaos.fleet import free_port
from lorafleet.launcher.embedded import server_binary
from lorafleet.launcher.queue_users import ACL_FILE, make_users, password_file
from protocol.queue.failover import PASSWORD
from protocol.runtime.settings import Settings

NUM = 3
NAME = "fleet"
SENTINEL_PASSWORD = "between-sentinels"
DOWN_AFTER_MS = 500
MAX_LAG_S = 2
UP_S = 60.0
"""Most time until the servers are in step again after a failover."""


class ReplicatedQueue:
    """A primary, two replicas, and three Sentinels, which have a password."""

    def __init__(self, folder: Path, *, guarded: bool = False) -> None:
        """Start all in `folder`. guarded: nobody enters without the password of a fleet's user."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.users = folder / "users" if guarded else None
        if self.users is not None:
            make_users(self.users, replicated=True)
        self.log = folder / "queue.log"
        self.ports = [free_port() for _ in range(NUM)]
        self._sentinel_ports = [free_port() for _ in range(NUM)]
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
        """The process of the primary, or of the first server while there is none."""
        return self.servers[self.primary() or 0]

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
            return subprocess.Popen([server_binary(), str(file), *more], stdout=log, stderr=log)

    def _start_server(self, index: int) -> subprocess.Popen[bytes]:
        lines = [
            f"port {self.ports[index]}", "appendonly yes", 'save ""', "maxmemory 1gb", "maxmemory-policy noeviction",
            "min-replicas-to-write 1", f"min-replicas-max-lag {MAX_LAG_S}", "repl-diskless-sync-delay 0",
            "repl-ping-replica-period 1",
        ]  # fmt: skip
        if self.users is not None:
            lines += [
                f"aclfile {self.users / ACL_FILE}",
                "masteruser replica",
                f"masterauth {self._password('replica')}",
            ]
        if index:
            lines.append(f"replicaof 127.0.0.1 {self.ports[0]}")
        return self._run(self.folder / f"server{index}", lines)

    def _start_sentinel(self, index: int) -> subprocess.Popen[bytes]:
        port = self._sentinel_ports[index]
        lines = [
            f"port {port}", f"requirepass {SENTINEL_PASSWORD}", f"sentinel sentinel-pass {SENTINEL_PASSWORD}",
            f"sentinel monitor {NAME} 127.0.0.1 {self.ports[0]} 2",
            f"sentinel down-after-milliseconds {NAME} {DOWN_AFTER_MS}", f"sentinel failover-timeout {NAME} 3000",
        ]  # fmt: skip
        if self.users is not None:
            lines += [f"sentinel auth-user {NAME} sentinel", f"sentinel auth-pass {NAME} {self._password('sentinel')}"]
        process = self._run(self.folder / f"sentinel{index}", lines, "--sentinel")
        _insist(lambda: self._ask_sentinel(index, "MYID"))
        # They look at their servers every ten seconds otherwise, and tell each other every two.
        self._ask_sentinel(index, "DEBUG", "info-period", "300", "publish-period", "300")
        return process

    def stop(self) -> None:
        """End all."""
        for process in (*self._sentinels, *self.servers):
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    # ------------------------------------------------------------ what Sentinels say

    def _ask_sentinel(self, index: int, *words: str) -> Any:
        with redis.Redis(port=self._sentinel_ports[index], password=SENTINEL_PASSWORD, socket_timeout=1) as client:
            return cast(Any, client).execute_command("SENTINEL", *words)

    def primary(self) -> int | None:
        """Return which server the Sentinels take for the primary, None while they do not agree or do not answer."""
        with contextlib.suppress(redis.RedisError):
            ports = {int(self._ask_sentinel(i, "GET-MASTER-ADDR-BY-NAME", NAME)[1]) for i in range(NUM)}
            if len(ports) == 1:
                return self.ports.index(ports.pop())
        return None

    def is_whole(self) -> bool:
        """Tell whether every Sentinel knows the others and two replicas, and these are in step with the primary."""
        with contextlib.suppress(redis.RedisError):
            for index in range(NUM):
                flat = [_text(word) for word in _flat(self._ask_sentinel(index, "MASTER", NAME))]
                facts = dict(zip(flat[::2], flat[1::2], strict=True))
                if (facts["num-other-sentinels"], facts["num-slaves"], facts["flags"]) != ("2", "2", "master"):
                    return False
            at = self.primary()
            if at is not None:
                infos = [self._info(index) for index in range(NUM)]
                # A primary counts replicas as good that are still fetching its first copy, and have nothing.
                up = [info.get("master_link_status") == "up" for index, info in enumerate(infos) if index != at]
                return all(up) and infos[at]["role"] == "master" and infos[at]["min_slaves_good_slaves"] == NUM - 1
        return False

    def _info(self, index: int) -> dict[str, Any]:
        who = {} if self.users is None else {"username": "operator", "password": self._password("operator")}
        with redis.Redis(port=self.ports[index], socket_timeout=1, **who) as client:
            return cast(Any, client).info("replication")

    async def until_whole(self) -> None:
        """Wait until all is in step. Raises TimeoutError."""
        await _until(self.is_whole)

    # ------------------------------------------------------------ faults

    async def fail_over(self, how: str, rng: random.Random, stop_s: float) -> None:
        """Take the primary away and bring it back when another one is the primary; wait until all is in step.

        how: `kill`; `power cut`: its replicas have missed its last second besides; `stop`: it lives on and does not
        know that another has become the primary.
        """
        await self.until_whole()
        at = self.primary()
        assert at is not None
        others = [server for index, server in enumerate(self.servers) if index != at]
        if how == "power cut":
            for server in others:
                server.send_signal(signal.SIGSTOP)
            await asyncio.sleep(rng.uniform(0, 1))
        if how == "stop":
            self.servers[at].send_signal(signal.SIGSTOP)
            await asyncio.sleep(stop_s)
        else:
            self.servers[at].kill()
            self.servers[at].wait()
        for server in others:
            server.send_signal(signal.SIGCONT)
        await _until(lambda: self.primary() not in (at, None))
        if how == "stop":
            self.servers[at].send_signal(signal.SIGCONT)
        else:
            self.servers[at] = self._start_server(at)
        await self.until_whole()


async def _until(holds: Callable[[], bool]) -> None:
    """Wait until something holds that takes a while to find out. Raises TimeoutError."""
    async with asyncio.timeout(UP_S):
        while True:
            if await asyncio.to_thread(holds):
                return
            await asyncio.sleep(0.1)


def _insist(ask: Callable[[], object], timeout_s: float = UP_S) -> None:
    """Ask until there is an answer. Raises RedisError after the time."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            ask()
            return
        except redis.RedisError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.05)


def _flat(reply: Any) -> list[Any]:
    return [word for pair in reply.items() for word in pair] if isinstance(reply, dict) else list(reply)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)

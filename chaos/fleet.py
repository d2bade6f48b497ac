"""A fleet of real processes, one `lorafleet serve` each, which can be killed, stopped, drained and restarted."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import httpx2

from chaos.dns_server import DnsServer
from chaos.shortage import Clocks
from lorafleet.launcher import lifeline
from lorafleet.launcher.embedded import start_embedded
from protocol.queue.bus import CONNECTION_ERRORS, Bus, now_ms
from protocol.runtime.settings import Settings

STANDBY_S = 3.0
"""Seconds after its start when a scheduler counts as up: a standby cannot be observed."""


class ServiceProcess(Protocol):
    """The part of `subprocess.Popen` that a fleet uses."""

    @property
    def pid(self) -> int:
        """The process id."""
        ...

    @property
    def returncode(self) -> int | Any:
        """The exit code, or the signal that ended the process as a negative number; None while it runs."""
        ...

    def poll(self) -> int | None:
        """Return the current `returncode`."""
        ...

    def wait(self) -> int:
        """Wait until the process ends; return `returncode`."""
        ...

    def send_signal(self, sig: int) -> None:
        """Send a signal, if the process still runs."""
        ...


Spawn = Callable[[Sequence[str], Mapping[str, str], int, BinaryIO], ServiceProcess]
"""Starts a command in its own session, given its environment, its standard input and the file for its output."""


def spawn(command: Sequence[str], environment: Mapping[str, str], stdin: int, log: BinaryIO) -> ServiceProcess:
    """Start a command as a subprocess; see `Spawn`."""
    return subprocess.Popen(command, env=environment, stdin=stdin, stdout=log, stderr=log, start_new_session=True)


@dataclass(slots=True)
class Member:
    """One service process, and those that replace it after a restart."""

    service: str  # its name in `lorafleet serve`
    name: str
    settings: Settings
    log: Path
    process: ServiceProcess | None = None
    started_ms: int = 0  # unix time
    paused: bool = False  # by SIGSTOP
    within: tuple[str, ...] = ()  # a command that executes the service's command in its own process, such as nsenter

    @property
    def is_running(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        """The id of the process, which must have been started."""
        assert self.process is not None
        return self.process.pid

    def log_tail(self, num_bytes: int = 2000) -> str:
        """Return the end of the member's log."""
        return self.log.read_text(errors="replace")[-num_bytes:] if self.log.exists() else ""


@dataclass(frozen=True, slots=True)
class Shape:
    """Number of members of each service."""

    gateways: int = 1
    schedulers: int = 1
    workers: tuple[str, ...] = ("w0",)
    stores: int = 1


class QueueServer(Protocol):
    """The part of `EmbeddedServer` that a fleet uses; `ReplicatedQueue` implements it too."""

    folder: Path

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process of the server that accepts writes."""
        ...

    @property
    def url(self) -> str:
        """The URL with which services connect."""
        ...

    @property
    def log(self) -> Path:
        """The log file of the servers."""
        ...

    def stop(self) -> None:
        """Stop the servers."""
        ...


@dataclass(slots=True)
class ProcessFleet:
    """The queue server and the members, in one folder. They end when this process ends, however it ends."""

    folder: Path
    settings: Settings
    queue: QueueServer
    bus: Bus
    http: httpx2.AsyncClient
    members: dict[str, Member] = field(default_factory=dict)
    spawn: Spawn = spawn
    clocks: Clocks | None = None  # a clock for each member, if clocks can be set
    names: DnsServer | None = None  # resolves webhook receivers for gateways, if it can be made to hang
    _lifeline: tuple[int, int] = field(default_factory=os.pipe)  # members end when this process does

    @classmethod
    def prepare(
        cls, folder: Path, model: Path, adapters: Path, *, durable: bool, spawn: Spawn = spawn,
        queue: QueueServer | None = None, clocks: Clocks | None = None, names: DnsServer | None = None,
        **settings: object,
    ) -> ProcessFleet:  # fmt: skip
        """Start the queue only, unless one is given. spawn: starts members. settings: apply to every member."""
        queue = queue or start_embedded(folder / "queue", durable=durable)
        values: dict[str, object] = {
            "redis_url": queue.url, "model": str(model), "adapters": adapters, "data": folder / "data", "device": "cpu",
            "dtype": "float32", "threads": 1, "kv_cache_bytes": 64 << 20, "adapter_pool_bytes": 64 << 20,
            "adapter_host_bytes": 64 << 20,
        }  # fmt: skip
        if names is not None:
            values["webhook_dns"] = names.address
        http = httpx2.AsyncClient(timeout=2, trust_env=False)
        known = Settings.model_validate(values | settings)
        return cls(folder, known, queue, Bus(queue.url), http, spawn=spawn, clocks=clocks, names=names)

    # ------------------------------------------------------------ members

    def add(self, service: str, name: str = "", **settings: object) -> Member:
        """Declare a member without starting it."""
        name = name or service
        own = {"worker_name": name, **settings}
        if service == "gateway":
            own["port"] = free_port()
        member = Member(service, name, self.settings.model_copy(update=own), self.folder / f"{name}.log")
        self.members[name] = member
        return member

    def start(self, service: str, name: str = "") -> Member:
        """Start a member, declared or new."""
        member = self.members.get(name or service) or self.add(service, name)
        environment = os.environ | member.settings.environment() | {lifeline.VARIABLE: "1", "OMP_NUM_THREADS": "1"}
        if self.clocks is not None:
            environment |= self.clocks.environment(member.name)
        command = [*member.within, sys.executable, "-m", "lorafleet", "serve", service]
        member.started_ms, member.paused = now_ms(), False
        start = spawn if member.within else self.spawn
        with member.log.open("ab") as log:
            member.process = start(command, environment, self._lifeline[0], log)
        return member

    async def start_all(self, shape: Shape) -> None:
        """Start everything; wait until a gateway is ready and all workers have joined."""
        kinds = (("store", shape.stores), ("scheduler", shape.schedulers), ("gateway", shape.gateways))
        for service, num in kinds:
            for i in range(num):
                self.start(service, service if num == 1 else f"{service}-{i}")
        for name in shape.workers:
            self.start("worker", name)
        deadline = time.monotonic() + 120
        while not all([await self.is_up(member) for member in self.members.values()]):
            for member in self.members.values():
                if not member.is_running:
                    raise RuntimeError(f"{member.name} ended: {member.log_tail()}")
            if time.monotonic() > deadline:
                raise RuntimeError("the fleet did not come up")
            await asyncio.sleep(0.1)

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a member."""
        member = self.members[name]
        if number in (signal.SIGSTOP, signal.SIGCONT):
            member.paused = number == signal.SIGSTOP
        if member.process is not None:
            member.process.send_signal(number)

    def kill(self, name: str) -> None:
        """Kill a member with SIGKILL and wait until it ended."""
        self.signal(name, signal.SIGKILL)
        process = self.members[name].process
        assert process is not None
        process.wait()

    async def is_up(self, member: Member) -> bool:
        """Return whether a member works: it has sent a heartbeat since its start. A gateway must accept requests."""
        if not member.is_running or member.paused:
            return False
        if member.service == "scheduler":
            return now_ms() - member.started_ms > STANDBY_S * 1000
        if member.service == "gateway":
            with contextlib.suppress(httpx2.HTTPError):
                return (await self.http.get(f"{gateway_url(member)}/health")).status_code == 200
            return False
        try:
            if member.service == "store":
                return await self.bus.members.has_beaten(self.bus.keys.stores, member.started_ms)
            beats = (await self.bus.members.worker_beats()).values()
        except CONNECTION_ERRORS:
            return False
        since = member.started_ms
        return any(b and b.name == member.name and b.sent_ms >= since and not b.draining for b in beats)

    async def wid_of(self, name: str) -> str:
        """Return the id under which a worker is currently a member of the fleet, "" if it is none."""
        beats = [b for b in (await self.bus.members.worker_beats()).values() if b is not None and b.name == name]
        return max(beats, key=lambda b: b.sent_ms).wid if beats else ""

    @property
    def has_swaps(self) -> bool:
        """Whether workers swap between bases."""
        return bool(self.settings.more_models)

    async def is_swapping(self, name: str) -> bool:
        """Return whether a running worker is swapping to another base: it announced that, or is no longer a member."""
        beats = [b for b in (await self.bus.members.worker_beats()).values() if b is not None and b.name == name]
        return all(beat.becoming for beat in beats)

    # ------------------------------------------------------------ addresses

    @property
    def urls(self) -> list[str]:
        """The URLs of the gateways."""
        return [gateway_url(member) for member in self.members.values() if member.service == "gateway"]

    @property
    def url(self) -> str:
        """The URL of the first gateway."""
        return self.urls[0]

    async def close(self) -> None:
        """Kill all members and wait until they ended."""
        for member in self.members.values():
            if member.process is not None and member.process.poll() is None:
                try:
                    os.killpg(member.process.pid, signal.SIGKILL)
                except ProcessLookupError:  # it has just been forked, and has no process group of its own yet
                    member.process.send_signal(signal.SIGKILL)
        for member in self.members.values():
            if member.process is not None:
                member.process.wait()
        for end in self._lifeline:
            os.close(end)
        await self.http.aclose()
        await self.bus.close()
        with contextlib.suppress(ProcessLookupError):
            self.queue.process.send_signal(signal.SIGCONT)
        self.queue.stop()


def gateway_url(member: Member) -> str:
    """Return a gateway's base URL."""
    return f"http://127.0.0.1:{member.settings.port}"


async def until(holds: Callable[[], bool], timeout_s: float = math.inf) -> bool:
    """Wait until `holds` returns true, at most `timeout_s`; return whether it did."""
    deadline = time.monotonic() + timeout_s
    while True:
        if holds():
            return True
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)


def free_port() -> int:
    """Return a free port below the ephemeral range, from which systems take the ports of outgoing connections."""
    while True:
        port = secrets.choice(range(20_000, 32_768))
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port

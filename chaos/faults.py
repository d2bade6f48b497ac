"""Faults: which one hits which member is chosen by pure functions; the faults hit real processes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from chaos.fleet import ProcessFleet, gateway_url, until
from chaos.replicated import ReplicatedQueue
from chaos.shortage import JUMP_S, disk_again, no_disk, no_files, no_memory
from lorafleet.launcher.embedded import EmbeddedServer
from protocol.queue.bus import CONNECTION_ERRORS
from protocol.runtime.service import wait_any

logger = logging.getLogger(__name__)

How = Literal[
    "kill", "stop", "drain", "power cut", "memory full", "disk full", "clock", "partition", "split", "lag", "away",
    "kill in a swap", "hang",
]  # fmt: skip
WEIGHTS: dict[tuple[str, How], float] = {
    ("worker", "kill"): 6, ("worker", "stop"): 3, ("worker", "drain"): 3,
    ("gateway", "kill"): 3, ("gateway", "stop"): 1, ("gateway", "drain"): 2,
    ("scheduler", "kill"): 3, ("scheduler", "stop"): 1, ("scheduler", "drain"): 1,
    ("store", "kill"): 1, ("store", "stop"): 1, ("store", "drain"): 1,
    ("queue", "kill"): 2, ("queue", "stop"): 1, ("queue", "power cut"): 1,
    ("queue", "memory full"): 1, ("queue", "disk full"): 1, ("files", "away"): 1,
}  # fmt: skip
OF_SEVERAL: dict[tuple[str, How], float] = {("queue", "lag"): 1, ("queue", "partition"): 1, ("queue", "split"): 1}
"""Additional faults of a queue of several servers."""

OF_CLOCKS: dict[tuple[str, How], float] = {
    (kind, "clock"): 1 for kind in ("worker", "gateway", "scheduler", "store")
}  # fmt: skip
"""Additional faults of members whose clocks can be set: the host's clock jumps by an hour, and back."""

OF_NAMES: dict[tuple[str, How], float] = {("names", "hang"): 1}
"""Additional faults of the DNS server that resolves webhook receivers for gateways, if it is the driver's."""

OF_SWAPS: dict[tuple[str, How], float] = {("worker", "kill in a swap"): 6}
"""Additional faults of workers that swap to other bases."""

KILLS: tuple[How, ...] = ("kill", "power cut", "kill in a swap")
"""Faults that end a process without a chance to clean up."""

NEEDS_ANOTHER = {"worker", "gateway", "scheduler"}
"""Kinds of which one member is always left running: a fleet without one cannot work, which would show nothing."""

STOP_S = 10.0
DRAIN_SLACK_S = 60.0  # beyond the grace period, for a busy machine
SWAP_S, LOADING_S = 60.0, 4.0
"""Maximum wait for a swap during which to kill, and maximum time from the swap's beginning to the kill."""

POWER_CUT_S = 1.0
"""Seconds of writes that a power cut may take from the queue, whose file is synced every second."""


@dataclass(slots=True)
class Hit:
    """A fault that was inflicted."""

    kind: str
    name: str
    how: How
    at_s: float  # time.monotonic
    until_s: float = 0.0  # when it was up again; 0: not yet
    url: str = ""  # of the gateway that was hit
    rids: frozenset[str] = frozenset()  # the requests that a hit worker owned


def draw(
    rng: random.Random, up: Mapping[str, Sequence[str]], weights: Mapping[tuple[str, How], float] = WEIGHTS
) -> tuple[str, str, How] | None:
    """Choose (kind, name, how) among the members that are up; None when none can be spared."""
    possible: dict[tuple[str, How], float] = {
        (kind, how): weight
        for (kind, how), weight in weights.items()
        if len(up.get(kind, ())) > (1 if kind in NEEDS_ANOTHER else 0)
    }
    if not possible:
        return None
    kind, how = rng.choices(list(possible), list(possible.values()))[0]
    return kind, rng.choice(list(up[kind])), how


def possible_faults(fleet: ProcessFleet) -> dict[tuple[str, How], float]:
    """Return the faults, as (kind, how), that a fleet can suffer, with their weights."""
    more = [
        (OF_SEVERAL, not isinstance(fleet.queue, EmbeddedServer)), (OF_CLOCKS, fleet.clocks is not None),
        (OF_NAMES, fleet.names is not None), (OF_SWAPS, fleet.has_swaps),
    ]  # fmt: skip
    return WEIGHTS | {fault: weight for faults, has_them in more if has_them for fault, weight in faults.items()}


class PowerCut:
    """Records the size of the queue's append-only file, and truncates its last second of writes, as a power cut may."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "appendonlydir"
        self._sizes: deque[tuple[float, Path, int]] = deque(maxlen=100)

    async def watch(self) -> None:
        """Record the file's size until cancelled."""
        while True:
            self.note()
            await asyncio.sleep(0.03)

    def note(self) -> None:
        """Record the file's size now."""
        if (file := self._newest()) is not None:
            self._sizes.append((time.monotonic(), file, file.stat().st_size))

    def cut(self, age_s: float) -> int:
        """Truncate what a dead server wrote to its file in its last `age_s` seconds. Return the number of bytes."""
        file, now_s = self._newest(), time.monotonic()
        sizes = [size for at_s, path, size in self._sizes if path == file and at_s >= now_s - age_s]
        if file is None or not sizes:
            return 0
        self._sizes.clear()  # these sizes no longer describe the file
        lost = file.stat().st_size - sizes[0]
        with file.open("r+b") as log:
            log.truncate(sizes[0])
        return lost

    def _newest(self) -> Path | None:
        with contextlib.suppress(FileNotFoundError):
            files = sorted(self._folder.glob("*.incr.aof"), key=lambda file: int(file.name.split(".")[-3]))
            return files[-1] if files else None
        return None


class Havoc:
    """Inflicts faults, several at a time, and restarts the members that they ended."""

    def __init__(
        self, fleet: ProcessFleet, rng: random.Random, *, kills_only: bool = False, only: str = "",
        hows: Collection[str] = (),
    ) -> None:  # fmt: skip
        """kills_only: once each kind of fault was inflicted, inflict only `KILLS`.

        only: the kind of members to hit; "": all. hows: the faults to inflict; (): all.
        """
        self.fleet = fleet
        self.hits: list[Hit] = []
        self.troubles: list[str] = []  # ends of members that the run did not cause
        self._rng = rng
        weights = {
            fault: w
            for fault, w in possible_faults(fleet).items()
            if only in ("", fault[0]) and (not hows or fault[1] in hows)
        }
        self._due = rng.sample(list(weights), len(weights))  # every fault once, then drawn by weight
        self._weights = {fault: w for fault, w in weights.items() if fault[1] in KILLS or not kills_only}
        self._queue_is_down = False
        self._power = PowerCut(fleet.queue.folder)
        self._busy: set[str] = set()  # members that were hit and are not up again yet

    async def run(self, num: int, every_s: float, stop: asyncio.Event, *, alone: bool = False) -> None:
        """Inflict `num` faults, one every `every_s` on average, fewer if `stop` is set; wait until all members are up.

        alone: begin each fault only when the previous one is over.
        """
        async with asyncio.TaskGroup() as group:
            always = [group.create_task(loop) for loop in (self._power.watch(), self._keep())]
            async with asyncio.TaskGroup() as faults:
                while len(self.hits) < num and not stop.is_set():
                    await wait_any(stop, self._rng.expovariate(1 / every_s))
                    choice = self.choose(await self._up())
                    if choice is not None:
                        task = faults.create_task(self._hit(await self._aimed(*choice)))
                        if alone:
                            await task
            for task in always:
                task.cancel()

    def choose(self, up: Mapping[str, Sequence[str]]) -> tuple[str, str, How] | None:
        """Choose the next fault among the members that are up, as `draw` does."""
        for fault in self._due:
            if choice := draw(self._rng, up, {fault: 1.0}):
                self._due.remove(fault)
                return choice
        return draw(self._rng, up, self._weights)

    async def _up(self) -> dict[str, list[str]]:
        up: dict[str, list[str]] = {name: [] if name in self._busy else [name] for name in ("queue", "files", "names")}
        members = [m for m in self.fleet.members.values() if m.name not in self._busy]
        states = await asyncio.gather(*(self.fleet.is_up(member) for member in members))
        for member, is_up in zip(members, states, strict=True):
            if is_up or (self.fleet.has_swaps and member.service == "worker" and member.is_running):
                up.setdefault(member.service, []).append(member.name)
        return up

    async def _aimed(self, kind: str, name: str, how: How) -> Hit:
        """Return the fault, with the requests that it will affect, before it is inflicted."""
        self._busy.add(name)
        hit = Hit(kind, name, how, 0.0)
        if kind == "gateway":
            hit.url = gateway_url(self.fleet.members[name])
        if kind == "worker":
            hit.rids = await self._held_by(name)
        hit.at_s = time.monotonic()
        self.hits.append(hit)
        logger.info("%d: %s %s", len(self.hits), how, name)
        return hit

    async def _hit(self, hit: Hit) -> None:
        if hit.kind == "files":
            with no_files(self.fleet.folder / "data" / "files"):
                await asyncio.sleep(self._rng.uniform(1, STOP_S))
        elif hit.kind == "names":
            assert self.fleet.names is not None
            self.fleet.names.hangs = True
            await asyncio.sleep(STOP_S)  # longer than a lookup may take
            self.fleet.names.hangs = False
        else:
            await (self._hit_queue(hit) if hit.kind == "queue" else self._hit_member(hit))
        hit.until_s = time.monotonic()
        self._busy.discard(hit.name)

    async def _held_by(self, name: str) -> frozenset[str]:
        bus = self.fleet.bus
        try:
            return frozenset(item.rid for item in await bus.work_of(await self.fleet.wid_of(name)))
        except CONNECTION_ERRORS:
            return frozenset()

    async def _hit_member(self, hit: Hit) -> None:
        fleet, member = self.fleet, self.fleet.members[hit.name]
        if hit.how == "stop":
            fleet.signal(hit.name, signal.SIGSTOP)
            await asyncio.sleep(STOP_S)
            fleet.signal(hit.name, signal.SIGCONT)
        elif hit.how == "clock":
            assert fleet.clocks is not None
            fleet.clocks.jump(hit.name, self._rng.choice((-JUMP_S, JUMP_S)))
            await asyncio.sleep(STOP_S)
            fleet.clocks.jump(hit.name, 0)
        elif hit.how == "drain":
            fleet.signal(hit.name, signal.SIGTERM)
            await self._drained(hit)
        elif hit.how == "kill in a swap":
            await self._swaps(hit.name)
            await asyncio.sleep(self._rng.choice((0.0, self._rng.uniform(0, LOADING_S))))
            hit.at_s, hit.rids = time.monotonic(), hit.rids | await self._held_by(hit.name)
            fleet.kill(hit.name)
        else:
            fleet.kill(hit.name)
        if hit.how not in ("stop", "clock"):
            fleet.start(member.service, hit.name)
        while not await fleet.is_up(member):
            self._revive(hit.name)
            await asyncio.sleep(0.2)

    async def _swaps(self, name: str) -> None:
        """Wait until a worker is swapping to another base, or SWAP_S have passed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SWAP_S):
                while True:
                    with contextlib.suppress(*CONNECTION_ERRORS):
                        if await self.fleet.is_swapping(name):
                            return
                    await asyncio.sleep(0.02)

    async def _drained(self, hit: Hit) -> None:
        member = self.fleet.members[hit.name]
        clean = (0, -signal.SIGTERM) if self.fleet.has_swaps and hit.kind == "worker" else (0,)  # loading: at once
        if not await until(lambda: not member.is_running, member.settings.grace_s + DRAIN_SLACK_S):
            self.troubles.append(f"{hit.name} did not drain: {member.log_tail()}")
            self.fleet.kill(hit.name)
        elif member.process is not None and member.process.returncode not in clean and not self._queue_was_hit():
            self.troubles.append(f"{hit.name} drained with {member.process.returncode}: {member.log_tail()}")

    async def _hit_queue(self, hit: Hit) -> None:
        queue = self.fleet.queue
        self._queue_is_down = True
        if not isinstance(queue, EmbeddedServer):
            self.troubles += await cast(ReplicatedQueue, queue).hit(hit.how, self._rng, STOP_S)
        elif hit.how == "memory full":
            async with no_memory(queue.url):
                await asyncio.sleep(self._rng.uniform(1, STOP_S))
        elif hit.how == "disk full":
            no_disk(queue.process, queue.folder)
            await asyncio.sleep(self._rng.uniform(1, STOP_S))
            disk_again(queue.process)
        elif hit.how == "stop":
            queue.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(STOP_S)
            queue.process.send_signal(signal.SIGCONT)
        else:
            queue.process.send_signal(signal.SIGKILL)
            queue.process.wait()
            if hit.how == "power cut":
                self._power.cut(self._rng.uniform(0, POWER_CUT_S))
            queue.start()  # in this thread, which its lifeline requires; no client is served meanwhile anyway
        self._queue_is_down = False

    async def _keep(self) -> None:
        """Restart members that ended without a fault, which is a violation unless they could not reach the queue."""
        while True:
            await asyncio.sleep(0.3)
            for name in self.fleet.members:
                if name not in self._busy:
                    self._revive(name)

    def _revive(self, name: str) -> None:
        member = self.fleet.members[name]
        if member.is_running:
            return
        if not self._queue_was_hit():
            self.troubles.append(f"{name} ended by itself: {member.log_tail()}")
        self.fleet.start(member.service, name)

    def _queue_was_hit(self) -> bool:
        since = time.monotonic() - 60
        return self._queue_is_down or any(hit.kind == "queue" and hit.until_s > since for hit in self.hits)

"""The services of one machine as child processes: start order, readiness and drain order."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from rich.markup import escape

from lorafleet.launcher.child import Child, ServiceFailed, Spec
from lorafleet.launcher.embedded import EmbeddedServer
from lorafleet.launcher.machine import num_cores, visible_gpus
from lorafleet.launcher.screen import Screen
from protocol.queue.bus import CONNECTION_ERRORS, Bus, QueueError
from protocol.runtime.environment import SERVICES, child_environment
from protocol.runtime.model_files import base_settings
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import LorafleetError, Unavailable

START_POLL_S, POLL_S = 0.1, 1.0
KILL_AFTER_S = 10.0  # added to the grace period of a service
DRAIN_ORDER = ("gateway", "scheduler", "worker", "store")
"""The gateway finishes its calls while the services behind it still run; the store stops when no worker needs it."""


def service_specs(
    settings: Settings, logs: Path, queue: EmbeddedServer | None = None, cores: int | None = None
) -> list[Spec]:
    """Return the processes to start: store, scheduler, gateway, then workers, which share cores and GPUs.

    Workers are assigned to bases round robin. logs: folder of their logs. queue: the fleet's own queue, to which each
    service connects as its own user. cores: number of cores to share; None: those of this machine.
    """
    bases = list(base_settings(settings))
    num_workers = num_workers_of(settings)
    threads = settings.threads or max(1, (cores or num_cores()) // num_workers)
    gpus = [] if settings.device == "cpu" else visible_gpus(os.environ)
    specs: list[Spec] = []
    for name in ["store", "scheduler", "gateway", *(f"worker-{i}" for i in range(num_workers))]:
        service, _, number = name.partition("-")
        door: dict[str, object] = queue.door(service) if queue is not None else {}
        own = child_environment(*SERVICES[service]) | settings.model_copy(update=door).environment()
        own["PYTHONUNBUFFERED"] = "1"
        if service == "scheduler":  # it neither decrypts tokens nor connects to a store
            own = {name: value for name, value in own.items() if not name.startswith("LORAFLEET_SECRET")}
        if service in ("gateway", "worker"):
            own["HF_HUB_OFFLINE"] = "1"  # the model is local, and these services have no token to fetch it
        if settings.metrics_port:  # each has its own port, since they share this machine
            own["LORAFLEET_METRICS_PORT"] = str(settings.metrics_port + len(specs))
        if service == "worker":
            begun = bases[int(number) % len(bases)] if len(bases) > 1 else ""
            own |= {"LORAFLEET_WORKER_NAME": name, "LORAFLEET_THREADS": str(threads), "LORAFLEET_BASE": begun}
            own["LORAFLEET_WORKERS"] = str(num_workers)
            own["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
            if gpus:
                own["CUDA_VISIBLE_DEVICES"] = gpus[int(number) % len(gpus)]
        command = (sys.executable, "-m", "lorafleet", "serve", service)
        specs.append(Spec(service, name, command, own, logs / f"{name}.log"))
    return specs


def num_workers_of(settings: Settings) -> int:
    """Return how many workers a launcher starts: one for each base unless the settings have a number."""
    return settings.workers or len(base_settings(settings))


def local_url(settings: Settings) -> str:
    """Return the URL of the gateway for clients on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


@dataclass(slots=True)
class FleetLauncher:
    """The running services of one machine. `on_ready` is called once, when the gateway is first ready."""

    settings: Settings
    children: list[Child]
    queue: EmbeddedServer | None
    screen: Screen
    on_ready: Callable[[], Awaitable[bool]]  # returns whether to continue serving
    _failure: LorafleetError | None = None
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _hurry: bool = False
    _given_up: set[str] = field(default_factory=set[str])  # services that did not start

    async def run(self) -> int:
        """Run until a signal, drain all services, and return the exit code. Raises LorafleetError if one fails.

        No child process is left when this returns or raises.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        try:
            await self._forget_failures()
            async with asyncio.TaskGroup() as group:
                for child in self.children:
                    group.create_task(self._keep(child))
                watch = group.create_task(self._watch(group))
                await self._stop.wait()
                await self._drain()
                watch.cancel()
        finally:
            self.screen.close()
            for child in self.children:
                child.kill()
        if self._failure is not None:
            raise self._failure
        return 130 if self._hurry else 0

    def _on_signal(self) -> None:
        if not self._stop.is_set():
            self._stop.set()
            self.screen.close()
            self.screen.say("Finishing accepted requests; a second signal stops immediately.")
        else:
            self._hurry = True
            for child in self.children:
                child.kill()

    async def _keep(self, child: Child) -> None:
        try:
            await child.supervise()
        except ServiceFailed as error:
            workers = {one.spec.name for one in self.children if one.spec.service == "worker"}
            self._given_up.add(child.spec.name)
            if self.settings.more_models and child.spec.name in workers and not workers <= self._given_up:
                child.ready.set()  # so that nothing waits for it
                text = "is given up; the others continue"
                self.screen.say(f"[red]{child.spec.name}[/] {text}: {escape(error.message)}")
                await self._note_failure(child, error)
            else:
                self._fail(error)

    async def _forget_failures(self) -> None:
        """Delete the reasons why bases did not start in an earlier run, which would hold until a worker is up."""
        try:
            await self._write(lambda bus: bus.members.forget_failures(base_settings(self.settings)))
        except QueueError as error:
            raise Unavailable(f"cannot update the state of bases in the queue: {error}") from error

    async def _note_failure(self, child: Child, error: ServiceFailed) -> None:
        """Record why a base does not start, unless its worker has: a worker that the system has killed could not."""
        name, why = child.spec.environment["LORAFLEET_BASE"], error.message.partition("; end of its log")[0]
        try:
            await self._write(lambda bus: bus.members.note_failure(name, why, keep=True))
        except QueueError as away:
            self.screen.say(f"[yellow]queue[/]: cannot record why {child.spec.name} did not start: {away!r}")

    async def _write(self, write: Callable[[Bus], Awaitable[None]]) -> None:
        """Write to the queue with the rights of a worker, which may write the records of bases."""
        door = self.queue.door("worker") if self.queue is not None else {}
        bus = Bus(self.settings.model_copy(update=door).queue_url())
        try:
            await write(bus)
        finally:
            await bus.close()

    async def _drain(self) -> None:
        grace_s = self.settings.grace_s + KILL_AFTER_S
        for service in DRAIN_ORDER:
            children = [child for child in self.children if child.spec.service == service]
            await asyncio.gather(*(child.stop(grace_s) for child in children))

    async def _watch(self, group: asyncio.TaskGroup) -> None:
        """Show which services are starting or ready, and warnings in their logs; keep the queue server running."""
        bus = Bus(self.settings.queue_url())
        announcement: asyncio.Task[None] | None = None
        gateway = httpx2.AsyncClient(base_url=local_url(self.settings), timeout=2, trust_env=False)
        try:
            while True:
                self._revive_queue()
                for child in self.children:
                    child.follow_log()
                    await self._note(child, bus, gateway)
                if announcement is None and await self._bases_are_settled(bus) and await _health(gateway) == 200:
                    self.screen.close()
                    announcement = group.create_task(self._announce())
                settled = announcement is not None and all(child.ready.is_set() for child in self.children)
                await asyncio.sleep(POLL_S if settled else START_POLL_S)
        except LorafleetError as error:
            self._fail(error)
        finally:
            if announcement is not None:
                announcement.cancel()
            await gateway.aclose()
            await bus.close()

    async def _bases_are_settled(self, bus: Bus) -> bool:
        """Return whether every worker is up or given up, and every base was served or has failed, if there are several.

        A fleet with one base needs only a healthy gateway.
        """
        if not self.settings.more_models:
            return True
        workers = [child for child in self.children if child.spec.service == "worker"]
        if not all(child.ready.is_set() for child in workers):
            return False
        try:
            served, failed = await bus.members.bases()
        except CONNECTION_ERRORS:
            return False  # the queue is restarting
        names = set(base_settings(self.settings))
        if not self.settings.swaps:
            names &= {child.spec.environment["LORAFLEET_BASE"] for child in workers}
        missing = names.difference((base.name for base in served), failed)
        if missing:
            self.screen.starting("bases", f"{', '.join(sorted(missing))} not yet served")
        return not missing

    async def _announce(self) -> None:
        try:
            if not await self.on_ready():
                self._stop.set()
        except httpx2.HTTPError as error:
            self._fail(Unavailable(f"the gateway is not responding: {error!r}"))
        except QueueError as error:
            self._fail(Unavailable(f"the queue refused: {error}"))
        except LorafleetError as error:
            self._fail(error)

    def _fail(self, error: LorafleetError) -> None:
        self._failure = self._failure or error
        self._stop.set()

    async def _note(self, child: Child, bus: Bus, gateway: httpx2.AsyncClient) -> None:
        if child.ready.is_set() or self._stop.is_set():
            return
        self.screen.starting(child.spec.name, child.activity)
        try:
            ready = await self._is_ready(child, bus, gateway)
        except CONNECTION_ERRORS:
            return  # the queue is still starting
        if ready:
            child.ready.set()
            self.screen.ready(child.spec.name)

    async def _is_ready(self, child: Child, bus: Bus, gateway: httpx2.AsyncClient) -> bool:
        """Return whether the child has responded or sent a heartbeat since its latest start."""
        since, keys = child.started_ms, bus.keys
        if child.spec.service == "gateway":
            return await _health(gateway) != 0
        if child.spec.service == "scheduler":
            status = await bus.get(keys.status, m.SchedulerStatus)
            return status is not None and status.sent_ms >= since
        if child.spec.service == "store":
            return await bus.members.has_beaten(keys.stores, since)
        beats = (await bus.members.worker_beats()).values()
        return any(beat and beat.name == child.spec.name and beat.sent_ms >= since for beat in beats)

    def _revive_queue(self) -> None:
        if self.queue is not None and self.queue.process.poll() is not None:
            self.screen.say(f"[yellow]queue[/] ended with exit code {self.queue.process.returncode}; restarting it")
            self.queue.start()


async def _health(gateway: httpx2.AsyncClient) -> int:
    """Return the status code of the gateway's health route, 0 if it does not respond."""
    try:
        return (await gateway.get("/health")).status_code
    except httpx2.HTTPError:
        return 0

"""A gateway's view of its fleet: bases, live workers, and the scheduler's status."""

from __future__ import annotations

import logging

from protocol.metrics import series
from protocol.metrics.fleet import WORKERS
from protocol.queue.bus import CONNECTION_ERRORS, Bus, now_ms
from protocol.runtime.model_files import base_settings
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import Unavailable
from protocol.wire.keys import CLASSES

logger = logging.getLogger(__name__)

REFRESH_S = 1.0  # seconds between refreshes


class FleetView:
    """The bases, the number of live workers and the scheduler's status, read from the queue once a second."""

    def __init__(self, bus: Bus, settings: Settings) -> None:
        """Start with the bases of the settings only. Raises BadRequest if two have one name, or a name is reserved."""
        self._bus = bus
        self.in_settings = {
            name: m.AddedBase(model=one.model, added_ms=0) for name, one in base_settings(settings).items()
        }
        """The bases in the settings, which cannot be added or removed at run time."""
        self.names: tuple[str, ...] = ()
        """Names of the served bases, the default one first, whether reported or not."""
        self.set_added(m.AddedBases())
        self.shows_reasons = not settings.api_keys
        """Whether clients may see why a base does not start, which may reveal paths of its machine."""
        self._waits = settings.wait_for_worker_s > 0  # whether calls may wait for a worker
        self._beat_timeout_ms = int(settings.beat_timeout_s * 1000)
        self._reported: dict[str, m.ServedModel] = {}  # bases of `known` that workers have reported
        self._loads: dict[str, m.BaseLoad] = {}  # by the scheduler's latest status
        self._is_mixed = False  # whether workers of several bases have reported
        self.failures: dict[str, str] = {}
        """Base -> why none of its workers has started, unless one has started since."""
        self.status: m.SchedulerStatus | None = None
        self.num_workers = 0
        self.num_queued = self.num_running = 0  # requests, as of the latest `show_workers`

    def set_added(self, added: m.AddedBases) -> None:
        """Set the bases that operators have added and removed."""
        self.removed = [name for name in added.removed if name not in self.in_settings]
        """Names of the bases that operators have removed."""
        self.known = self.in_settings | {n: base for n, base in added.bases.items() if n not in self.in_settings}
        """The served bases by name: those of the settings, beginning with the default one, then added ones."""
        self.further = tuple(self.known)[1:]
        """Names of the served bases besides the default one, including added ones."""
        if self.names != tuple(self.known):
            self.names = tuple(self.known)
            series.BASE_LOAD.clear()

    @property
    def is_ready(self) -> bool:
        """Whether calls of any base are accepted: it is known, and a worker is alive or calls may wait for one."""
        return any(map(self._accepts, self.bases))

    @property
    def bases(self) -> list[m.ServedModel]:
        """The served bases that workers have reported, the default one first."""
        return list(self._reported.values())

    @property
    def base(self) -> m.ServedModel | None:
        """The default base: the one with its name or, if this gateway serves only one, the one that workers serve."""
        return self._reported.get(self.names[0])

    def named(self, name: str) -> m.ServedModel | None:
        """Return the further base of a name, or else the default one; None if no worker has reported it."""
        return self._reported.get(name if name in self.further else self.names[0])

    def is_foreign(self, name: str) -> bool:
        """Return whether a call's base is not served here. If there is only one base, it may have been renamed."""
        return name in self.removed or (name not in ("", *self.names) and (self._is_mixed or len(self.names) > 1))

    def load(self, name: str) -> m.BaseLoad:
        """Return the numbers of workers and requests of a base."""
        return self._loads.get(name, m.BaseLoad())

    def demand_of(self, name: str) -> int:
        """Return the number of requests of one of several bases that need workers, analogous to `demand`."""
        load = self.load(name)
        return max(load.queued + load.running, int(self.named(name) is None))

    def _accepts(self, base: m.ServedModel) -> bool:
        if self._waits:
            return True
        if not (self._is_mixed or self.further):
            return self.num_workers > 0  # known from registrations, also without a scheduler
        load = self.load(base.name)
        if load.workers > 0 or (load.may_become > 0 and base.name not in self.failures):
            return True
        # A registered worker that the scheduler does not count yet is new, and may serve this base.
        return self.num_workers > sum(load.workers for load in self._loads.values())

    async def refresh(self) -> None:
        """Read the fleet's state once. Raises a connection error."""
        with series.QUEUE_ANSWER_SECONDS.time():
            fleet = await self._bus.members.summary(self._beat_timeout_ms)
        self.num_workers, self.status = fleet.num_workers, fleet.status
        self._is_mixed = len(fleet.bases) > 1
        self.set_added(fleet.added)
        self.failures = {name: why for name, why in fleet.failures.items() if name in self.names}
        found = {base.name: base for base in fleet.bases}
        if fleet.bases and not self.further:
            found.setdefault(self.names[0], fleet.bases[0])
        self._reported = {name: found[name] for name in self.names if name in found}
        if self.status is not None:
            self._loads = self.status.bases
        for name in self.names if self.further else ():
            load, demand = self.load(name), self.demand_of(name)
            counts = {"workers": load.workers, "queued": load.queued, "running": load.running, "demand": demand}
            for what, num in counts.items():
                series.BASE_LOAD.labels(name, what).set(num)
        series.FLEET_WORKERS.set(self.num_workers)
        status = self.status or m.SchedulerStatus(queued=0, running=0, workers=0, drain_rate=0.0)
        series.QUEUE_USED_BYTES.set(status.used_bytes)
        series.QUEUE_MAX_BYTES.set(status.max_bytes)
        series.FLEET_DEAD_LETTERS.set(status.dead_letters)
        series.FLEET_HAS_LEADER.set(self.status is not None)
        epoch = status.leader.rpartition(":")[2]
        if epoch.isdecimal():
            series.FLEET_LEADER_EPOCH.set(int(epoch))
        for cls in CLASSES:
            oldest_ms = status.oldest_ms.get(cls, 0)
            series.FLEET_OLDEST_SECONDS.labels(cls).set(max(0, now_ms() - oldest_ms) / 1000 if oldest_ms else 0)

    async def show_workers(self) -> list[m.WorkerBeat]:
        """Update the metrics of the fleet and of each live worker, and return the live workers' heartbeats.

        Returns none while the queue cannot be reached. Requests are counted now: the scheduler's status may be a second
        old, but a client with the last answer must see that nothing runs any more.
        """
        try:
            await self.refresh()
            beats = await self._bus.members.worker_beats()
            self.num_queued, self.num_running = await self._bus.members.load(beats)
        except CONNECTION_ERRORS as error:
            logger.warning("the workers' heartbeats cannot be read: %s", error)
            beats = {}
        series.FLEET_QUEUED.set(self.num_queued)
        series.FLEET_RUNNING.set(self.num_running)
        alive = [beat for beat in beats.values() if beat is not None]
        WORKERS.show(alive)
        return alive

    @property
    def demand(self) -> int:
        """Number of waiting and running requests, for which workers are needed.

        At least one until a worker has reported its model, because no call is accepted before.
        """
        num = self.status.queued + self.status.running if self.status is not None else 0
        return num if self.base is not None else max(num, 1)

    async def require(self, *, worker: bool, name: str = "") -> m.ServedModel:
        """Return the further base of a name, or else the default one.

        Raises Unavailable while it is unknown or, with `worker`, while its calls are not accepted.
        """
        for is_fresh in (False, True):
            base = self.named(name)
            if base is not None and not (worker and not self._accepts(base)):
                return base
            if not is_fresh:
                await self.refresh()  # a worker may have just started
        if not self.further:
            raise Unavailable("no worker is ready to serve the model; it may still be loading")
        text = f"no worker is ready to serve `{name or self.names[0]}`"
        why = self.failures.get(name or self.names[0])
        if why is None and self.load(name or self.names[0]).may_become:
            raise Unavailable(f"{text}; a worker is about to serve it for the first time", code="base_starting")
        if why is None:
            raise Unavailable(f"{text}; it may still be loading")
        raise Unavailable(f"{text}: it did not start{f': {why}' if self.shows_reasons else ''}", code="base_failed")

    async def require_any(self, *, worker: bool) -> None:
        """Raise Unavailable while no base is known or, with `worker`, while no base's calls are accepted."""
        if not (self.is_ready if worker else self.bases):
            await self.refresh()  # a worker may have just started
        if not (self.is_ready if worker else self.bases):
            raise Unavailable("no worker is ready to serve the model; it may still be loading")

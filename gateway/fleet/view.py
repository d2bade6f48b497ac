"""What a gateway sees of its fleet: the bases, the live workers, the scheduler's status."""

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

REFRESH_S = 1.0  # pause between two looks at the fleet


class FleetView:
    """The bases, the number of live workers and the scheduler's status, read from the queue once a second."""

    def __init__(self, bus: Bus, settings: Settings) -> None:
        """Know of nothing but the settings. Raises BadRequest for two bases of one name."""
        self._bus = bus
        self.in_settings = {
            name: m.AddedBase(model=one.model, added_ms=0) for name, one in base_settings(settings).items()
        }
        """The bases that the settings name, which nobody adds or takes away."""
        self.names: tuple[str, ...] = ()
        """The names of `known`, whether or not workers have reported them."""
        self.set_added(m.AddedBases())
        self._name = next(iter(self.known))
        self.shows_reasons = not settings.api_keys
        """Whether clients may know why a base does not start, which may name paths of its machine."""
        self._waits = settings.wait_for_worker_s > 0  # calls wait in the queue for a worker
        self._beat_timeout_ms = int(settings.beat_timeout_s * 1000)
        self._reported: dict[str, m.ServedModel] = {}  # bases that workers have reported, by the names of `known`
        self._loads: dict[str, m.BaseLoad] = {}  # as the scheduler last said
        self._is_mixed = False  # whether workers of several bases have reported
        self.failures: dict[str, str] = {}
        """Base -> why no worker of it has started, where none has since."""
        self.status: m.SchedulerStatus | None = None
        self.num_workers = 0
        self.num_queued = self.num_running = 0  # requests, when `show_workers` last looked

    def set_added(self, added: m.AddedBases) -> None:
        """Take what operators have added and taken away until now: further bases are asked here from now on, or not."""
        self.removed = [name for name in added.removed if name not in self.in_settings]
        """The names of bases that operators have taken away."""
        self.known = self.in_settings | {n: base for n, base in added.bases.items() if n not in self.in_settings}
        """The bases that are asked here, the default one first: those of the settings, then added ones."""
        self.further = tuple(self.known)[1:]
        """The names of those besides the default one."""
        if self.names != tuple(self.known):
            self.names = tuple(self.known)
            series.BASE_LOAD.clear()

    @property
    def is_ready(self) -> bool:
        """Whether calls of any base are accepted: it is known, and a worker is alive or calls wait for one."""
        return any(map(self._accepts, self.bases))

    @property
    def bases(self) -> list[m.ServedModel]:
        """The bases that workers have reported and that are asked here, the default one first."""
        return list(self._reported.values())

    @property
    def base(self) -> m.ServedModel | None:
        """The default base: that of its name or, where this gateway has one base only, what workers serve."""
        return self._reported.get(self._name)

    def named(self, name: str) -> m.ServedModel | None:
        """Return a further base by its name, or else the default one; None if no worker has reported it."""
        return self._reported.get(name if name in self.further else self._name)

    def is_foreign(self, name: str) -> bool:
        """Return whether a call's base is none of those asked here. A fleet's only one may have had other names."""
        return name in self.removed or (name not in ("", *self.names) and (self._is_mixed or len(self.names) > 1))

    def load(self, name: str) -> m.BaseLoad:
        """Return how many workers, and requests, a base has."""
        return self._loads.get(name, m.BaseLoad())

    def demand_of(self, name: str) -> int:
        """Return how many requests workers of one of several bases are needed for, as `demand` does of the fleet."""
        load = self.load(name)
        return max(load.queued + load.running, int(self.named(name) is None))

    def _accepts(self, base: m.ServedModel) -> bool:
        if self._waits:
            return True
        if not (self._is_mixed or self.further):
            return self.num_workers > 0  # the register says enough, also while there is no scheduler
        load = self.load(base.name)
        if load.workers > 0 or (load.may_become > 0 and base.name not in self.failures):
            return True
        # A registered worker that the scheduler does not count has just come, and may be of this base.
        return self.num_workers > sum(load.workers for load in self._loads.values())

    async def refresh(self) -> None:
        """Read all of it once. Raises a connection error."""
        with series.QUEUE_ANSWER_SECONDS.time():
            fleet = await self._bus.members.summary(self._beat_timeout_ms)
        self.num_workers, self.status = fleet.num_workers, fleet.status
        self._is_mixed = len(fleet.bases) > 1
        self.set_added(fleet.added)
        self.failures = {name: why for name, why in fleet.failures.items() if name in self.names}
        found = {base.name: base for base in fleet.bases}
        if fleet.bases and not self.further:
            found.setdefault(self._name, fleet.bases[0])
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
        """Set the fleet's metrics and those of each live worker, and return these workers' heartbeats.

        There are none while the queue cannot be reached. Requests are counted now: the scheduler's status may be a
        second old, and who has the last answer is to see that nothing runs any more.
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
        """How many requests workers are needed for: those that wait and those that run.

        At least one before any worker has reported its model, since without it no call can be accepted.
        """
        num = self.status.queued + self.status.running if self.status is not None else 0
        return num if self.base is not None else max(num, 1)

    async def require(self, *, worker: bool, name: str = "") -> m.ServedModel:
        """Return a further base by its name, or else the default one.

        Raises Unavailable while it is unknown or, with `worker`, its calls are not accepted.
        """
        for is_fresh in (False, True):
            base = self.named(name)
            if base is not None and not (worker and not self._accepts(base)):
                return base
            if not is_fresh:
                await self.refresh()  # a worker may just have come up
        if not self.further:
            raise Unavailable("no worker is ready to serve the model; it may still be loading")
        text = f"no worker is ready to serve `{name or self._name}`"
        why = self.failures.get(name or self._name)
        if why is None and self.load(name or self._name).may_become:
            raise Unavailable(f"{text}; a worker is about to serve it for the first time", code="base_starting")
        if why is None:
            raise Unavailable(f"{text}; it may still be loading")
        raise Unavailable(f"{text}: it did not start{f': {why}' if self.shows_reasons else ''}", code="base_failed")

    async def require_any(self, *, worker: bool) -> None:
        """Raise Unavailable while no base is known or, with `worker`, no calls of any are accepted."""
        if not (self.is_ready if worker else self.bases):
            await self.refresh()  # a worker may just have come up
        if not (self.is_ready if worker else self.bases):
            raise Unavailable("no worker is ready to serve the model; it may still be loading")

"""What a gateway sees of its fleet: the base model, the live workers, the scheduler's status."""

from __future__ import annotations

import logging

from protocol.metrics import series
from protocol.metrics.fleet import WORKERS
from protocol.queue.bus import CONNECTION_ERRORS, Bus, now_ms
from protocol.wire import messages as m
from protocol.wire.errors import Unavailable
from protocol.wire.keys import CLASSES

logger = logging.getLogger(__name__)

REFRESH_S = 1.0  # pause between two looks at the fleet


class FleetView:
    """The base model, the number of live workers and the scheduler's status, read from the queue once a second."""

    def __init__(self, bus: Bus, beat_timeout_s: float, *, waits: bool = False) -> None:
        """Take the silence after which a worker counts as dead, and whether calls wait in the queue for a worker."""
        self._bus = bus
        self._waits = waits
        self._beat_timeout_ms = int(beat_timeout_s * 1000)
        self.base: m.ServedModel | None = None
        self.status: m.SchedulerStatus | None = None
        self.num_workers = 0

    @property
    def is_ready(self) -> bool:
        """Whether calls are accepted: the base model is known, and a worker is alive or calls wait for one."""
        return self.base is not None and (self.num_workers > 0 or self._waits)

    async def refresh(self) -> None:
        """Read all of it once. Raises a connection error."""
        with series.QUEUE_ANSWER_SECONDS.time():
            fleet = await self._bus.members.summary(self._beat_timeout_ms)
        self.num_workers, self.base, self.status = fleet.num_workers, fleet.base, fleet.status
        series.FLEET_WORKERS.set(self.num_workers)
        status = self.status or m.SchedulerStatus(queued=0, running=0, workers=0, drain_rate=0.0)
        series.FLEET_QUEUED.set(status.queued)
        series.FLEET_RUNNING.set(status.running)
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

        There are none while the queue cannot be reached.
        """
        try:
            await self.refresh()
            beats = await self._bus.members.worker_beats()
        except CONNECTION_ERRORS as error:
            logger.warning("the workers cannot be seen: %s", error)
            beats = {}
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

    async def require(self, *, worker: bool) -> m.ServedModel:
        """Return the base model. Raises Unavailable while it is unknown or, with `worker`, calls are not accepted."""
        if self.base is None or (worker and not self.is_ready):
            await self.refresh()  # a worker may just have come up
        if self.base is None or (worker and not self.is_ready):
            raise Unavailable("no worker is ready to serve the model; it may still be loading")
        return self.base

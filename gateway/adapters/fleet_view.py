"""What a gateway sees of its fleet: the base model, the live workers, the scheduler's status."""

from __future__ import annotations

import asyncio
import logging

from protocol.queue.bus import CONNECTION_ERRORS, Bus
from protocol.runtime.metrics import (
    FLEET_QUEUED,
    FLEET_RUNNING,
    FLEET_WORKERS,
    QUEUE_MAX_BYTES,
    QUEUE_USED_BYTES,
    WORKERS,
)
from protocol.wire import messages as m
from protocol.wire.errors import Unavailable

logger = logging.getLogger(__name__)

REFRESH_S = 1.0


class FleetView:
    """The base model, the number of live workers and the scheduler's status, read from the queue once a second."""

    def __init__(self, bus: Bus, beat_timeout_s: float) -> None:
        """`beat_timeout_s`: silence after which a worker counts as dead."""
        self._bus = bus
        self._beat_timeout_ms = int(beat_timeout_s * 1000)
        self.base: m.ServedModel | None = None
        self.status: m.SchedulerStatus | None = None
        self.num_workers = 0

    @property
    def is_ready(self) -> bool:
        """Whether a worker is alive and the base model is known."""
        return self.base is not None and self.num_workers > 0

    async def refresh(self) -> None:
        """Read all of it once. Raises a connection error."""
        fleet = await self._bus.members.summary(self._beat_timeout_ms)
        self.num_workers, self.base, self.status = fleet.num_workers, fleet.base, fleet.status
        FLEET_WORKERS.set(self.num_workers)
        FLEET_QUEUED.set(self.status.queued if self.status else 0)
        FLEET_RUNNING.set(self.status.running if self.status else 0)
        QUEUE_USED_BYTES.set(self.status.used_bytes if self.status else 0)
        QUEUE_MAX_BYTES.set(self.status.max_bytes if self.status else 0)

    async def watch(self) -> None:
        """Refresh until cancelled."""
        while True:
            try:
                await self.refresh()
            except CONNECTION_ERRORS as error:
                logger.warning("the fleet cannot be seen: %s", error)
            except Exception:
                logger.exception("the fleet cannot be seen")
            await asyncio.sleep(REFRESH_S)

    async def show_workers(self) -> None:
        """Set the metrics of each live worker; there are none while the queue cannot be reached."""
        try:
            beats = await self._bus.members.worker_beats()
        except CONNECTION_ERRORS as error:
            logger.warning("the workers cannot be seen: %s", error)
            beats = {}
        WORKERS.show(beat for beat in beats.values() if beat is not None)

    async def require(self, *, worker: bool) -> m.ServedModel:
        """Return the base model. Raises Unavailable while it is unknown or, with `worker`, no worker is alive."""
        if self.base is None or (worker and not self.is_ready):
            await self.refresh()  # a worker may just have come up
        if self.base is None or (worker and not self.is_ready):
            raise Unavailable("no worker is ready to serve the model; it may still be loading")
        return self.base

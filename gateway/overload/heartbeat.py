"""A gateway's heartbeat, sent by a thread with its own event loop and its own connection to the queue.

Heartbeats of the main loop would be late under high load, and a scheduler would declare the gateway dead and cancel its
calls. The thread sends them as long as the main loop makes any progress. A tick due ten times a second measures the
main loop's lag.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from protocol.queue.bus import Bus, DiskFull
from protocol.runtime.guarded import FAILED

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pace:
    """Intervals of a heartbeat."""

    tick_s: float = 0.1
    beat_s: float = 1.0
    ttl_ms: int = 5000  # TTL of the heartbeat in the queue
    stuck_s: float = 60.0  # maximum time without progress of the main loop; then heartbeats stop
    clock: Callable[[], float] = time.monotonic


class LoopLag:
    """Measures how late an event loop runs. Pure.

    The lag is the minimum of the last three ticks' delays: one slow callback, or a suspended process, is no overload.
    """

    NUM_TICKS = 3

    def __init__(self, tick_s: float, now_s: float) -> None:
        """tick_s: interval of ticks of a loop that is on time."""
        self._tick_s = tick_s
        self.ticked_s = now_s
        """Time of the latest tick."""
        self._delays_s = deque([0.0] * self.NUM_TICKS, self.NUM_TICKS)  # oldest first

    def tick(self, now_s: float) -> None:
        """Record a tick."""
        self._delays_s.append(now_s - self.ticked_s - self._tick_s)
        self.ticked_s = now_s

    def lag_s(self, now_s: float) -> float:
        """Return a lower bound of the loop's lag; an overdue tick replaces the oldest."""
        oldest_s, *others_s = self._delays_s
        return min(max(oldest_s, now_s - self.ticked_s - self._tick_s), *others_s)


class HeartbeatDied(RuntimeError):
    """The heartbeat's thread has ended, so the scheduler will declare the gateway dead."""


class Heartbeat:
    """Sends a gateway's heartbeat once a second, and measures the lag of its event loop."""

    def __init__(self, url: str, gid: str, pace: Pace | None = None) -> None:
        """url: of the queue; gid: id of the gateway."""
        self._url = url
        self._gid = gid
        self._pace = pace or Pace()
        self._lag = LoopLag(self._pace.tick_s, self._pace.clock())
        self._failure: BaseException | None = None  # exception that ended the thread
        self.disk_full = False
        """Whether the queue's server refused the last heartbeat because it cannot write to its disk."""

    @property
    def lag_s(self) -> float:
        """Lower bound of the main loop's lag, in seconds."""
        return self._lag.lag_s(self._pace.clock())

    async def tick(self) -> None:
        """Measure the main loop, on which this must run, until cancelled. Raises HeartbeatDied."""
        while self._failure is None:
            await asyncio.sleep(self._pace.tick_s)
            self._lag.tick(self._pace.clock())
        raise HeartbeatDied("the heartbeat's thread has died") from self._failure

    @contextlib.asynccontextmanager
    async def beating(self, bus: Bus, address: str) -> AsyncIterator[None]:
        """Send heartbeats during the block; the first is sent through `bus` before it begins.

        address: of the gateway.
        """
        await self._beat_once(bus, address)
        loop = asyncio.new_event_loop()
        task = loop.create_task(self._beats(address))
        is_leaving = False

        def run() -> None:
            try:
                loop.run_until_complete(task)
            except asyncio.CancelledError as error:
                self._failure = None if is_leaving else error
            except BaseException as error:  # noqa: BLE001  `tick` raises it in the main loop
                self._failure = error

        thread = threading.Thread(target=run, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_leaving = True
            loop.call_soon_threadsafe(task.cancel)
            await asyncio.to_thread(thread.join)
            loop.close()

    async def _beats(self, address: str) -> None:
        bus = Bus(self._url)
        try:
            while True:
                await self._beat_unless_stuck(bus, address)
                await asyncio.sleep(self._pace.beat_s)
        finally:
            await bus.close()

    async def _beat_unless_stuck(self, bus: Bus, address: str) -> None:
        stuck_s = self._pace.clock() - self._lag.ticked_s
        if stuck_s > self._pace.stuck_s:
            logger.error("no heartbeat: the event loop has been blocked for %.0f s", stuck_s)
            return
        try:
            await self._beat_once(bus, address)
            self.disk_full = False
        except Exception as error:  # noqa: BLE001  the next heartbeat follows in a second
            self.disk_full = isinstance(error, DiskFull)
            FAILED.note("heartbeat", error)

    async def _beat_once(self, bus: Bus, address: str) -> None:
        key, registry = bus.keys.gateway_beat(self._gid), bus.keys.gateways
        await bus.members.beat(key, registry, self._gid, address.encode(), self._pace.ttl_ms)

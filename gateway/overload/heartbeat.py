"""A gateway's heartbeat, sent by a thread with its own event loop and its own connection to the queue.

Heartbeats of the main loop would be late under high load. A scheduler would then declare the gateway dead and cancel
all its calls. The thread sends them for as long as the main loop makes progress at all; it also measures the main
loop's lag, by a tick that is due ten times a second.
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
    """How often a heartbeat does what."""

    tick_s: float = 0.1
    beat_s: float = 1.0
    ttl_ms: int = 5000  # TTL of the heartbeat in the queue
    stuck_s: float = 60.0  # without a turn of its loop a gateway counts as dead, though its process lives
    clock: Callable[[], float] = time.monotonic


class LoopLag:
    """How late an event loop runs. Pure.

    Lag is the least of the last three ticks' delays: one long turn, or a process that was stopped, is no overload.
    """

    NUM_TICKS = 3

    def __init__(self, tick_s: float, now_s: float) -> None:
        """`tick_s`: time from tick to tick of a loop that is on time."""
        self._tick_s = tick_s
        self.ticked_s = now_s
        """When the loop was last seen to turn."""
        self._delays_s = deque([0.0] * self.NUM_TICKS, self.NUM_TICKS)  # oldest first

    def tick(self, now_s: float) -> None:
        """Note that the loop has turned."""
        self._delays_s.append(now_s - self.ticked_s - self._tick_s)
        self.ticked_s = now_s

    def lag_s(self, now_s: float) -> float:
        """Return a lower bound of the loop's lag; the tick that is overdue takes the place of the oldest."""
        oldest_s, *others_s = self._delays_s
        return min(max(oldest_s, now_s - self.ticked_s - self._tick_s), *others_s)


class HeartbeatDied(RuntimeError):
    """Nothing says any more that this gateway lives."""


class Heartbeat:
    """Says once a second that a gateway lives, and knows how late its event loop is."""

    def __init__(self, url: str, gid: str, pace: Pace | None = None) -> None:
        """`url`: the queue's; `gid`: the gateway's id."""
        self._url = url
        self._gid = gid
        self._pace = pace or Pace()
        self._lag = LoopLag(self._pace.tick_s, self._pace.clock())
        self._failure: BaseException | None = None  # exception that ended the thread
        self.disk_full = False
        """Whether the queue's server has refused the last heartbeat since it cannot write to its disk."""

    @property
    def lag_s(self) -> float:
        """Lower bound of the main loop's lag."""
        return self._lag.lag_s(self._pace.clock())

    async def tick(self) -> None:
        """Measure the main loop, which runs this, until cancelled. Raises HeartbeatDied."""
        while self._failure is None:
            await asyncio.sleep(self._pace.tick_s)
            self._lag.tick(self._pace.clock())
        raise HeartbeatDied("the heartbeat's thread has died") from self._failure

    @contextlib.asynccontextmanager
    async def beating(self, bus: Bus, address: str) -> AsyncIterator[None]:
        """Send heartbeats meanwhile, the first through `bus` before this returns. `address`: the gateway's."""
        await self._beat_once(bus, address)
        loop = asyncio.new_event_loop()
        task = loop.create_task(self._beats(address))
        is_leaving = False

        def run() -> None:
            try:
                loop.run_until_complete(task)
            except asyncio.CancelledError as error:
                self._failure = None if is_leaving else error
            except BaseException as error:  # noqa: BLE001  the thread's edge: `tick` tells of it
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
        except Exception as error:  # noqa: BLE001  the turn's edge: the next heartbeat is a second away
            self.disk_full = isinstance(error, DiskFull)
            FAILED.note("heartbeat", error)

    async def _beat_once(self, bus: Bus, address: str) -> None:
        key, registry = bus.keys.gateway_beat(self._gid), bus.keys.gateways
        await bus.members.beat(key, registry, self._gid, address.encode(), self._pace.ttl_ms)

"""A gateway's sign of life, from a thread with a loop and a connection of its own.

Beats of the gateway's own loop would be late just when it has most to do: then a scheduler takes it for dead, and
cancels all that it has let in. The thread beats for as long as that loop turns at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable

from protocol.queue.bus import CONNECTION_ERRORS, Bus

logger = logging.getLogger(__name__)

BEAT_S = 1.0
BEAT_TTL_MS = 5000
STUCK_S = 60.0
"""Time without a turn of its loop after which a gateway counts as dead, though its process lives."""


class Pulse:
    """Says once a second that a gateway lives."""

    def __init__(self, url: str, gid: str, address: str, turned_s: Callable[[], float]) -> None:
        """`url`: the queue's; `address`: the gateway's; `turned_s`: when its loop turned last, monotonic."""
        self._url = url
        self._gid = gid
        self._address = address
        self._turned_s = turned_s

    @contextlib.asynccontextmanager
    async def beating(self) -> AsyncIterator[None]:
        """Beat meanwhile."""
        loop = asyncio.new_event_loop()
        task = loop.create_task(self._beats())

        def run() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                loop.run_until_complete(task)

        thread = threading.Thread(target=run, name="pulse", daemon=True)
        thread.start()
        try:
            yield
        finally:
            loop.call_soon_threadsafe(task.cancel)
            await asyncio.to_thread(thread.join)
            loop.close()

    async def beat_once(self, bus: Bus) -> None:
        keys = bus.keys
        await bus.members.beat(
            keys.gateway_beat(self._gid), keys.gateways, self._gid, self._address.encode(), BEAT_TTL_MS
        )

    async def _beats(self) -> None:
        bus = Bus(self._url)
        try:
            while True:
                await self._beat(bus)
                await asyncio.sleep(BEAT_S)
        finally:
            await bus.close()

    async def _beat(self, bus: Bus) -> None:
        stuck_s = time.monotonic() - self._turned_s()
        if stuck_s > STUCK_S:
            logger.error("no beat: the loop has not turned for %.0f s", stuck_s)
            return
        try:
            await self.beat_once(bus)
        except CONNECTION_ERRORS as error:
            logger.warning("no beat: %s", error)
        except Exception:
            logger.exception("no beat")

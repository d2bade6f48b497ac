"""The scheduler on the queue: one process leads; standbys take over when its lease expires.

A leadership is one `Session`. It begins by reading the queue's state, so no state of the scheduler has to survive, and
ends with the loss of the lease or the connection. Then a new one begins, here or in a standby.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time

from protocol.metrics import series as metrics
from protocol.metrics.pages import serve_metrics
from protocol.queue.bus import CONNECTION_ERRORS, Bus
from protocol.runtime.backoff import Backoff
from protocol.runtime.guarded import CALM_S, FAILED
from protocol.runtime.service import wait_any
from protocol.runtime.settings import Settings
from protocol.runtime.tracing import tracing
from protocol.wire.errors import Internal
from scheduler.config import SchedulerConfig
from scheduler.fairness import VirtualTokenCounters
from scheduler.session import Deposed, Lease, Session

logger = logging.getLogger(__name__)

LEASE_MS = 2500
AGAIN = Backoff(LEASE_MS / 1000, 30.0)
"""Backoff after leaderships that an unexpected error has ended."""

TRY_S = 0.25
"""Seconds between a standby's attempts: it leads at most LEASE_MS + TRY_S, less than 3 s, after the last renewal."""


async def serve(settings: Settings, stop: asyncio.Event) -> int:
    """Lead or stand by until `stop`. Returns the exit code. Raises Internal if the queue may lose requests."""
    bus = Bus(settings.queue_url())
    candidate = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    counters = VirtualTokenCounters(SchedulerConfig.of(settings).max_lag)  # survive a lost connection
    try:
        with tracing(settings, "scheduler", candidate), serve_metrics(settings.metrics_port):
            num_failures = 0
            while not stop.is_set():
                begun_s, pause_s = time.monotonic(), TRY_S
                try:
                    await _lead(bus, settings, candidate, counters, stop)
                except Deposed:
                    logger.warning("another scheduler is now the leader")
                except Internal:
                    raise
                except Exception as error:  # noqa: BLE001  the leadership's edge: the next one re-reads the queue
                    FAILED.note("leadership", error)
                    if not isinstance(
                        error, CONNECTION_ERRORS
                    ):  # a standby may do better; its lease runs out meanwhile
                        num_failures = num_failures + 1 if time.monotonic() - begun_s < CALM_S else 1
                        pause_s = AGAIN.pause_s(num_failures)
                await wait_any(stop, pause_s)
            return 0
    finally:
        await bus.close()


async def _lead(
    bus: Bus, settings: Settings, candidate: str, counters: VirtualTokenCounters, stop: asyncio.Event
) -> None:
    """Try to get the lease; if successful, lead until `stop` and release it."""
    token = await bus.lead("", candidate, LEASE_MS)
    if not token:
        return
    await bus.server.check()
    if not (await bus.memory())[1]:
        logger.warning("the queue has no maxmemory: it may use all memory of its machine")
    await bus.restarted()  # only later restarts count
    logger.info("elected leader as %s", token)
    metrics.SCHEDULER_LEADS.set(1)
    try:
        await Session(bus, settings, Lease(token, candidate, LEASE_MS), counters).run(stop)
        await bus.lead(token, candidate, 0)  # a duration of 0 ms releases the lease
    finally:
        metrics.SCHEDULER_LEADS.set(0)

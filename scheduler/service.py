"""The scheduler on the queue: one process leads, the others stand by and take over when its lease runs out.

A leadership is one `Session`. It begins by reading the queue's state, so that nothing has to survive it, and ends when
the lease or the connection is lost; then a new one begins, here or in a standby.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket

from protocol.metrics import series as metrics
from protocol.metrics.pages import serve_metrics
from protocol.queue.bus import CONNECTION_ERRORS, Bus
from protocol.runtime.service import wait_any
from protocol.runtime.settings import Settings
from protocol.runtime.tracing import tracing
from scheduler.core import SchedulerConfig
from scheduler.fairness import VirtualTokenCounters
from scheduler.session import Deposed, Lease, Session

logger = logging.getLogger(__name__)

LEASE_MS = 2500
TRY_S = 0.25
"""Pause between a standby's attempts: it leads at most LEASE_MS + TRY_S, less than 3 s, after the last renewal."""


async def serve(settings: Settings, stop: asyncio.Event) -> int:
    """Lead or stand by until `stop`. Returns the exit code. Raises Internal when the queue may lose requests."""
    bus = Bus(settings.queue_url())
    candidate = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    counters = VirtualTokenCounters(
        SchedulerConfig.of(settings).max_lag
    )  # what tenants have had outlives a lost connection
    try:
        with tracing(settings, "scheduler", candidate), serve_metrics(settings.metrics_port):
            while not stop.is_set():
                try:
                    await _lead(bus, settings, candidate, counters, stop)
                except Deposed:
                    logger.warning("another scheduler leads now")
                except CONNECTION_ERRORS as error:
                    logger.warning("queue connection lost: %r", error)
                await wait_any(stop, TRY_S)
            return 0
    finally:
        await bus.close()


async def _lead(
    bus: Bus, settings: Settings, candidate: str, counters: VirtualTokenCounters, stop: asyncio.Event
) -> None:
    """Try to get the lease; if that works, lead until `stop` and give it back."""
    token = await bus.lead("", candidate, LEASE_MS)
    if not token:
        return
    await bus.check()
    if not (await bus.memory())[1]:
        logger.warning("the queue has no maxmemory: it may take all of its machine's memory")
    await bus.restarted()  # only later restarts count
    logger.info("leading as %s", token)
    metrics.SCHEDULER_LEADS.set(1)
    try:
        await Session(bus, settings, Lease(token, candidate, LEASE_MS), counters).run(stop)
        await bus.lead(token, candidate, 0)  # a duration of 0 ms gives the lease back
    finally:
        metrics.SCHEDULER_LEADS.set(0)

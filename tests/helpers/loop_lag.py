"""How long an event loop is held at a time, in CPU seconds of its thread, so that a busy machine does not count."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Lag:
    """What was found."""

    longest_s: float = 0.0
    num_ticks: int = 0


@asynccontextmanager
async def measured_lag(name: str = "") -> AsyncIterator[Lag]:
    """Measure the current loop until the block ends: what it does within a millisecond, and the round that ends it.

    The result is logged under `name`; `pytest --log-cli-level=info` shows it.
    """
    lag = Lag()

    async def tick() -> None:
        before_s = time.thread_time()
        while True:
            await asyncio.sleep(0.001)  # others have their turn, and threads the interpreter
            now_s = time.thread_time()
            lag.longest_s = max(lag.longest_s, now_s - before_s)
            lag.num_ticks += 1
            before_s = now_s

    ticking = asyncio.create_task(tick())
    try:
        yield lag
    finally:
        await asyncio.sleep(0.002)
        ticking.cancel()
        logger.info("%s: the loop was held for at most %.2f ms", name, 1000 * lag.longest_s)

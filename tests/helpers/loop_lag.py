"""Measures how long an event loop is blocked at a time, in CPU seconds of its thread, independent of other load."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from protocol.runtime.service import YOUNG_OBJECTS

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Lag:
    """The result of a measurement."""

    longest_s: float = 0.0
    num_rounds: int = 0


@asynccontextmanager
async def measured_lag(name: str = "") -> AsyncIterator[Lag]:
    """Measure the rounds of the current loop until the block ends.

    In one round the loop runs everything that is ready; nothing else runs in the meantime, neither a call whose socket
    became readable nor a timer. The result is logged under `name`; `pytest --log-cli-level=info` shows it.
    """
    lag, loop = Lag(), asyncio.get_running_loop()
    run_once = getattr(loop, "_run_once")  # noqa: B009  private

    def measured_once() -> None:
        before_s = time.thread_time()
        run_once()  # waiting for events takes no CPU time
        lag.longest_s = max(lag.longest_s, time.thread_time() - before_s)
        lag.num_rounds += 1

    thresholds = gc.get_threshold()
    gc.freeze()  # as in a service: collections skip imported objects
    gc.set_threshold(YOUNG_OBJECTS, *thresholds[1:])
    await asyncio.sleep(0)  # lets everything that is ready run unmeasured
    setattr(loop, "_run_once", measured_once)  # noqa: B010  private
    try:
        yield lag
    finally:
        await asyncio.sleep(0.002)  # includes cleanup after the answer
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        delattr(loop, "_run_once")
        logger.info("%s: the loop was held for at most %.2f ms", name, 1000 * lag.longest_s)

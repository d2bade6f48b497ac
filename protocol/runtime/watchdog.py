"""Ends a process that lives but does not work any more, so that it is restarted, with all its stacks in the log.

A heartbeat that stops takes a process's work away from it, and nothing restarts it. The timer is `faulthandler`'s: a
thread that needs no interpreter, so it fires too while a call into a library never returns and holds the interpreter.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

STUCK_S = 60.0
"""Seconds without a turn of its event loop after which a service is ended."""

LOADING_S = 600.0
"""The same while a model is loaded and compiled: libraries hold the interpreter for long then."""


class Watchdog:
    """Ends this process, exit code 1, unless its event loop turns, and what else is required of it makes progress.

    `protocol.runtime.service.run` runs it. There is one in a process, since the system timer is the process's.
    """

    def __init__(self) -> None:
        self.limit_s = STUCK_S
        self._progress: Callable[[], object] | None = None
        self._is_wound = False

    def require(self, progress: Callable[[], object] | None, limit_s: float) -> None:
        """Require that what `progress` returns changes at least every `limit_s`; None: only that the loop turns."""
        self._progress, self.limit_s = progress, limit_s
        if self._is_wound:  # with another limit
            self.wind()

    async def watch(self) -> None:
        """Wind the timer as long as there is progress, until cancelled. What follows has once more `limit_s`."""
        try:
            seen, seen_s, warned = object(), time.monotonic(), False
            while True:
                now = self._progress() if self._progress is not None else object()
                if now != seen:
                    seen, seen_s, warned = now, time.monotonic(), False
                    self.wind()
                elif not warned and time.monotonic() - seen_s > self.limit_s / 2:
                    warned = True
                    logger.error(
                        "no progress for %.0f s; this process exits after %g s", self.limit_s / 2, self.limit_s
                    )
                await asyncio.sleep(min(1.0, self.limit_s / 4))
        finally:
            self.wind()

    def wind(self) -> None:
        """Let the timer run from now."""
        self._is_wound = True
        faulthandler.dump_traceback_later(self.limit_s, exit=True)


WATCHDOG = Watchdog()
"""This process's."""

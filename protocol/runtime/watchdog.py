"""Ends a process that lives but no longer works, with all its stacks in the log, so that it is restarted.

Without heartbeats, a process only loses its work, and nothing restarts it. The timer is `faulthandler`'s, a thread that
does not need the interpreter. So it fires even if a library call never returns and holds the interpreter's lock.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

STUCK_S = 60.0
"""Seconds without an iteration of its event loop after which a service is ended."""

LOADING_S = 600.0
"""The same while a model is loaded and compiled, when libraries hold the interpreter's lock for long."""


class Watchdog:
    """Ends this process, exit code 1, unless its event loop runs and its required progress is made.

    `protocol.runtime.service.run` runs it. A process has one, since it has one `faulthandler` timer.
    """

    def __init__(self) -> None:
        self.limit_s = STUCK_S
        self._progress: Callable[[], object] | None = None
        self._is_wound = False

    def require(self, progress: Callable[[], object] | None, limit_s: float) -> None:
        """Require that the result of `progress` changes at least every `limit_s`; None: only that the loop runs."""
        self._progress, self.limit_s = progress, limit_s
        if self._is_wound:  # restart the timer with the new limit
            self.wind()

    async def watch(self) -> None:
        """Restart the timer while there is progress, until cancelled; then leave `limit_s` for what follows."""
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
        """Restart the timer."""
        self._is_wound = True
        faulthandler.dump_traceback_later(self.limit_s, exit=True)


WATCHDOG = Watchdog()
"""The watchdog of this process."""

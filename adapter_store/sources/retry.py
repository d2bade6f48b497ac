"""Trying again: exponential pauses, the server's Retry-After, an end."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from time import time

from protocol.wire.errors import Unavailable

logger = logging.getLogger(__name__)

MAX_TRIES = 5
MAX_PAUSE_S = 60.0


class Attempts:
    """The tries of one call."""

    def __init__(self, first_pause_s: float) -> None:
        self._pause_s = first_pause_s
        self._num_failed = 0

    async def pause(self, reason: str, headers: Mapping[str, str] | None = None) -> None:
        """Wait before the next try, as long as the server asks. Raises Unavailable when there have been enough."""
        self._num_failed += 1
        asked_s = _retry_after_s(headers or {})
        if self._num_failed >= MAX_TRIES or asked_s > MAX_PAUSE_S:
            raise Unavailable(f"{reason}, {self._num_failed} times")
        pause_s = max(asked_s, self._pause_s * random.uniform(0.5, 1.0))
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        logger.info("%s: trying again in %.1f s", reason, pause_s)
        await asyncio.sleep(pause_s)


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """Return the pause that a response asks for: seconds, or a date; 0 if none."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except (ValueError, TypeError):
        return 0.0

"""Retries of calls to a source: exponential backoff, at least the server's Retry-After, and a maximum."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time

from protocol.wire.errors import Unavailable

logger = logging.getLogger(__name__)

MAX_PAUSE_S = 60.0


@dataclass(frozen=True, slots=True)
class Retries:
    """Maximum number of tries of a call, and the pause after its first failure; later pauses double."""

    max_tries: int = 5
    first_pause_s: float = 0.5


class Attempts:
    """The attempts of one call."""

    def __init__(self, retries: Retries) -> None:
        """Start a call, without a failed attempt."""
        self._max_tries = retries.max_tries
        self._pause_s = retries.first_pause_s
        self._num_failed = 0

    async def pause(self, reason: str, headers: Mapping[str, str] | None = None) -> None:
        """Wait before the next attempt, at least as long as `headers` ask for.

        Raises Unavailable, with `reason`, after the last attempt or if the server asks for more than MAX_PAUSE_S.
        """
        self._num_failed += 1
        asked_s = _retry_after_s(headers or {})
        if self._num_failed >= self._max_tries or asked_s > MAX_PAUSE_S:
            raise Unavailable(f"{reason}, {self._num_failed} times")
        pause_s = max(asked_s, self._pause_s * random.uniform(0.5, 1.0))
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        logger.info("%s: trying again in %.1f s", reason, pause_s)
        await asyncio.sleep(pause_s)


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """Return the pause in seconds that a response asks for, by seconds or a date; 0 without one."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except (ValueError, TypeError):
        return 0.0

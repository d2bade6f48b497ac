"""The time that adapters spend in this worker's pool, for the fleet's accounting. Pure.

The worker samples once a second, so each stay is accurate to about a second; unreported time is lost if it dies.
"""

from __future__ import annotations

from collections.abc import Iterable

from peft_adapters.recipe import is_merge

TELL_S = 30.0
"""Seconds between reports. A killed worker loses at most this much time per adapter."""


class ResidencyTime:
    """Sums up each adapter's time between two reports."""

    def __init__(self, now_s: float) -> None:
        """now_s: monotonic, as in all methods."""
        self._looked_s = now_s
        self._told_s = now_s
        self._seconds: dict[str, float] = {}

    def look(self, resident: Iterable[str], now_s: float) -> None:
        """Add the time since the last call to the adapters that are in the pool now. Merges are not accounted."""
        passed_s = now_s - self._looked_s
        self._looked_s = now_s
        for digest in resident:
            if not is_merge(digest):
                self._seconds[digest] = self._seconds.get(digest, 0.0) + passed_s

    def take(self, now_s: float, *, at_once: bool = False) -> dict[str, int]:
        """Return the times to report, ms by digest, and reset them; empty within `TELL_S`, unless `at_once`."""
        if not at_once and now_s - self._told_s < TELL_S:
            return {}
        found = {digest: round(seconds * 1000) for digest, seconds in self._seconds.items()}
        self._told_s, self._seconds = now_s, {}
        return found

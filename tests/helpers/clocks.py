"""Clocks whose time or speed a test sets."""

from __future__ import annotations

import time


class SetClock:
    """Seconds set by a test; callable like `time.monotonic`."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.now_s


class ScaledClock:
    """Seconds that pass `speed` times as fast as real ones; callable like `time.monotonic`."""

    def __init__(self, speed: float = 1.0) -> None:
        self.speed = speed
        self._shown_s, self._read_s = 0.0, time.monotonic()

    def __call__(self) -> float:
        """Return the time in seconds."""
        now_s = time.monotonic()
        self._shown_s += self.speed * (now_s - self._read_s)
        self._read_s = now_s
        return self._shown_s

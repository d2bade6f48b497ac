"""The measured rate at which fully used workers complete requests. Pure."""

from __future__ import annotations

from collections import deque

WINDOW_S = 30.0
"""Busy seconds over which the rate is measured; long enough for requests that end in waves."""

MIN_WINDOW_S = 3.0
"""Busy seconds before a rate is known."""


class DrainRate:
    """Requests ended per second while others wait; idle workers do not show how many they could complete."""

    def __init__(self) -> None:
        self.rate = 0.0
        """Requests per second; 0 while unknown."""
        self._spans: deque[tuple[float, int]] = deque()  # (seconds, requests ended in them) of busy time
        self._last: tuple[float, int] | None = None  # (time, ended requests) at the last call, if requests were queued

    def observe(self, now_s: float, num_ended: int, busy: bool) -> None:
        """Record the number of requests ended so far. Must be called about once a second.

        busy: whether requests are queued now.
        """
        last, self._last = self._last, (now_s, num_ended) if busy else None
        if last is None:
            return  # no request was queued at the beginning of this span
        self._spans.append((now_s - last[0], num_ended - last[1]))
        while sum(span_s for span_s, _ in self._spans) - self._spans[0][0] >= WINDOW_S:
            self._spans.popleft()
        busy_s = sum(span_s for span_s, _ in self._spans)
        num = sum(num for _, num in self._spans)
        if num and busy_s >= MIN_WINDOW_S:
            self.rate = num / busy_s

"""How fast the fleet works when it has all the work it can do. Pure."""

from __future__ import annotations

from collections import deque

WINDOW_S = 30.0
"""Busy time that is looked back on: requests may end in waves."""

MIN_WINDOW_S = 3.0


class DrainRate:
    """Requests that end per second while others wait; an idle fleet says nothing of what it could do."""

    def __init__(self) -> None:
        self.rate = 0.0  # 0: not known yet
        self._spans: deque[tuple[float, int]] = deque()  # (seconds, requests ended in them), of busy time
        self._last: tuple[float, int] | None = None  # when it was looked last, and how many had ended

    def observe(self, now_s: float, num_ended: int, busy: bool) -> None:
        """Take the number of requests ended so far; `busy`: some are waiting now. Called about once a second."""
        last, self._last = self._last, (now_s, num_ended) if busy else None
        if last is None:
            return  # nobody waited at the beginning of this span
        self._spans.append((now_s - last[0], num_ended - last[1]))
        while sum(span_s for span_s, _ in self._spans) - self._spans[0][0] >= WINDOW_S:
            self._spans.popleft()
        busy_s = sum(span_s for span_s, _ in self._spans)
        num = sum(num for _, num in self._spans)
        if num and busy_s >= MIN_WINDOW_S:
            self.rate = num / busy_s

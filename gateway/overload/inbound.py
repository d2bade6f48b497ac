"""Counts the calls between arrival and queue, and predicts how long the next one will be inbound. Pure.

They wait only for each other: for the gateway's CPU share and its connections to the queue. So the wait is their number
divided by the rate at which they reach the queue (Little's law). The rate is measured only under load: the rate of few
calls does not show how many could pass.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Inbound:
    """The inbound calls of one gateway, and their rate over the last one to two spans of crowded time."""

    min_crowd: int  # calls below which the gateway is not crowded, and no wait is predicted
    span_s: float
    num: int = 0
    _at_s: float = 0.0  # time of the latest event
    _crowded_s: float = 0.0  # crowded time in the current span
    _num_through: int = 0  # calls that reached the queue in the current span
    _last_crowded_s: float = 0.0  # crowded time in the previous span
    _last_num_through: int = 0

    def begin(self, now_s: float) -> None:
        """Count a call that has arrived."""
        self._advance(now_s)
        self.num += 1

    def end(self, now_s: float, *, reached_queue: bool) -> None:
        """Stop counting a call. Only calls that `reached_queue` count for the rate."""
        is_crowded = self._advance(now_s)
        self.num -= 1
        self._num_through += is_crowded and reached_queue

    def wait_s(self, now_s: float) -> float:
        """Return the predicted seconds that a call arriving now is inbound; 0 if not crowded, or not measured yet."""
        self._advance(now_s)
        crowded_s = self._crowded_s + self._last_crowded_s
        if self.num < self.min_crowd or crowded_s < self.span_s:
            return 0.0
        # Add one: the next call may be about to reach the queue.
        return self.num * crowded_s / (1 + self._num_through + self._last_num_through)

    def _advance(self, now_s: float) -> bool:
        """Advance to `now_s`; return whether the gateway was crowded since the latest event."""
        is_crowded = self.num >= self.min_crowd
        if is_crowded:
            self._crowded_s += max(0.0, now_s - self._at_s)
        self._at_s = now_s
        if self._crowded_s >= self.span_s:
            self._last_crowded_s, self._last_num_through = self._crowded_s, self._num_through
            self._crowded_s, self._num_through = 0.0, 0
        return is_crowded

"""Calls between their arrival and the queue: how many there are, and how long the next one will be among them. Pure.

They wait only for each other: for the gateway's share of a core, and for its connections to the queue. So the wait is
their number over the rate at which they reach the queue (Little's law), measured while there is a crowd: how many get
through when few come says nothing of how many could.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Inbound:
    """The inbound calls of one gateway, and their rate over the last one to two spans of crowded time."""

    min_crowd: int  # calls below which there is no crowd, and no wait is predicted
    span_s: float
    num: int = 0
    _at_s: float = 0.0  # time of the latest event
    _crowded_s: float = 0.0  # crowded time in the current span
    _num_through: int = 0  # calls that reached the queue in it
    _last_crowded_s: float = 0.0  # crowded time in the previous span
    _last_num_through: int = 0

    def begin(self, now_s: float) -> None:
        """Count a call that has arrived."""
        self._advance(now_s)
        self.num += 1

    def end(self, now_s: float, *, reached_queue: bool) -> None:
        """Count a call out. One that was refused or wrong says nothing of how long the way to the queue is."""
        is_crowded = self._advance(now_s)
        self.num -= 1
        self._num_through += is_crowded and reached_queue

    def wait_s(self, now_s: float) -> float:
        """Return how long a call that arrives now will be inbound; 0 without a crowd, or before a span was measured."""
        self._advance(now_s)
        crowded_s = self._crowded_s + self._last_crowded_s
        if self.num < self.min_crowd or crowded_s < self.span_s:
            return 0.0
        # One more than have been counted: the next may be just about to get through.
        return self.num * crowded_s / (1 + self._num_through + self._last_num_through)

    def _advance(self, now_s: float) -> bool:
        """Let time pass until `now_s`; return whether there was a crowd."""
        is_crowded = self.num >= self.min_crowd
        if is_crowded:
            self._crowded_s += max(0.0, now_s - self._at_s)
        self._at_s = now_s
        if self._crowded_s >= self.span_s:
            self._last_crowded_s, self._last_num_through = self._crowded_s, self._num_through
            self._crowded_s, self._num_through = 0.0, 0
        return is_crowded

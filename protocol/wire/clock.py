"""Unix time as the queue's server has it: one clock for the whole fleet.

Deadlines, ages and heartbeats are written on one host and compared on another. So every connection to the queue asks
its server for the time, and this process's monotonic clock continues from the answer. A host whose wall clock is an
hour wrong, or jumps by an hour, changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class FleetClock:
    """Estimates the unix time of the queue's server from the server's replies."""

    def __init__(self, wall_ns: Callable[[], int] = time.time_ns) -> None:
        """wall_ns: reads this host's unix time; called once, and used until a server has replied."""
        self._offset_ns = wall_ns() - time.monotonic_ns()

    def ns(self) -> int:
        """Return the fleet's unix time in nanoseconds."""
        return time.monotonic_ns() + self._offset_ns

    def learn(self, told_ns: int, asked_at_ns: int, heard_at_ns: int) -> None:
        """Update the estimate from the server's time.

        told_ns: the server's unix time. asked_at_ns, heard_at_ns: this process's monotonic clock before and after the
        question; the server read its clock between them. The estimate changes only if the answer contradicts it, so
        that a slow answer does not shift it.
        """
        self._offset_ns = max(told_ns - heard_at_ns, min(self._offset_ns, told_ns - asked_at_ns))


CLOCK = FleetClock()
"""The clock of this process. There is one, since a process has one queue."""


def now_ms() -> int:
    """Return the fleet's unix time in milliseconds."""
    return CLOCK.ns() // 1_000_000


def now_s() -> float:
    """Return the fleet's unix time in seconds."""
    return CLOCK.ns() / 1e9

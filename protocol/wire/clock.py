"""Unix time as the whole fleet has it: that of the queue's server, whatever the clock of this host says.

Deadlines, ages and registers are written on one host and compared on another. So every connection to the queue asks its
server for the time, and between two answers this process's monotonic clock goes on: a host's clock that is an hour
wrong, or jumps by one, changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class FleetClock:
    """The server's unix time, estimated from its last reply."""

    def __init__(self, wall_ns: Callable[[], int] = time.time_ns) -> None:
        """wall_ns: this host's unix time, read once, and used until a server has replied."""
        self._offset_ns = wall_ns() - time.monotonic_ns()

    def ns(self) -> int:
        """Return unix time in nanoseconds."""
        return time.monotonic_ns() + self._offset_ns

    def learn(self, told_ns: int, asked_at_ns: int, heard_at_ns: int) -> None:
        """Take the server's time, read between two times of this process's monotonic clock.

        An estimate that the answer allows stays as it is, so that a slow answer moves nothing.
        """
        self._offset_ns = max(told_ns - heard_at_ns, min(self._offset_ns, told_ns - asked_at_ns))


CLOCK = FleetClock()
"""The clock of this process. There is one, since a process has one queue."""


def now_ms() -> int:
    """Return unix time in milliseconds, as the queue's server has it."""
    return CLOCK.ns() // 1_000_000


def now_s() -> float:
    """Return unix time in seconds, as the queue's server has it."""
    return CLOCK.ns() / 1e9

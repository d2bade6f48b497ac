"""Whether a gateway can take one more call at all, asked before anything is read of it.

Three things are a gateway's own and not the queue's: how many calls it holds, which is its memory, how long they are on
their way to the queue, and whether its loop keeps up. Where it is slow, everything that was let in becomes slower with
each new call; so these are turned away, for a tenth of what it would cost to look into them, until it is on time again.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gateway.overload.admission import MIN_RETRY_S, ROOM, retry_after_s
from gateway.overload.preparing import Preparation, Preparing
from protocol.wire import messages as m
from protocol.wire.errors import Overloaded

LOOK_S = 0.1
NUM_LOOKS = 3
"""So many looks in a row must find the loop late: one long turn, or a process that was stopped, is no overload."""

MAX_LATE_S = 2.0
MAX_PREPARATION_S = 5.0


class Door:
    """Counts the calls of one gateway, and watches its loop."""

    def __init__(self, max_open: int, status: Callable[[], m.SchedulerStatus | None]) -> None:
        """`status`: the scheduler's, for the advice when to come back."""
        self._max_open = max_open
        self._status = status
        self.num_open = 0
        self.preparing = Preparing()
        self.looked_s = time.monotonic()
        """When the loop was seen to turn last, monotonic."""
        self._late_s = deque([0.0] * NUM_LOOKS, NUM_LOOKS)  # of the last looks, oldest first

    @property
    def late_s(self) -> float:
        """How late everything is on this loop, at least: the best of the last looks, the one that is due counts."""
        overdue_s = time.monotonic() - self.looked_s - LOOK_S
        oldest_s, *others_s = self._late_s
        return min(max(oldest_s, overdue_s), *others_s)

    def check(self) -> None:
        """Raise Overloaded unless one more call can be taken."""
        if self.num_open >= self._max_open:
            raise Overloaded(
                f"this gateway is answering {self.num_open} calls; the limit is {self._max_open}",
                retry_after_s(ROOM * self._max_open, self._status()),
            )
        late_s = self.late_s
        if late_s >= MAX_LATE_S:
            raise Overloaded(
                f"this gateway is {late_s:.1f} s late with what it has; the limit is {MAX_LATE_S:g} s",
                max(MIN_RETRY_S, late_s),
            )
        wait_s = self.preparing.wait_s
        if wait_s >= MAX_PREPARATION_S:
            raise Overloaded(
                f"{self.preparing.num} calls are on their way to the queue, for about {wait_s:.0f} s;"
                f" the limit is {MAX_PREPARATION_S:g} s",
                wait_s,
            )

    @contextmanager
    def open(self) -> Iterator[Preparation]:
        """Count a call while it is answered; yields what is to be told when it is in the queue."""
        self.num_open += 1
        preparation = self.preparing.begin()
        try:
            yield preparation
        finally:
            preparation.end()
            self.num_open -= 1

    async def watch(self) -> None:
        """Look at the loop until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look(time.monotonic())

    def look(self, now_s: float) -> None:
        """Note that the loop has turned."""
        self.preparing.look(now_s)
        self._late_s.append(now_s - self.looked_s - LOOK_S)
        self.looked_s = now_s

"""A first-in, first-out lock for the CPU-bound work of threads."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class FifoLock:
    """Lets one thread at a time proceed: the waiting one with the lowest number.

    Threads that share a core would all end as late as the last one. Run one after another, half of them end early.
    """

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: list[tuple[int, int, threading.Lock]] = []  # number, order of arrival, lock released at its turn
        self._num_came = 0
        self._lock = threading.Lock()

    @property
    def num_waiting(self) -> int:
        """The number of threads that wait for a turn."""
        return len(self._waiting)

    @contextmanager
    def take(self, number: int) -> Iterator[None]:
        """Wait for a turn, held for the duration of the block. number: the lowest is served first."""
        mine = threading.Lock()
        with self._lock:
            waits, self._is_taken = self._is_taken, True
            if waits:
                mine.acquire()
                heapq.heappush(self._waiting, (number, self._num_came, mine))
                self._num_came += 1
        if waits:
            mine.acquire()
        try:
            yield
        finally:
            with self._lock:
                if self._waiting:
                    heapq.heappop(self._waiting)[-1].release()
                else:
                    self._is_taken = False

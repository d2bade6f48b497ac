"""How the CPU time of a function grows with its input, whatever else the machine does."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from protocol.wire.errors import LorafleetError

FACTOR = 8
"""How much larger the larger input is: a linear function takes 8 times as long, a quadratic one 64 times."""

MOST = 24.0
"""Most times as long. Between the two with room for caches and neighbours."""

LEAST_S = 0.0005
"""A time counts as at least this much."""

TRIES = 2


def cpu_s(do: Callable[[], object]) -> float:
    """Return the CPU seconds of this thread that a function takes, the least of some tries. It may refuse its input."""
    least_s = float("inf")
    for _ in range(TRIES):
        began_s = time.thread_time()
        with suppress(LorafleetError):
            do()
        least_s = min(least_s, time.thread_time() - began_s)
        if least_s > MOST:
            break
    return least_s


def growth(made: Callable[[int], Callable[[], object]], size: int) -> float:
    """Return how many times as long a function takes with an input of `size` as with an eighth of it."""
    small_s = max(cpu_s(made(size // FACTOR)), LEAST_S)
    return max(cpu_s(made(size)), LEAST_S) / small_s

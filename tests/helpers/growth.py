"""Measures how the CPU time of a function grows with its input, independent of other load."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from protocol.wire.errors import LorafleetError

FACTOR = 8
"""Ratio of the input sizes: a linear function takes 8 times as long for the larger one, a quadratic one 64 times."""

MOST = 24.0
"""Maximum ratio of the times: between linear and quadratic, with a margin for caches and other processes."""

LEAST_S = 0.0005
"""Shorter times count as this one."""

TRIES = 2


def cpu_s(do: Callable[[], object]) -> float:
    """Return the minimum CPU seconds of this thread for `do`, over some tries. `do` may refuse its input."""
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
    """Return the ratio of a function's time for an input of `size` to that for an eighth of it."""
    small_s = max(cpu_s(made(size // FACTOR)), LEAST_S)
    return max(cpu_s(made(size)), LEAST_S) / small_s

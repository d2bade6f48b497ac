"""Splits work on the event loop into slices, between which other tasks run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

SLICE_S = 0.00025
"""Seconds after which a working task yields to other tasks: a quarter of the maximum for one callback."""

STEPS = 64
"""Steps after which it yields in any case."""


class LoopSlice:
    """Measures how long the current task has worked since it last yielded.

    Counting steps is not enough: some rows take a hundred times as long as others.
    """

    __slots__ = ("_end_s", "_left")

    def __init__(self) -> None:
        self._begin()

    async def pause(self) -> None:
        """Yield to other tasks if the slice is over.

        Call after each step, which should take at most a tenth of a slice.
        """
        self._left -= 1
        if not self._left or time.perf_counter() >= self._end_s:
            await asyncio.sleep(0)
            self._begin()

    def _begin(self) -> None:
        self._end_s, self._left = time.perf_counter() + SLICE_S, STEPS


async def each(values: Iterable[S], make: Callable[[S], T]) -> list[T]:
    """Return the results of a function for each value, computed in slices. Raises as the function."""
    made, turn = list[T](), LoopSlice()
    for value in values:
        made.append(make(value))
        await turn.pause()
    return made

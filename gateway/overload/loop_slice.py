"""Work on the event loop that others wait for: in slices, between which they have their turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

SLICE_S = 0.00025
"""Time after which a task that goes on working lets others have their turn: a quarter of what may hold the loop."""

STEPS = 64
"""Steps of work after which it does so in any case."""


class LoopSlice:
    """How long the current task has worked since others had their turn.

    Steps alone are no measure of that: some rows take a hundred times as long as others.
    """

    __slots__ = ("_end_s", "_left")

    def __init__(self) -> None:
        self._begin()

    async def pause(self) -> None:
        """Let others have their turn after a step, if the slice is over. A step should take a tenth of it at most."""
        self._left -= 1
        if not self._left or time.perf_counter() >= self._end_s:
            await asyncio.sleep(0)
            self._begin()

    def _begin(self) -> None:
        self._end_s, self._left = time.perf_counter() + SLICE_S, STEPS


async def each(values: Iterable[S], make: Callable[[S], T]) -> list[T]:
    """Return what a function makes of each value, in slices. Raises what it raises."""
    made, turn = list[T](), LoopSlice()
    for value in values:
        made.append(make(value))
        await turn.pause()
    return made

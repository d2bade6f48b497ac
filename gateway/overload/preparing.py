"""Calls between the door and the queue: how many there are, and how long the next one would be among them. Pure.

They wait for nobody but each other: for the gateway's share of a core, and for its connections to the queue.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

FEW = 128
"""So many are never too many, and say nothing of how many a gateway could get on with: only a crowd is timed."""

WINDOW_S = 3.0
"""Crowded time that is looked back on."""

MIN_WINDOW_S = 1.5
"""Less of it says little: of calls that came together none is in the queue before all have been read."""


@dataclass(slots=True)
class Preparing:
    """The calls of one gateway."""

    num: int = 0
    _num_submitted: int = 0  # since the last look
    _looked_s: float | None = None  # when it was looked last; None: there was no crowd then
    _spans: deque[tuple[float, int]] = field(default_factory=deque)  # crowded seconds, calls submitted in them

    def begin(self) -> Preparation:
        """Let a call in."""
        self.num += 1
        return Preparation(self)

    def left(self, *, submitted: bool) -> None:
        """Count a call out. What ends on the way to the queue, refused or wrong, says nothing of how long that is."""
        self.num -= 1
        self._num_submitted += submitted

    def look(self, now_s: float) -> None:
        """Note how many were submitted since the last look; to be called several times a second."""
        before_s, self._looked_s = self._looked_s, now_s if self.num >= FEW else None
        if before_s is not None:
            self._spans.append((now_s - before_s, self._num_submitted))
        self._num_submitted = 0
        while self._spans and self._crowded_s - self._spans[0][0] >= WINDOW_S:
            self._spans.popleft()

    @property
    def _crowded_s(self) -> float:
        return sum(seconds for seconds, _ in self._spans)

    @property
    def wait_s(self) -> float:
        """How long a call that comes now would be prepared, as far as is known; 0 where there are few."""
        if self.num < FEW or (crowded_s := self._crowded_s) < MIN_WINDOW_S:
            return 0.0
        # One more than there were: the next may be just about to be submitted.
        return self.num * crowded_s / (1 + sum(num for _, num in self._spans))


@dataclass(slots=True)
class Preparation:
    """One call's."""

    of: Preparing | None = None  # None: not counted, or over

    def end(self, *, submitted: bool = False) -> None:
        """Say that the call is in the queue, or waits for others than the gateway, or is over."""
        of, self.of = self.of, None
        if of is not None:
            of.left(submitted=submitted)

"""Whether a call is let in: by what waits already, and by how long it would wait itself. Pure.

The queue's script counts requests exactly; tokens and time come from the scheduler's status of at most a second ago,
plus what this gateway has submitted since. To be refused by the script costs as much as to be let in, so a queue that
was nearly full when it was counted last is foreseen from there: by its drain rate, and by the calls let through since.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, Overloaded
from protocol.wire.keys import BATCH, INTERACTIVE

ROOM = 0.1
"""Share of a limit that should be free again before a refused call is worth another try."""

MIN_RETRY_S = 1.0
UNKNOWN_RETRY_S = 5.0
"""Advice while nobody knows how fast the fleet is."""

STATUS_LIFE_MS = 5000

NEARLY_FULL = 1 - ROOM
"""Share of `max_queued` from which on a queue is foreseen: below it, nobody is refused for a guess."""


@dataclass(frozen=True, slots=True)
class Load:
    """A call that wants to be let in."""

    cls: str
    num: int  # requests
    num_tokens: int  # prompt and longest output of all of them
    timeout_s: float  # what is not begun by then is lost


@dataclass(slots=True)
class Count:
    """When a class's queue was counted last, and what may have come since."""

    at_ms: int = 0
    queued: int = 0
    passed: deque[int] = field(default_factory=deque)  # unix ms, of calls that were let through, newest last

    def set(self, at_ms: int, queued: int) -> None:
        """Take a count, if it is newer."""
        if at_ms < self.at_ms:
            return
        self.at_ms, self.queued = at_ms, queued
        while self.passed and self.passed[0] < at_ms:
            self.passed.popleft()

    def foreseen(self, now_ms: int, rate: float) -> float:
        """Return how many wait now if `rate` have left each second, and all that were let through have come."""
        return self.queued + len(self.passed) - rate * max(0, now_ms - self.at_ms) / 1000


@dataclass(slots=True)
class Admission:
    """Decides for one gateway."""

    settings: Settings
    num_new: int = 0  # requests let in that the status may not count yet
    num_new_tokens: int = 0
    _new: deque[tuple[int, Load]] = field(default_factory=deque)  # (unix ms, load), newest last
    _counts: dict[str, Count] = field(default_factory=dict)  # of each class

    def note(self, load: Load, now_ms: int) -> None:
        """Note what was let in."""
        self._forget(now_ms - STATUS_LIFE_MS)
        self._new.append((now_ms, load))
        self.num_new += load.num
        self.num_new_tokens += load.num_tokens

    def _forget(self, before_ms: int) -> None:
        while self._new and self._new[0][0] < before_ms:
            _, load = self._new.popleft()
            self.num_new -= load.num
            self.num_new_tokens -= load.num_tokens

    def check_room(self, cls: str, status: m.SchedulerStatus | None, now_ms: int) -> None:
        """Raise Overloaded for a call that the queue has no place for, as far as is known: before it costs any work."""
        if status is None:
            return
        count, limit = self._counts.setdefault(cls, Count()), self.settings.max_queued
        queued = status.queued_batch if cls == BATCH else status.queued - status.queued_batch
        count.set(status.sent_ms, queued)
        if count.queued < NEARLY_FULL * limit:
            return
        foreseen = count.foreseen(now_ms, status.drain_rate)
        if foreseen > limit - 1:
            raise self.full(Load(cls, 1, 0, 0.0), math.ceil(foreseen), status)
        count.passed.append(now_ms)

    def note_full(self, load: Load, queued: int, now_ms: int) -> None:
        """Note that the queue's script has just refused a call because `queued` requests of its class waited."""
        self._counts.setdefault(load.cls, Count()).set(now_ms, queued)

    def check(self, load: Load, status: m.SchedulerStatus | None) -> None:
        """Let a call in, or raise Overloaded: too many tokens wait, or it would have to wait for too long.

        Raises BadRequest for one that no queue has a place for, however empty.
        """
        if load.num > self.settings.max_queued:
            raise BadRequest(
                f"the call makes {load.num} choices; the queue takes {self.settings.max_queued}",
                param="n", code="limit_exceeded",
            )  # fmt: skip
        if status is None:
            return
        self._forget(status.sent_ms)
        queued, queued_tokens = status.queued + self.num_new, status.queued_tokens + self.num_new_tokens
        max_tokens = self.settings.max_queued_tokens
        if queued_tokens + load.num_tokens > max_tokens and queued_tokens:
            over = (queued_tokens + load.num_tokens - (1 - ROOM) * max_tokens) / queued_tokens
            raise Overloaded(
                f"requests of {queued_tokens} tokens are waiting; the limit is {max_tokens}",
                retry_after_s(over * queued, status),
            )
        num_ahead = queued - (status.queued_batch if load.cls == INTERACTIVE else 0)
        wait_s = num_ahead / status.drain_rate if status.drain_rate else 0.0
        max_wait_s = min(self.settings.max_wait_s or load.timeout_s, load.timeout_s)
        if wait_s > max_wait_s:
            raise Overloaded(
                f"the first token would come in about {wait_s:.0f} s; the limit is {max_wait_s:g} s",
                retry_after_s((wait_s - (1 - ROOM) * max_wait_s) * status.drain_rate, status),
            )

    def full(self, load: Load, queued: int, status: m.SchedulerStatus | None) -> Overloaded:
        """Return the refusal of a call that the queue has no place for; `queued` requests wait."""
        max_queued = self.settings.max_queued
        return Overloaded(
            f"{queued} requests are waiting; the limit is {max_queued}",
            retry_after_s(queued + load.num - (1 - ROOM) * max_queued, status),
        )


def retry_after_s(num: float, status: m.SchedulerStatus | None) -> float:
    """Return when `num` requests will have left the queue, at its measured rate."""
    if status is None or not status.drain_rate:
        return UNKNOWN_RETRY_S
    return max(MIN_RETRY_S, num / status.drain_rate)

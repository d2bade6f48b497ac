"""Whether a call is let in: by what waits already, and by how long it would wait itself. Pure.

The queue's script counts requests exactly; tokens and time come from the scheduler's status of at most a second ago,
plus what this gateway has submitted since.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from protocol import messages as m
from protocol.errors import BadRequest, Overloaded
from protocol.keys import BATCH, INTERACTIVE
from protocol.settings import Settings

ROOM = 0.1
"""Share of a limit that should be free again before a refused call is worth another try."""

MIN_RETRY_S = 1.0
UNKNOWN_RETRY_S = 5.0
"""Advice while nobody knows how fast the fleet is."""

STATUS_LIFE_MS = 5000


@dataclass(frozen=True, slots=True)
class Load:
    """A call that wants to be let in."""

    cls: str
    num: int  # requests
    num_tokens: int  # prompt and longest output of all of them
    timeout_s: float  # what is not begun by then is lost


@dataclass(slots=True)
class Admission:
    """Decides for one gateway."""

    settings: Settings
    num_new: int = 0  # requests let in that the status may not count yet
    num_new_tokens: int = 0
    _new: deque[tuple[int, Load]] = field(default_factory=deque)  # (unix ms, load), newest last

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

    def check_room(self, cls: str, status: m.SchedulerStatus | None) -> None:
        """Raise Overloaded for a call that the queue had no place for a moment ago: before it costs any work."""
        if status is not None:
            queued = status.queued_batch if cls == BATCH else status.queued - status.queued_batch
            if queued >= self.settings.max_queued:
                raise self.full(Load(cls, 1, 0, 0.0), queued, status)

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

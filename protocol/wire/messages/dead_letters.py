"""Scheduler to operators: what was given up, and the deaths that led to it."""

from __future__ import annotations

from protocol.wire.messages.base import Packed, Wire
from protocol.wire.messages.requests import Submit


class Death(Packed, frozen=True):
    """A worker's death under a request. Times are unix milliseconds."""

    wid: str
    name: str  # of the worker, "" if it is not known any more
    ms: int  # when it was noticed
    assigned_ms: int
    num_output_tokens: int  # of the request's log at the death
    num_at_start: int  # of the log when the worker got the request

    @property
    def phase(self) -> str:
        """`prefill` if the worker had written no token of the request yet, else `decode`."""
        return "decode" if self.num_output_tokens > self.num_at_start else "prefill"


class DeadLetter(Wire, frozen=True):
    """A request that was given up, or a message that could not be read, and why."""

    reason: str
    stream: str = ""  # where an unreadable message lay
    raw: bytes = b""  # that message
    submit: Submit | None = None
    attempts: int = 0
    num_output_tokens: int = 0
    deaths: list[Death] = []  # workers that died under it, oldest first
    ms: int = 0

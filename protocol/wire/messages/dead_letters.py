"""Scheduler to operators: requests that were given up, and the deaths that led to it."""

from __future__ import annotations

from protocol.wire.messages.base import Packed, Wire
from protocol.wire.messages.requests import RequestHead


class Death(Packed, frozen=True):
    """A worker's death under a request. Times are unix milliseconds."""

    wid: str
    name: str  # name of the worker; "" if no longer known
    ms: int  # when the death was detected
    assigned_ms: int
    num_output_tokens: int  # length of the request's log in tokens at the death
    num_at_start: int  # the same at the assignment

    @property
    def phase(self) -> str:
        """`prefill` if the worker had not written any token of the request yet, else `decode`."""
        return "decode" if self.num_output_tokens > self.num_at_start else "prefill"


class DeadLetter(Wire, frozen=True):
    """A request that was given up or a message that could not be decoded, with the reason."""

    reason: str
    stream: str = ""  # stream of an unreadable message
    raw: bytes = b""  # the unreadable message
    submit: RequestHead | None = None
    attempts: int = 0
    num_output_tokens: int = 0
    deaths: list[Death] = []  # workers that died under it, oldest first
    ms: int = 0

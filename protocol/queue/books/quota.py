"""A tenant's limits as arguments of the submit script, and its standing in the script's reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quota:
    """The tenant that a call is charged to, and its limits. 0: no limit.

    `max_bytes` limits the tenant's data in the queue: jobs, Idempotency-Keys, and the bodies, messages and logs of its
    requests. A running request counts with the maximum size, an ended one with the actual size.
    """

    tenant: str
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrency: int = 0
    max_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Allowance:
    """The rest of a limit."""

    limit: int
    remaining: int
    reset_ms: int  # ms until all of it is available again


@dataclass(frozen=True, slots=True)
class Standing:
    """A tenant's use and limits after a call. If `over` names a limit, the use before the call, which was refused."""

    requests: Allowance | None  # None: no such limit
    tokens: Allowance | None
    running: int  # choices queued or running
    over: str = ""  # limit that refused the call: requests, tokens, concurrency or bytes; "": none
    retry_ms: int = 0  # ms until the refused call would fit; 0: unknown
    kept_bytes: int = 0  # if `over` is bytes: bytes of the tenant's data in the queue
    added_bytes: int = 0  # and the maximum bytes that the call would add


def standing_of(quota: Quota, reply: Sequence[int | bytes]) -> Standing:
    """Decode the standing in a reply of `submit.lua`, and the limit and the ms that follow it in a refusal."""
    left, reset_ms, tokens_left, tokens_reset_ms, running = (int(value) for value in reply[:5])
    refusal = reply[5:]
    return Standing(
        Allowance(quota.requests_per_minute, left, reset_ms) if quota.requests_per_minute else None,
        Allowance(quota.tokens_per_minute, tokens_left, tokens_reset_ms) if quota.tokens_per_minute else None,
        running,
        over=refusal[0].decode() if refusal and isinstance(refusal[0], bytes) else "",
        retry_ms=int(refusal[1]) if refusal else 0,
        kept_bytes=int(refusal[2]) if len(refusal) > 2 else 0,
        added_bytes=int(refusal[3]) if len(refusal) > 2 else 0,
    )

"""A tenant's limits as the submit script takes them, and its standing as the script returns it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quota:
    """The tenant that a call is charged to, and its limits. 0: no limit.

    `max_bytes` bounds what it keeps in the queue: bodies, messages and logs of its requests, at most what they can come
    to while they run and what they came to afterwards, jobs, and Idempotency-Keys.
    """

    tenant: str
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrency: int = 0
    max_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Allowance:
    """The rest of one limit."""

    limit: int
    remaining: int
    reset_ms: int  # ms until all of it is available again


@dataclass(frozen=True, slots=True)
class Standing:
    """A tenant's use after a call; when `over` names a limit, its use before the call that was refused."""

    requests: Allowance | None  # None: no such limit
    tokens: Allowance | None
    running: int  # choices queued or running
    over: str = ""  # "", requests, tokens, concurrency or bytes
    retry_ms: int = 0  # ms until the refused call would fit; 0: unknown
    kept_bytes: int = 0  # when bytes are over: what the tenant keeps in the queue
    added_bytes: int = 0  # and the most that the call would add


def standing_of(quota: Quota, reply: Sequence[int | bytes]) -> Standing:
    """Read a standing in the reply of `submit.lua`, and the limit and the ms that follow it in a refusal."""
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

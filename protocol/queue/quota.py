"""A tenant's limits as the submit script takes and answers them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quota:
    """Whose use a call counts as, and what is allowed. 0: no limit."""

    tenant: str
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrency: int = 0


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left of one limit."""

    limit: int
    remaining: int
    reset_ms: int  # until all of it is there again


@dataclass(frozen=True, slots=True)
class Standing:
    """How a tenant stands after a call, or, when `over` names a limit, just before the call that it refused."""

    requests: Allowance | None  # None: no such limit
    tokens: Allowance | None
    running: int  # choices queued or running
    over: str = ""  # "", requests, tokens or concurrency
    retry_ms: int = 0  # when the refused call would fit, as far as that can be known


def standing_of(quota: Quota, reply: Sequence[int | bytes]) -> Standing:
    """Read the script's (requests left, ms, tokens left, ms, running), and (…, over, ms) of a refusal."""
    left, reset_ms, tokens_left, tokens_reset_ms, running = (int(value) for value in reply[:5])
    refusal = reply[5:]
    return Standing(
        Allowance(quota.requests_per_minute, left, reset_ms) if quota.requests_per_minute else None,
        Allowance(quota.tokens_per_minute, tokens_left, tokens_reset_ms) if quota.tokens_per_minute else None,
        running,
        over=refusal[0].decode() if refusal and isinstance(refusal[0], bytes) else "",
        retry_ms=int(refusal[1]) if refusal else 0,
    )

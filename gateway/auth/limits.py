"""A tenant's limits as clients see them: errors, headers, messages. Pure."""

from __future__ import annotations

from protocol.queue.books.quota import Quota, Standing
from protocol.wire.errors import BadRequest, LorafleetError, Overloaded

RETRY_S = 1.0
"""Retry-After, in seconds, at the limit of concurrent choices: a guess at when one ends."""

BYTES_RETRY_S = 5.0
"""Retry-After, in seconds, at the limit of bytes stored in the queue."""


def check_quota(quota: Quota, num: int, num_tokens: int) -> None:
    """Raise BadRequest for a call of `num` choices and `num_tokens` that exceeds its tenant's limits at any load."""
    if 0 < quota.concurrency < num:
        raise BadRequest(
            f"the call makes {num} choices; the limit of tenant {quota.tenant} is {quota.concurrency} at once",
            param="n",
            code="limit_exceeded",
        )
    if 0 < quota.tokens_per_minute < num_tokens:
        raise BadRequest(
            f"the call may take {num_tokens} tokens, prompts and longest outputs; the limit of tenant {quota.tenant} is"
            f" {quota.tokens_per_minute} a minute: set max_tokens",
            param="max_tokens",
            code="limit_exceeded",
        )


def refusal(quota: Quota, standing: Standing, num: int, num_tokens: int) -> LorafleetError:
    """Return the error for a call of `num` choices and `num_tokens` that a limit refused."""
    if standing.over == "bytes" and standing.added_bytes > quota.max_bytes:
        return BadRequest(
            f"the call may take {standing.added_bytes} bytes of the queue; the limit of tenant {quota.tenant} is"
            f" {quota.max_bytes}: set max_tokens, or ask for fewer choices or logprobs",
            code="limit_exceeded",
        )
    retry_s = BYTES_RETRY_S if standing.over == "bytes" else standing.retry_ms / 1000 or RETRY_S
    return Overloaded(limit_text(quota, standing, num, num_tokens), retry_s, standing.over)


def limit_headers(standing: Standing) -> dict[str, str]:
    """Return OpenAI's headers with the remainder of each limit."""
    headers: dict[str, str] = {}
    for what, allowance in (("requests", standing.requests), ("tokens", standing.tokens)):
        if allowance is not None:
            headers[f"x-ratelimit-limit-{what}"] = str(allowance.limit)
            headers[f"x-ratelimit-remaining-{what}"] = str(allowance.remaining)
            headers[f"x-ratelimit-reset-{what}"] = duration(allowance.reset_ms)
    return headers


def limit_text(quota: Quota, standing: Standing, num: int, num_tokens: int) -> str:
    """Return the message for a call that a limit refused."""
    if standing.over == "bytes":
        return (
            f"tenant {quota.tenant} keeps {standing.kept_bytes} bytes in the queue, in requests, answers and jobs, and"
            f" the call may add {standing.added_bytes}; its limit is {quota.max_bytes}. Answers of jobs are stored for"
            " a day: DELETE those you have read"
        )
    if standing.over == "concurrency":
        running = f"{standing.running} choices are queued or running, the call adds {num}"
        return f"{running}; the limit of tenant {quota.tenant} is {quota.concurrency} at once"
    allowance = standing.requests if standing.over == "requests" else standing.tokens
    assert allowance is not None
    needed = num_tokens if standing.over == "tokens" else 1
    return (
        f"{allowance.remaining} {standing.over} are left and the call needs {needed}; the limit of tenant"
        f" {quota.tenant} is {allowance.limit} {standing.over} a minute. Try again in {duration(standing.retry_ms)}"
    )


def duration(ms: int) -> str:
    """Return a duration in the format of OpenAI's headers: 12ms, 1s, 6m0s."""
    if ms < 1000:
        return f"{ms}ms"
    minutes, seconds = divmod(-(-ms // 1000), 60)
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"

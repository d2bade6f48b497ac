"""Worker to gateway: tokens and ends."""

from __future__ import annotations

from protocol.wire.messages.base import Packed, Wire


class RequestUsage(Packed, frozen=True):
    """Token counts of a request that has ended."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0


class Timing(Packed, frozen=True):
    """Times of one assignment so far, reported with the worker's first token of the request and with its end.

    `taken_ms` is unix time by the worker's clock. All other times are ms since then, -1 if the event has not happened.
    """

    taken_ms: int
    queued_ms: int = 0  # before `taken_ms`: ms from submission to this assignment
    tier: str = ""  # tier of its adapter at that time: resident, loading, host or store; "" for the base model
    staged_ms: int = -1  # ms until its adapter was in host memory; -1: it was already there
    ready_ms: int = -1  # ms until its adapter was in the pool; -1: it was already there
    begun_ms: int = -1  # ms until its first step
    first_ms: int = -1  # ms until its first token from this worker
    ended_ms: int = -1
    num_preempted: int = 0  # number of times that it lost its KV cache blocks to other requests
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache


class Delta(Packed, frozen=True):
    """New tokens of one request, and perhaps its end. `seq0`: index of the first id in the request's log.

    `seq0 == -1` marks an end that was not written by the owner: the reader finds all tokens that it has not seen in the
    log.
    """

    rid: str
    epoch: int
    seq0: int
    ids: bytes = b""  # int32
    logprobs: bytes = b""  # `logprob_record_bytes` per id
    finish: str = ""  # FinishReason or "" while running
    error: str = ""  # JSON of `ErrorInfo` when finish == "error"
    usage: RequestUsage | None = None
    timing: Timing | None = None  # with the first token of an assignment, and with its end


class ErrorInfo(Wire, frozen=True):
    """A `LorafleetError` on the wire, see `protocol.wire.error_codec`."""

    message: str
    kind: str  # name of its class in `protocol.wire.errors`
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None
    reasons: list[str] = []  # reasons of an `AdapterRefused`


WHOLE = -1
"""Value of `num_logprobs` that stands for the whole vocabulary."""


def logprob_record_bytes(num_logprobs: int, vocabulary: int = 0) -> int:
    """Return the bytes of a token's record: its float32 logprob, then `num_logprobs` pairs (int32 id, float32 logprob).

    With `WHOLE`, the float32 logprobs of all `vocabulary` tokens, ordered by id, follow instead of the pairs.
    """
    return 4 + (4 * vocabulary if num_logprobs == WHOLE else 8 * num_logprobs)


def prompt_record_bytes(num_logprobs: int, vocabulary: int = 0) -> int:
    """Return the bytes of a prompt token's record: an output token's, with the int32 rank after the logprob."""
    return 4 + logprob_record_bytes(num_logprobs, vocabulary)

"""Worker to gateway: tokens and ends."""

from __future__ import annotations

from protocol.wire.messages.base import Packed, Wire


class Usage(Packed, frozen=True):
    """Numbers of tokens of a request that has ended."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0


class Delta(Packed, frozen=True):
    """New tokens of one request, and its end. `seq0` is the index of the first id in the request's log.

    `seq0 == -1` marks an end that was not written by the owner: the log holds whatever the reader has not seen.
    """

    rid: str
    epoch: int
    seq0: int
    ids: bytes = b""  # int32
    logprobs: bytes = b""  # `logprob_record_bytes` per id
    finish: str = ""  # FinishReason or "" while running
    error: str = ""  # JSON of `ErrorInfo` when finish == "error"
    usage: Usage | None = None


class ErrorInfo(Wire, frozen=True):
    """A `LorafleetError` on the wire, see `protocol.wire.error_codec`."""

    message: str
    kind: str  # name of its class in `protocol.wire.errors`
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None
    reasons: list[str] = []  # of an `AdapterRefused`


def logprob_record_bytes(num_logprobs: int) -> int:
    """Return the bytes of a token's record: its float32 logprob, then `num_logprobs` (int32 id, float32 logprob)."""
    return 4 + 8 * num_logprobs


def prompt_record_bytes(num_logprobs: int) -> int:
    """Return the bytes of a prompt token's record: as of an output's, with its int32 rank after its logprob."""
    return 4 + logprob_record_bytes(num_logprobs)

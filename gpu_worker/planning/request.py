"""The types that a worker's service and engine exchange. Imports no torch: the service starts without it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import msgspec
import numpy as np

from protocol.wire import messages as m
from protocol.wire.errors import AdapterRefused, BadRequest, Internal, LorafleetError

logger = logging.getLogger(__name__)

BATCH_PRIORITY = 2
"""The priority class of batch work, see `EngineRequest.priority`."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One complete request. The engine continues after `output`, the tokens produced earlier, by any worker."""

    rid: str
    epoch: int
    digest: str  # digest of the adapter; "": the base model
    prompt: np.ndarray  # int32 token ids
    sampling: m.Sampling
    max_new_tokens: int  # counts `output` too
    output: list[int] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    salt: str = ""  # separates the prefix caches of tenants
    lora_scale: float = 1.0  # multiplies the adapter's own scale
    tenant: str = ""  # "" if unknown
    yields: bool = False  # to requests that do not; see `StepPolicy`
    alone: bool = False  # whether it yields only because its tenant was alone: not beside others that yield
    batch: bool = False  # whether its class is `batch`: it yields to all others
    grammar: str = ""  # grammar of the output, as in `messages.Body`
    task: m.Task = "generate"  # kind of output, see `messages.Body`
    second: int = 0  # index of a pair's second text, as in `messages.Body`

    @property
    def priority(self) -> int:
        """Its priority class: 0 yields to none, 1 to 0, and 2 (batch work) to both."""
        return BATCH_PRIORITY if self.batch else int(self.yields)


class TokenOutput(msgspec.Struct):  # three times as fast to create as a dataclass; each row of each step has one
    """The output of one step for one request."""

    rid: str
    epoch: int
    seq0: int  # index of ids[0] among the request's output tokens
    ids: list[int] = []
    logprobs: bytes = b""  # `messages.logprob_record_bytes` per id
    finish: str = ""  # "stop", "length" or "error"; "" while running
    error: LorafleetError | None = None
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    timing: m.Timing | None = None  # with the first token and with the end
    prompt_logprobs: bytes = b""  # records of the whole prompt, with the first token, if requested

    @classmethod
    def failed(cls, request: EngineRequest, error: LorafleetError) -> TokenOutput:
        """Return the output that ends a request for which no step has computed anything."""
        return cls(request.rid, request.epoch, len(request.output), finish="error", error=error)


def room_error(request: EngineRequest, num_virtual: int, most: int) -> BadRequest | None:
    """Return the error for a text that does not fit after its adapter's virtual tokens, None if it fits.

    most: maximum tokens of the model, for a text and its output, if any.
    """
    generates, num = request.task == "generate", len(request.prompt)
    if num_virtual + num + generates <= most:
        return None
    return BadRequest(
        f"the {'prompt' if generates else 'text'} has {num} tokens and its adapter {num_virtual} virtual ones before it"
        f"; this model takes at most {most}{' with the output' if generates else ''}",
        code="context_length_exceeded",
    )


def failure_of(request: EngineRequest, error: BaseException) -> LorafleetError:
    """Return the error that ends a request whose own data raised `error`; unexpected ones are logged.

    A panic of a library in Rust is not an `Exception`. It is blamed on the adapter's files, if there is an adapter.
    """
    if isinstance(error, LorafleetError):
        return error
    logger.error("request %s fails; others are not affected", request.rid, exc_info=error)
    if request.digest and not isinstance(error, Exception):
        return AdapterRefused([f"a library failed on its files: {type(error).__name__}"])
    return Internal(f"the request cannot be computed: {type(error).__name__}")

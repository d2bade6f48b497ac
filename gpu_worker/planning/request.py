"""What crosses between a worker's service and its engine. Imports no torch: the service starts without it."""

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
    """One request, complete. The engine continues after `output`, the tokens made before, here or elsewhere."""

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
    tenant: str = ""  # tenant; "" if unknown
    yields: bool = False  # to requests that do not, see `Policy`
    alone: bool = False  # whether it yields only because its tenant was alone: not beside others that yield
    batch: bool = False  # whether it is of the class `batch`: it yields to all that are not
    grammar: str = ""  # grammar of the output, as in `messages.Body`
    task: m.Task = "generate"  # kind of output, see `messages.Body`
    second: int = 0  # index of a pair's second text, as in `messages.Body`

    @property
    def priority(self) -> int:
        """Its class, which yields to lower ones: 0 to none, 1 to 0, 2, which batch work has, to both."""
        return BATCH_PRIORITY if self.batch else int(self.yields)


class TokenOutput(msgspec.Struct):  # a dataclass takes three times as long to make, and each row of each step has one
    """What one step made of one request."""

    rid: str
    epoch: int
    seq0: int  # index of ids[0] among the request's output tokens
    ids: list[int] = []
    logprobs: bytes = b""  # `messages.logprob_record_bytes` per id
    finish: str = ""  # "stop", "length" or "error"; "" while running
    error: LorafleetError | None = None
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    timing: m.Timing | None = None  # with its first token here, and with its end
    prompt_logprobs: bytes = b""  # records of the whole prompt, with the first token of a request that wants them

    @classmethod
    def failed(cls, request: EngineRequest, error: LorafleetError) -> TokenOutput:
        """Return the end of a request of which no step has computed anything."""
        return cls(request.rid, request.epoch, len(request.output), finish="error", error=error)


def room_error(request: EngineRequest, num_virtual: int, most: int) -> BadRequest | None:
    """Return why a text has no room behind its adapter's virtual tokens, None if it has.

    most: tokens that the model takes, of a text and, where it generates, its output.
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
    """Return the error that ends a request whose own data made `error`, which is logged if nobody expected it.

    A panic of a library in Rust is no `Exception`. It comes of the adapter's files, if it has one.
    """
    if isinstance(error, LorafleetError):
        return error
    logger.error("request %s fails; others are not affected", request.rid, exc_info=error)
    if request.digest and not isinstance(error, Exception):
        return AdapterRefused([f"a library failed on its files: {type(error).__name__}"])
    return Internal(f"the request cannot be computed: {type(error).__name__}")

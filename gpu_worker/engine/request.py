"""What crosses between a worker's asyncio side and its engine, and a request's state inside the engine."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from gpu_worker.engine.grammars import Matcher
from gpu_worker.engine.speculation import Drafter
from protocol.wire import messages as m
from protocol.wire.errors import LorafleetError

if TYPE_CHECKING:
    from gpu_worker.engine.prompt_logprobs import PromptLogprobs  # torch: the worker's shell does without


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request, complete. `output` holds tokens made before, here or elsewhere: the engine goes on after them."""

    rid: str
    epoch: int
    digest: str  # "" for the base model
    prompt: np.ndarray  # int32 token ids
    sampling: m.Sampling
    max_new_tokens: int  # counts `output` too
    output: list[int] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    salt: str = ""  # separates the prefix caches of tenants
    lora_scale: float = 1.0  # multiplies the adapter's own scale
    yields: bool = False  # to requests that do not, see `Batcher`
    grammar: str = ""  # that the output must follow, as in `messages.Body`
    task: m.Task = "generate"


@dataclass(slots=True)
class TokenOutput:
    """What one step made of one request."""

    rid: str
    epoch: int
    seq0: int  # index of ids[0] among the request's output tokens
    ids: list[int] = field(default_factory=list)
    logprobs: bytes = b""  # `messages.logprob_record_bytes` per id
    finish: str = ""  # "stop", "length" or "error"; "" while running
    stop: str = ""  # the stop string that ended it
    error: LorafleetError | None = None
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    prompt_logprobs: bytes = b""  # records of the whole prompt, with the first token of a request that wants them


class Sequence:
    """A request's state in the engine: `num_computed` tokens have their keys and values cached, of `num_tokens` known.

    A prefill chunk, a decode, a prefix hit and a resumption after preemption differ in these two numbers only.
    """

    def __init__(self, request: EngineRequest, max_len: int) -> None:
        self.request = request
        self.num_prompt = len(request.prompt)
        self.num_tokens = self.num_prompt + len(request.output)
        self.max_tokens = min(self.num_prompt + request.max_new_tokens, max_len)  # the length that ends it
        self._tokens = np.empty(max(self.max_tokens, self.num_tokens), np.int32)
        self._tokens[: self.num_prompt] = request.prompt
        self._tokens[self.num_prompt : self.num_tokens] = request.output
        self.num_computed = 0
        self.num_cached: int | None = None  # prompt tokens found in the prefix cache when first admitted
        self.blocks: list[int] = []
        self.hashes: list[bytes] = []  # of the full blocks, as far as known
        self.slot = -1  # adapter slot while running, -1 for the base model
        self.is_bound = not (request.digest or request.grammar)  # what its adapter and grammar mean is known: the next
        self.activates = False  # the adapter's LoRA counts from some token on only
        self.active_from = 0  # that token
        self.num_base = 0  # tokens from the beginning whose keys and values are the base model's
        self.matcher: Matcher | None = None  # of its grammar, if it has one
        self.coming: Future[Matcher] | None = None  # it, while it is made
        self.drafter: Drafter | None = None  # guesses its next tokens, if that is wished
        self.prompt_logprobs: PromptLogprobs | None = None  # being recorded, until its first token comes
        self.num_skips = 0  # plans that passed it over for lack of blocks
        self.yields = request.yields  # until it has been passed over too often

    @property
    def rid(self) -> str:
        return self.request.rid

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens known but not computed; 1 is a decode."""
        return self.num_tokens - self.num_computed

    @property
    def tokens(self) -> np.ndarray:
        """All known token ids: int32 [num_tokens], a view."""
        return self._tokens[: self.num_tokens]

    @property
    def output(self) -> np.ndarray:
        """Output token ids: int32 [num_output], a view."""
        return self._tokens[self.num_prompt : self.num_tokens]

    def append(self, token: int) -> None:
        self._tokens[self.num_tokens] = token
        self.num_tokens += 1


@dataclass(slots=True)
class EngineStats:
    """What the engine says of itself once a second."""

    capacity: int  # requests it would hold at once
    max_step_tokens: int = 0
    running: int = 0
    waiting: int = 0
    waiting_adapter: int = 0  # of `waiting`, those whose adapter is on its way
    kv_blocks_free: int = 0
    kv_blocks_total: int = 0
    pool_bytes_free: int = 0
    pool_bytes_total: int = 0
    step_ms: float = 0.0
    tokens_per_s: float = 0.0
    step_model: m.StepModel = field(default_factory=m.StepModel)
    resident: list[str] = field(default_factory=list)
    loading: list[str] = field(default_factory=list)
    host: list[str] = field(default_factory=list)
    pinned: dict[str, str] = field(default_factory=dict)  # digest -> why it is not in the pool
    num_loads: int = 0  # adapters copied into the pool
    num_fetches: int = 0  # adapters fetched and packed
    counters: m.WorkerCounters = field(default_factory=m.WorkerCounters)

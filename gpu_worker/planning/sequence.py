"""A request's state inside the engine."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np

from gpu_worker.planning.blocks import chain_hash, chain_seed
from gpu_worker.planning.request import EngineRequest, TokenOutput
from gpu_worker.planning.speculation import Drafter
from gpu_worker.planning.stop import StopRules
from gpu_worker.sampling.adjustment import Adjustment
from gpu_worker.sampling.grammars import GrammarMatcher
from gpu_worker.sampling.logprobs import PromptLogprobs
from gpu_worker.sampling.sampling import GREEDY_TEMPERATURE
from gpu_worker.tasks.pooling import TextPool
from protocol.runtime.settings import BLOCK_TOKENS
from protocol.wire.errors import LorafleetError


class Sequence:
    """A request's tokens and how far they are computed.

    Of `num_tokens` known tokens, `num_computed` have their keys and values cached. A prefill chunk, a decode, a prefix
    hit and a resumption after preemption differ in these two numbers only. The last token may be one that is expected:
    it is counted, and computed by the next step, but only the device knows which it is.
    """

    # Every step looks at each of them, when the processor's caches hold little but weights: one of a dictionary would
    # take several times as many lines of memory.
    __slots__ = (
        "_tokens", "activates", "active_from", "adjustment", "blocks", "drafter", "expected_row", "failure", "hashes",
        "is_bound", "is_scored_by_tokens", "kept", "last_turn", "matcher", "max_tokens", "num_base", "num_cached",
        "num_computed", "num_prompt", "num_skips", "num_tokens", "num_virtual", "pending_matcher", "pool",
        "prompt_logprobs",
        "request", "rid", "slot", "state_read", "state_saved", "state_slots", "stop_rules", "vocab_size",
        "wants_likeliest", "yields",
    )  # fmt: skip

    def __init__(self, request: EngineRequest, max_len: int) -> None:
        """max_len: tokens of prompt and output that the model can hold."""
        self.request = request
        self.rid = request.rid
        self.num_virtual = 0  # of `num_prompt`, the adapter's virtual tokens, which come first
        self.num_prompt = len(request.prompt)
        self.num_tokens = self.num_prompt + len(request.output)
        self.max_tokens = min(self.num_prompt + request.max_new_tokens, max_len)  # the length that ends it
        self._tokens = np.empty(max(self.max_tokens, self.num_tokens), np.int32)
        self._tokens[: self.num_prompt] = request.prompt
        self._tokens[self.num_prompt : self.num_tokens] = request.output
        self.num_computed = 0
        self.num_cached: int | None = None  # prompt tokens found in the prefix cache when first admitted
        self.blocks: list[int] = []
        self.hashes: list[bytes] = []  # hashes of the full blocks known so far
        self.slot = -1  # adapter slot while running, -1 for the base model
        self.state_slots: list[int] = []  # slots of its states, where the model has any; see `Batcher`
        self.state_read = -1  # the slot with which the next step begins
        self.state_saved = b""  # hash of the newest state saved of its output
        self.kept: object = None  # its model's cache, if sequences run unbatched
        self.num_skips = 0  # plans that passed it over for lack of blocks
        self.last_turn = 0  # the last plan of limited time that it was part of, where it yields
        self.yields = request.priority > 0  # to lower classes, until it has been passed over too often

        # True once adapter and grammar are resolved, which sets the fields below; only then it may run.
        self.is_bound = not (request.digest or request.grammar)
        self.activates = False  # whether the adapter's LoRA counts from `active_from` on only
        self.active_from = 0  # position of the first token that the LoRA counts for
        self.num_base = 0  # tokens from the beginning whose keys and values are the base model's
        self.vocab_size = 0  # tokens that its adapter knows; 0: those of the base
        self.stop_rules: StopRules | None = None  # None until the tokenizer that they need is known
        self.pending_matcher: Future[GrammarMatcher] | None = None  # result of grammar compilation
        self.matcher: GrammarMatcher | None = None  # matcher of its grammar, if any
        self.expected_row = -1  # row of the step in flight in which its last token is chosen; -1: that is known
        self.failure: BaseException | None = None  # exception raised by a step on its own data; it ends with that step
        self.adjustment = Adjustment.of(request.sampling, self._tokens[: self.num_prompt])  # None: nothing to adjust
        greedy, num_logprobs = request.sampling.temperature < GREEDY_TEMPERATURE, request.sampling.num_logprobs
        self.wants_likeliest = greedy and num_logprobs is None  # among the allowed tokens
        self.drafter: Drafter | None = None  # proposes its next tokens, where the engine speculates
        self.prompt_logprobs: PromptLogprobs | None = None  # recorded until its first token comes, if wanted
        self.pool: TextPool | None = None  # pool of an embedding or scoring request, see `pooled.py`
        self.is_scored_by_tokens = False  # whether its result is read off the logits of its last token

    @property
    def priority(self) -> int:
        """Its class: 0 if it yields to nobody, 1 if to class 0, 2 if to both: it is batch work."""
        return max(1, self.request.priority) if self.yields else 0

    @property
    def awaits_mask(self) -> bool:
        """Whether it sits steps out until it is known which tokens its grammar allows."""
        return self.matcher is not None and self.matcher.is_filling

    @property
    def sits_out(self) -> bool:
        """Whether it takes part in no step now: it awaits a mask, or the token that it is long enough with."""
        return self.awaits_mask or (self.expected_row >= 0 and self.num_tokens >= self.max_tokens)

    @property
    def needs_all_rows(self) -> bool:
        """Whether every token of its prompt must be computed here: nothing of a cached block but keys is known."""
        return self.prompt_logprobs is not None or (self.pool is not None and self.pool.needs_all)

    def end_at(self, num_tokens: int) -> None:
        """Leave out what follows a prompt's first tokens, because nothing that is asked for depends on it."""
        self.num_prompt = self.num_tokens = self.num_virtual + num_tokens

    def begin_with(self, num: int, max_len: int) -> None:
        """Put an adapter's virtual tokens before its prompt, ids -1, -2, …, before any of it is computed.

        max_len: as of `__init__`; virtual tokens count.
        """
        self.num_virtual = num
        self.num_prompt += num
        self.num_tokens += num
        self.max_tokens = min(self.num_prompt + self.request.max_new_tokens, max_len)
        tokens = np.empty(max(self.max_tokens, self.num_tokens), np.int32)
        tokens[:num] = -1 - np.arange(num)
        tokens[num : self.num_tokens] = self._tokens[: self.num_tokens - num]
        self._tokens = tokens

    @property
    def num_output(self) -> int:
        """Output tokens known."""
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
    def last_token(self) -> int:
        """The last known token."""
        return self._tokens.item(self.num_tokens - 1)

    @property
    def output(self) -> np.ndarray:
        """Output token ids: int32 [num_output], a view."""
        return self._tokens[self.num_prompt : self.num_tokens]

    def append(self, token: int) -> None:
        """Add an output token."""
        self._tokens[self.num_tokens] = token
        self.num_tokens += 1

    def expect(self, row: int) -> None:
        """Add a place for the token that the step in flight chooses in a row; its id is not known on the host."""
        self.append(0)
        self.expected_row = row

    def expect_none(self) -> None:
        """Take the place of an expected token away again, if there is one."""
        if self.expected_row >= 0:
            self.num_tokens -= 1
            self.expected_row = -1

    def accept(self, token: int) -> str:
        """Add an output token and apply stop rules and grammar; return how it ends the request, "" if it does not."""
        assert self.stop_rules is not None
        self.append(token)
        finish = self.stop_rules.add(token)
        if self.matcher is None or finish == "stop":
            return finish
        self.matcher.consume(token)
        return "stop" if self.matcher.is_complete else finish

    def put_out(self, ids: list[int], finish: str = "", logprobs: bytes = b"") -> TokenOutput:
        """Return the output with the newest tokens, `ids`, and the end if there is one."""
        seq0 = self.num_tokens - self.num_prompt - (self.expected_row >= 0) - len(ids)
        return TokenOutput(self.rid, self.request.epoch, seq0, ids, logprobs, finish, None, self.num_cached or 0)

    def fail(self, error: LorafleetError) -> TokenOutput:
        """Return the output that ends the request with an error."""
        output = self.put_out([], "error")
        output.error = error
        return output

    def extend_hashes(self, num_blocks: int, fingerprint: str) -> None:
        """Compute the hashes of its first `num_blocks` blocks, which must be full. fingerprint: of the base model.

        Blocks of nothing but virtual tokens are shared by all tenants: they hold what everybody knows who may use the
        adapter. The salt separates what follows.
        """
        request = self.request
        while len(self.hashes) < num_blocks:
            start = len(self.hashes) * BLOCK_TOKENS
            end = start + BLOCK_TOKENS
            digest = self.owner(len(self.hashes))
            if not self.hashes:
                salt = request.salt if end > self.num_virtual else ""
                parent = chain_seed(fingerprint, digest, request.lora_scale, salt)
            elif start <= self.num_virtual < end:
                parent = chain_seed(self.hashes[-1].hex(), digest, request.lora_scale, request.salt)
            else:
                parent = self.hashes[-1]
            if self.activates and end > self.active_from:
                # The block's content depends on the token from which on the adapter is active.
                parent = chain_seed(f"{parent.hex()}:{self.active_from}", digest, request.lora_scale, "")
            self.hashes.append(chain_hash(parent, self.tokens[start:end]))

    def owner(self, block: int) -> str:
        """Return the digest of the adapter that computes a block of it, "" for the base model."""
        return "" if (block + 1) * BLOCK_TOKENS <= self.num_base else self.request.digest

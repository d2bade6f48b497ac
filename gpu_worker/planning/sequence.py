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
    """A request's tokens, and how many of them are computed.

    Of `num_tokens` known tokens, `num_computed` have keys and values cached. A prefill chunk, a decode, a prefix hit
    and a resumption after preemption differ only in these two numbers. The last token may be an expected one: it is
    counted, and the next step computes it, but only the device knows its id.
    """

    # Every step reads all sequences, when the CPU caches hold little but weights: an instance dictionary would touch
    # several times as many cache lines.
    __slots__ = (
        "_tokens", "activates", "active_from", "adjustment", "blocks", "drafter", "expected_row", "failure", "hashes",
        "is_bound", "is_scored_by_tokens", "kept", "last_turn", "matcher", "max_tokens", "num_base", "num_cached",
        "num_computed", "num_prompt", "num_skips", "num_tokens", "num_virtual", "pending_matcher", "pool",
        "prompt_logprobs",
        "request", "rid", "slot", "state_read", "state_saved", "state_slots", "stop_rules", "vocab_size",
        "wants_likeliest", "yields",
    )  # fmt: skip

    def __init__(self, request: EngineRequest, max_len: int) -> None:
        """max_len: maximum tokens of prompt and output for the model."""
        self.request = request
        self.rid = request.rid
        self.num_virtual = 0  # the adapter's virtual tokens, which come first and count in `num_prompt`
        self.num_prompt = len(request.prompt)
        self.num_tokens = self.num_prompt + len(request.output)
        self.max_tokens = min(self.num_prompt + request.max_new_tokens, max_len)  # the length at which it ends
        self._tokens = np.empty(max(self.max_tokens, self.num_tokens), np.int32)
        self._tokens[: self.num_prompt] = request.prompt
        self._tokens[self.num_prompt : self.num_tokens] = request.output
        self.num_computed = 0
        self.num_cached: int | None = None  # prompt tokens found in the prefix cache when first admitted
        self.blocks: list[int] = []
        self.hashes: list[bytes] = []  # hashes of the full blocks known so far
        self.slot = -1  # adapter slot while running, -1 for the base model
        self.state_slots: list[int] = []  # slots of its states, if the model has any; see `StatePool`
        self.state_read = -1  # slot that the next step reads its states from
        self.state_saved = b""  # hash of the newest saved state of its output
        self.kept: object = None  # its model's cache, if sequences run unbatched
        self.num_skips = 0  # plans that skipped it for lack of blocks
        self.last_turn = 0  # the last plan with a time limit that included it, if it yields
        self.yields = request.priority > 0  # to lower classes, until it has been skipped too often

        # True once adapter and grammar are resolved, which sets the fields below. It may not run before.
        self.is_bound = not (request.digest or request.grammar)
        self.activates = False  # whether the adapter's LoRA applies only from `active_from` on
        self.active_from = 0  # position of the first token to which the LoRA applies
        self.num_base = 0  # first tokens whose keys and values are the base model's
        self.vocab_size = 0  # vocabulary size of its adapter; 0: the base's
        self.stop_rules: StopRules | None = None  # None until the tokenizer they need is known
        self.pending_matcher: Future[GrammarMatcher] | None = None  # result of grammar compilation
        self.matcher: GrammarMatcher | None = None  # matcher of its grammar, if any
        self.expected_row = -1  # row in which the step in flight chooses its last token; -1: it is known
        self.failure: BaseException | None = None  # exception that a step raised on its own data; ends it in that step
        self.adjustment = Adjustment.of(request.sampling, self._tokens[: self.num_prompt])  # None: nothing to adjust
        greedy, num_logprobs = request.sampling.temperature < GREEDY_TEMPERATURE, request.sampling.num_logprobs
        self.wants_likeliest = greedy and num_logprobs is None  # among the allowed tokens
        self.drafter: Drafter | None = None  # proposes its next tokens, if the engine uses draft tokens
        self.prompt_logprobs: PromptLogprobs | None = None  # recorder until the first token, if requested
        self.pool: TextPool | None = None  # pool of an embedding or scoring request, see `pooled.py`
        self.is_scored_by_tokens = False  # whether its result comes from its last token's logits

    @property
    def priority(self) -> int:
        """Its class: 0 if it yields to none, 1 if to class 0, 2 (batch work) if to both."""
        return max(1, self.request.priority) if self.yields else 0

    @property
    def awaits_mask(self) -> bool:
        """Whether it must wait until its grammar's next mask is known."""
        return self.matcher is not None and self.matcher.is_filling

    @property
    def sits_out(self) -> bool:
        """Whether it is left out of steps now: its mask is pending, or its expected token makes it long enough."""
        return self.awaits_mask or (self.expected_row >= 0 and self.num_tokens >= self.max_tokens)

    @property
    def needs_all_rows(self) -> bool:
        """Whether every prompt token must be computed here: cached blocks hold keys and values, not hidden states."""
        return self.prompt_logprobs is not None or (self.pool is not None and self.pool.needs_all)

    def end_at(self, num_tokens: int) -> None:
        """Truncate a prompt after `num_tokens` tokens, because the requested result does not depend on the rest."""
        self.num_prompt = self.num_tokens = self.num_virtual + num_tokens

    def begin_with(self, num: int, max_len: int) -> None:
        """Put an adapter's virtual tokens (ids -1, -2, …) before its prompt. Call before any token is computed.

        max_len: as in `__init__`; virtual tokens count.
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
        """The number of known output tokens."""
        return self.num_tokens - self.num_prompt

    @property
    def num_pending(self) -> int:
        """The number of tokens known but not computed; 1 is a decode."""
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
        """Add a place for the token that the step in flight chooses in `row`; the host does not know its id yet."""
        self.append(0)
        self.expected_row = row

    def expect_none(self) -> None:
        """Remove the place of an expected token, if there is one."""
        if self.expected_row >= 0:
            self.num_tokens -= 1
            self.expected_row = -1

    def accept(self, token: int) -> str:
        """Add an output token and apply stop rules and grammar; return the finish reason, "" while the request runs."""
        assert self.stop_rules is not None
        self.append(token)
        finish = self.stop_rules.add(token)
        if self.matcher is None or finish == "stop":
            return finish
        self.matcher.consume(token)
        return "stop" if self.matcher.is_complete else finish

    def put_out(self, ids: list[int], finish: str = "", logprobs: bytes = b"") -> TokenOutput:
        """Return an output with the newest tokens, `ids`, and the finish reason, if any."""
        seq0 = self.num_tokens - self.num_prompt - (self.expected_row >= 0) - len(ids)
        return TokenOutput(self.rid, self.request.epoch, seq0, ids, logprobs, finish, None, self.num_cached or 0)

    def fail(self, error: LorafleetError) -> TokenOutput:
        """Return the output that ends the request with an error."""
        output = self.put_out([], "error")
        output.error = error
        return output

    def extend_hashes(self, num_blocks: int, fingerprint: str) -> None:
        """Compute the hashes of its first `num_blocks` blocks, which must be full. fingerprint: the base model's.

        Blocks of virtual tokens only are shared by all tenants: everyone who may use the adapter knows them. The salt
        separates what follows.
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
                # The block's content depends on the position from which the adapter is active.
                parent = chain_seed(f"{parent.hex()}:{self.active_from}", digest, request.lora_scale, "")
            self.hashes.append(chain_hash(parent, self.tokens[start:end]))

    def owner(self, block: int) -> str:
        """Return the digest of the adapter that computes one of its blocks, "" for the base model."""
        return "" if (block + 1) * BLOCK_TOKENS <= self.num_base else self.request.digest

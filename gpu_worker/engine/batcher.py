"""Which tokens of which requests the next step computes. Pure.

There is no prefill phase and no decode phase: every sequence has `num_computed` chasing `num_tokens`, and a step gives
each some tokens within a budget. What lacks blocks, budget or its adapter is passed over; nothing waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from gpu_worker.engine.blocks import BlockPool, chain_hash, chain_seed
from gpu_worker.engine.sequence import Sequence
from protocol.runtime.settings import SHORT_STEP_TOKENS_PER_SEQ
from protocol.wire.messages import StepModel

BLOCK_TOKENS = 16

MAX_SKIPS = 64
"""Plans in which others may overtake a request that lacks blocks; then admission waits for it."""

MAX_PROMPT_ROWS = 256
"""Tokens of a step that lie in prompts whose logprobs are recorded; the logits of each take the vocabulary's size."""


class AdapterGate(Protocol):
    """The adapter pool as the batcher sees it."""

    def acquire(self, digest: str) -> int | None:
        """Take a reference to a resident adapter and return its slot; None while it is not resident."""
        ...

    def release(self, digest: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    max_num_seqs: int
    max_step_tokens: int
    prefix_cache: bool = True
    max_draft_tokens: int = 0  # guesses a sequence may add to a step, 0: none
    max_draft_step_tokens: int = 0  # guesses are added as long as the step has no more tokens than that

    @property
    def short_step_tokens(self) -> int:
        """Tokens of a step up to which prompts that give way are computed."""
        return min(self.max_step_tokens, SHORT_STEP_TOKENS_PER_SEQ * self.max_num_seqs)

    def __post_init__(self) -> None:
        if not 0 < self.max_num_seqs <= self.max_step_tokens:
            raise ValueError("max_step_tokens must be at least max_num_seqs, so that every step can decode all")


@dataclass(slots=True)
class StepPlan:
    """Tokens to compute per sequence, decodes first."""

    num_new: dict[Sequence, int] = field(default_factory=dict)
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)  # guessed tokens, counted in num_new
    preempted: list[Sequence] = field(default_factory=list)
    num_cached: int = 0  # tokens of newly admitted sequences that were found in the prefix cache

    @property
    def num_tokens(self) -> int:
        return sum(self.num_new.values())

    @property
    def num_prompt_rows(self) -> int:
        """Tokens of sequences whose prompt's logprobs are recorded."""
        return sum(num_new for seq, num_new in self.num_new.items() if seq.prompt_logprobs is not None)


class Batcher:
    """The running and waiting sequences of one engine."""

    def __init__(self, limits: Limits, blocks: BlockPool, gate: AdapterGate, fingerprint: str) -> None:
        self.limits = limits
        self.blocks = blocks
        self.running: list[Sequence] = []  # in order of admission
        self.waiting: deque[Sequence] = deque()  # in the scheduler's order; preempted ones first
        self.step_model = StepModel()
        """How long steps take, as far as is known."""
        self._paused = False  # whether what gives way paused in the last plan
        self._gate = gate
        self._fingerprint = fingerprint

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence and free what it holds. It must not be part of a plan that is still to be completed."""
        if seq in self.running:
            self.running.remove(seq)
            self._free(seq)
        else:
            self.waiting.remove(seq)

    def plan(self) -> StepPlan:
        """Choose the next step's tokens and give each chosen sequence the blocks it needs.

        Decodes first, then prompts; what gives way last, its prompts only until the step has `short_step_tokens`. All
        of it pauses beside others' prompts if that brings their first tokens nearer by more than one more step costs;
        never twice in a row.
        """
        plan = StepPlan()
        decodes: tuple[list[Sequence], list[Sequence]] = ([], [])  # the second ones give way
        prompts: tuple[list[Sequence], list[Sequence]] = ([], [])
        for seq in self.running:
            (decodes if seq.num_pending == 1 else prompts)[seq.gives_way].append(seq)
        may_pause = not self._paused and self._is_worth_a_step(decodes[True])
        budget = self._go_on(decodes[False], plan, self.limits.max_step_tokens)
        if not may_pause:
            budget = self._go_on(decodes[True], plan, budget)
        before = budget
        budget = self._go_on(prompts[False], plan, budget)
        budget = self._admit_waiting(plan, budget, gives_way=False)
        self._paused = may_pause and budget < before
        if not self._paused:
            if may_pause:
                budget = self._go_on(decodes[True], plan, budget)
            budget = max(0, budget - (self.limits.max_step_tokens - self.limits.short_step_tokens))
            budget = self._go_on(prompts[True], plan, budget)
            self._admit_waiting(plan, budget, gives_way=True)
        if self.limits.max_draft_tokens and not plan.preempted:
            self._add_drafts(plan)
        return plan

    def _is_worth_a_step(self, decodes: list[Sequence]) -> bool:
        return self.step_model.is_worth_a_step(len(decodes), sum(seq.num_tokens for seq in decodes))

    def _go_on(self, seqs: list[Sequence], plan: StepPlan, budget: int) -> int:
        """Give running sequences what they lack, within `budget` tokens. Returns what is left of it."""
        for seq in seqs:
            num_new = _chunk(seq, min(seq.num_pending, budget), plan)
            if num_new and seq not in plan.preempted and self._grow(seq, num_new, plan):
                plan.num_new[seq] = num_new
                budget -= num_new
        return budget

    def complete(self, plan: StepPlan) -> None:
        """Note that a plan's tokens are computed; their full blocks can be hit from now on.

        Guesses are not among them before they have proved right, see `advance`.
        """
        for seq, num_new in plan.num_new.items():
            self.advance(seq, num_new - len(plan.drafts.get(seq, ())))

    def advance(self, seq: Sequence, num_new: int) -> None:
        """Note that the next tokens of a running sequence are computed."""
        first = seq.num_computed // BLOCK_TOKENS
        seq.num_computed += num_new
        if self.limits.prefix_cache:
            last = seq.num_computed // BLOCK_TOKENS
            self._extend_hashes(seq, last)
            for i in range(first, last):
                self.blocks.publish(seq.blocks[i], seq.hashes[i], self._owner(seq, i))

    def _add_drafts(self, plan: StepPlan) -> None:
        """Let decoding sequences guess, where the step has room to spare and the blocks are there."""
        decoding = [seq for seq, num_new in plan.num_new.items() if seq.num_pending == num_new == 1 and seq.drafter]
        room = min(self.limits.max_draft_step_tokens, self.limits.max_step_tokens) - plan.num_tokens
        for i, seq in enumerate(decoding):
            share = room // (len(decoding) - i)  # what one leaves is the next one's
            limit = min(share, self.limits.max_draft_tokens, seq.max_tokens - seq.num_tokens - 1)
            if limit < 1 or seq.drafter is None:
                continue
            guesses = seq.drafter.propose(seq.tokens, limit)
            if seq.matcher is not None:
                guesses = seq.matcher.possible(guesses)
            missing = _num_blocks(seq.num_tokens + len(guesses)) - len(seq.blocks)
            if not guesses or missing > self.blocks.num_free:
                continue
            if missing > 0:
                seq.blocks += self.blocks.allocate(missing)
            plan.drafts[seq] = guesses
            plan.num_new[seq] += len(guesses)
            room -= len(guesses)

    def _grow(self, seq: Sequence, num_new: int, plan: StepPlan) -> bool:
        """Give a running sequence the blocks for `num_new` more tokens, if need be those of others.

        Preempted are the latest arrivals, first those over their share. Returns False when that is the sequence itself.
        """
        missing = _num_blocks(seq.num_computed + num_new) - len(seq.blocks)
        while missing > self.blocks.num_free:
            victim = next((other for other in reversed(self.running) if other.over_share), self.running[-1])
            self._preempt(victim, plan)
            if victim is seq:
                return False
        if missing > 0:
            seq.blocks += self.blocks.allocate(missing)
        return True

    def _preempt(self, seq: Sequence, plan: StepPlan) -> None:
        """Take back a sequence's blocks and adapter but keep its tokens; it is first in line again."""
        plan.num_new.pop(seq, None)
        plan.preempted.append(seq)
        self.running.remove(seq)
        self._free(seq)
        self.waiting.appendleft(seq)

    def _free(self, seq: Sequence) -> None:
        self.blocks.release(seq.blocks)
        seq.blocks = []
        seq.num_computed = 0
        if seq.request.digest:
            self._gate.release(seq.request.digest)
            seq.slot = -1

    def _admit_waiting(self, plan: StepPlan, budget: int, *, gives_way: bool) -> int:
        """Start waiting sequences, within `budget` tokens. Returns what is left of it."""
        if plan.preempted or (gives_way and any(seq.num_skips > MAX_SKIPS for seq in self.waiting)):
            return budget
        for seq in [seq for seq in self.waiting if seq.gives_way == gives_way]:
            if budget == 0:
                break
            is_full = len(self.running) == self.limits.max_num_seqs
            if is_full and (seq.over_share or not any(other.over_share for other in self.running)):
                continue
            num_new = self._admit(seq, budget, plan)
            if num_new:
                plan.num_new[seq] = num_new
                plan.num_cached += seq.num_computed
                budget -= num_new
            elif seq.num_skips > MAX_SKIPS:
                break
        return budget

    def _admit(self, seq: Sequence, budget: int, plan: StepPlan) -> int:
        """Start a waiting sequence if room and its adapter are there. Returns its tokens in this step, 0 if not."""
        if not seq.is_bound:
            return 0  # its adapter has not been in the pool yet, or its grammar is being compiled
        cached = self._lookup(seq)
        num_cached = len(cached) * BLOCK_TOKENS
        num_new = _chunk(seq, min(seq.num_tokens - num_cached, budget), plan)
        if not num_new:
            return 0
        digest = seq.request.digest
        slot = self._gate.acquire(digest) if digest else -1
        if slot is None:
            return 0
        if not self._make_room(seq, cached, plan):
            if digest:
                self._gate.release(digest)
            seq.num_skips += 1
            seq.gives_way = seq.gives_way and seq.num_skips <= MAX_SKIPS
            return 0
        seq.slot = slot
        self.blocks.take(cached)
        seq.blocks = cached + self.blocks.allocate(_num_blocks(num_cached + num_new) - len(cached))
        seq.num_computed = num_cached
        seq.num_skips = 0
        if seq.num_cached is None:
            seq.num_cached = min(num_cached, seq.num_prompt)
        self.waiting.remove(seq)
        self.running.append(seq)
        return num_new

    def _make_room(self, seq: Sequence, cached: list[int], plan: StepPlan) -> bool:
        """See to a place and blocks for a waiting sequence, if need be of the latest of those over their share.

        Returns False, and nothing happens, when that is not enough.
        """
        # It must fit whole, with a block of growth for everyone who runs, or it would soon be preempted again.
        num_free = self.blocks.num_free - self.blocks.num_idle(cached)
        num_running, num_blocks = len(self.running), _num_blocks(seq.num_tokens) - len(cached)
        over_share = [] if seq.over_share else [other for other in self.running if other.over_share]
        victims: list[Sequence] = []
        freed = self.blocks.freeing(kept=cached)
        while num_running == self.limits.max_num_seqs or num_blocks + num_running > num_free:
            if not over_share:
                return False
            victims.append(over_share.pop())
            num_running -= 1
            num_free += freed(victims[-1].blocks)
        for victim in victims:
            self._preempt(victim, plan)
        return True

    def _lookup(self, seq: Sequence) -> list[int]:
        """Return the cached blocks of a sequence's beginning; its last token is always computed, for its logits."""
        if not self.limits.prefix_cache or seq.prompt_logprobs is not None:
            return []
        num_full = (seq.num_tokens - 1) // BLOCK_TOKENS
        self._extend_hashes(seq, num_full)
        return self.blocks.lookup(seq.hashes[:num_full])

    def _extend_hashes(self, seq: Sequence, num_blocks: int) -> None:
        request = seq.request
        while len(seq.hashes) < num_blocks:
            start = len(seq.hashes) * BLOCK_TOKENS
            end = start + BLOCK_TOKENS
            digest = self._owner(seq, len(seq.hashes))
            if not seq.hashes:
                parent = chain_seed(self._fingerprint, digest, request.lora_scale, request.salt)
            else:
                parent = seq.hashes[-1]
            if seq.activates and end > seq.active_from:
                # What the block holds depends on where the adapter set in.
                parent = chain_seed(f"{parent.hex()}:{seq.active_from}", digest, request.lora_scale, "")
            seq.hashes.append(chain_hash(parent, seq.tokens[start:end]))

    def _owner(self, seq: Sequence, block: int) -> str:
        """Return whose keys and values a block of a sequence holds: an adapter's digest, "" for the base model's."""
        return "" if (block + 1) * BLOCK_TOKENS <= seq.num_base else seq.request.digest

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks and sequences agree."""
        self.blocks.check_integrity([seq.blocks for seq in self])
        for seq in self.waiting:
            if seq.blocks or seq.num_computed or seq.slot >= 0:
                raise AssertionError(f"{seq.rid} waits but holds blocks or an adapter slot")


def _chunk(seq: Sequence, num_new: int, plan: StepPlan) -> int:
    """Return how many of a sequence's next tokens a step takes: all, but where the logits of each are kept."""
    return num_new if seq.prompt_logprobs is None else min(num_new, MAX_PROMPT_ROWS - plan.num_prompt_rows)


def _num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)

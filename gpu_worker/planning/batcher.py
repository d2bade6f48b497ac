"""An engine's sequences, and the tokens and KV blocks of its next step. Pure: does no I/O.

`policy.py` decides who is first and how long a step may be; the batcher applies its decisions. Prefill and decode are
not distinguished: of a sequence's `num_tokens`, `num_computed` have keys and values cached, and a step computes some of
the rest, within a token budget (chunked prefill: Agrawal et al., 2024). A sequence that lacks blocks, budget or its
adapter is skipped; the others do not wait for it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import takewhile
from typing import Protocol

from gpu_worker.planning.blocks import BlockPool
from gpu_worker.planning.policy import MAX_SKIPS, BatchLimits, StepPolicy
from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.states import OUTPUT_TOKENS, StatePool
from gpu_worker.planning.step_limit import StepTime
from gpu_worker.planning.step_plan import StepPlan
from protocol.runtime.settings import BLOCK_TOKENS
from protocol.wire.messages import StepModel

MAX_PROMPT_ROWS = 256
"""Maximum tokens of a step in prompts whose logprobs are recorded; each needs a full row of logits."""


class AdapterSlots(Protocol):
    """The adapter pool, as the batcher uses it."""

    def acquire(self, digest: str) -> int | None:
        """Add a reference to a resident adapter and return its slot; return None while it is not resident."""
        ...

    def release(self, digest: str) -> None:
        """Drop a reference to an adapter."""
        ...

    def rank(self, digest: str) -> int:
        """Return the largest rank of an adapter, 0 while it is not resident."""
        ...


class DraftSource(Protocol):
    """The draft model, as the batcher uses it."""

    def propose(self, limits: Mapping[Sequence, int], plan: StepPlan) -> Mapping[Sequence, list[int]]:
        """Return draft tokens by sequence, at most its limit each; none if drafting does not pay off.

        plan: the step without drafts. It holds decodes only, including those of these sequences.
        """
        ...

    def learn(self, seq: Sequence, num_drafted: int, num_right: int) -> None:
        """Record that the first `num_right` tokens of a draft were right."""
        ...

    def watching(self, plan: StepPlan) -> AbstractContextManager[None]:
        """Return a context in which a step's forward pass runs."""
        ...

    def take_seconds(self) -> float:
        """Return the seconds spent drafting since the last call."""
        ...

    def note_step(self, plan: StepPlan, seconds: float) -> None:
        """Record the time of a step small enough for draft tokens."""
        ...

    def forget(self, seq: Sequence) -> None:
        """Free what is stored for a sequence."""
        ...

    def check_integrity(self) -> None:
        """Raise AssertionError unless all memory is accounted for."""
        ...


class Batcher:
    """The running and waiting sequences of one engine.

    A sequence that yields gets the tokens, places and blocks that the others leave: see `StepPolicy` for tokens and for
    who yields, `_make_room` for places and blocks. fingerprint: the base model's, part of the prefix cache's keys.
    """

    def __init__(
        self,
        limits: BatchLimits,
        blocks: BlockPool,
        slots: AdapterSlots,
        fingerprint: str,
        states: StatePool | None = None,
        draft_model: DraftSource | None = None,
    ) -> None:
        """states: for a model whose layers keep states; has a slot for every sequence that may run."""
        self.limits = limits
        self.blocks = blocks
        self.states = states
        if states is not None:
            blocks.on_forget = states.forget
        self.running: list[Sequence] = []  # in order of admission
        self.waiting: deque[Sequence] = deque()  # in order of arrival; preempted ones first
        self.step_model = StepModel()
        """Predicts step times; all terms are zero until it is fitted."""
        self.policy = StepPolicy(limits)
        self.draft_model = draft_model
        self._slots = slots
        self._fingerprint = fingerprint

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence for admission."""
        self.policy.arrive(seq, self)
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence and free its resources. `leave` removes it from a plan that is still being computed."""
        if seq in self.running:
            self.running.remove(seq)
            self._free(seq)
        else:
            self.waiting.remove(seq)
        if self.draft_model is not None:
            self.draft_model.forget(seq)

    def plan(self) -> StepPlan:
        """Choose the next step's tokens by the policy, and allocate the blocks that each chosen sequence needs."""
        plan = StepPlan(budget=self.limits.max_step_tokens, has_states=self.states is not None)
        self.policy.fill(plan, self)
        if self.limits.max_draft_tokens and not plan.preempted:
            self._add_drafts(plan)
        self.policy.close(plan, self)
        return plan

    def time_of(self, plan: StepPlan) -> StepTime:
        """Return the predicted time of a step that holds decodes only."""
        time = StepTime(self.step_model)
        for seq in plan.num_new:
            time.add(1, seq.num_tokens, seq.request.digest, self._slots.rank(seq.request.digest))
        return time

    def note_time(self, plan: StepPlan, seconds: float) -> None:
        """Record the measured time of a plan's step."""
        self.policy.note_time(plan, seconds)
        if self.draft_model is not None and plan.num_tokens <= self.limits.max_draft_step_tokens:
            self.draft_model.note_step(plan, seconds)

    def run(self, seqs: Iterable[Sequence], plan: StepPlan, time: StepTime | None = None) -> None:
        """Add the pending tokens of running sequences to the plan, within budget and time."""
        for seq in seqs:
            num_new = self._chunk(seq, seq.num_computed, plan, time)
            if num_new and seq not in plan.preempted and self._grow(seq, num_new, plan):
                self._add(seq, num_new, plan, time)

    def _chunk(self, seq: Sequence, num_computed: int, plan: StepPlan, time: StepTime | None) -> int:
        """Return how many pending tokens of a sequence fit the budget, the time limit and the rows for prompt logprobs.

        The first sequence in a limited step always gets a token, so that sequences that yield are not starved.
        """
        most = (self.limits.max_later_chunk if num_computed else 0) or plan.budget
        num_new = min(seq.num_tokens - num_computed, plan.budget, most)
        if time is not None:
            digest = seq.request.digest
            room = time.room(num_computed, digest, self._slots.rank(digest))
            num_new = int(min(num_new, max(room, 1) if time.is_empty else room))
        return num_new if seq.prompt_logprobs is None else min(num_new, MAX_PROMPT_ROWS - plan.num_prompt_rows)

    def _add(self, seq: Sequence, num_new: int, plan: StepPlan, time: StepTime | None) -> None:
        """Add a sequence's next `num_new` tokens to the step."""
        plan.add(seq, num_new)
        if self.states is not None and self.limits.prefix_cache:
            saves = self.states.plan_saves(seq, num_new)
            if saves:
                plan.saves[seq] = saves
        if time is not None:
            digest = seq.request.digest
            time.add(num_new, seq.num_computed + num_new, digest, self._slots.rank(digest))
            seq.last_turn = self.policy.num_plans

    def complete(self, plan: StepPlan) -> None:
        """Mark a plan's tokens as computed, and publish their full blocks to the prefix cache.

        Draft tokens are left to `learn`, which knows which were right. If layers keep states, the token before the
        drafts is left to it too: states after wrong drafts are useless.
        """
        states = self.states
        for seq, num_new in plan.num_new.items():
            if states is None:
                self.advance(seq, num_new - len(plan.drafts.get(seq, ())))
            elif seq not in plan.drafts:
                self.advance(seq, num_new)
                states.complete(seq, num_new, plan.saves.get(seq, {}))

    def abandon(self, plan: StepPlan) -> None:
        """Undo a plan that could not be computed: its sequences wait again, in the same order."""
        for seq in reversed(list(plan.num_new)):
            self._preempt(seq, plan)

    def leave(self, seq: Sequence, plan: StepPlan) -> None:
        """Remove an ended sequence from a plan that is being computed: its results will not be used."""
        del plan.num_new[seq]
        if self.states is not None:
            self.states.release(plan.saves.pop(seq, {}).values())

    def advance(self, seq: Sequence, num_new: int) -> None:
        """Mark the next tokens of a running sequence as computed."""
        first = seq.num_computed // BLOCK_TOKENS
        seq.num_computed += num_new
        last = self._num_shared(seq, seq.num_computed)
        if last > first and self.limits.prefix_cache:
            seq.extend_hashes(last, self._fingerprint)
            for i in range(first, last):
                self.blocks.publish(seq.blocks[i], seq.hashes[i], seq.owner(i))

    def _add_drafts(self, plan: StepPlan) -> None:
        """Add draft tokens to decoding sequences, as far as the step has room and blocks are free.

        In a step with a time limit, sequences that yield get none.
        """
        decoding = [
            seq
            for seq, num_new in plan.num_new.items()
            if seq.num_pending == num_new == 1
            and seq.drafter
            and (plan.limited is None or self.policy.is_first(seq))
            and (seq.matcher is None or seq.matcher.filling is None)
            and (self.states is None or (seq not in plan.saves and seq.state_read in seq.state_slots))
        ]
        room = self._draft_room(plan)
        for i, seq in enumerate(decoding):
            limit = min(room // (len(decoding) - i), self._draft_limit(seq))  # what one leaves is for the next ones
            if limit >= 1 and seq.drafter is not None:
                room -= self._add_draft(seq, seq.drafter.propose(seq.tokens, limit), plan)
        has_others = bool(plan.drafts) or len(decoding) < len(plan.num_new)
        if self.draft_model is not None and decoding and plan.limited is None and not has_others:
            self._add_model_drafts(self.draft_model, decoding, plan)

    def _add_model_drafts(self, model: DraftSource, seqs: list[Sequence], plan: StepPlan) -> None:
        """Let the draft model draft for all sequences of a step.

        Every sequence in the step waits for the drafts. So there are none in a step that computes prompts, has a time
        limit or has drafts from a sequence's own text, nor if any sequence is near its end or blocks are short.
        """
        most, num_free = self._draft_room(plan) // len(seqs), self.blocks.num_free // len(seqs)
        limits = {
            seq: min(most, self._draft_limit(seq), (len(seq.blocks) + num_free) * BLOCK_TOKENS - seq.num_tokens)
            for seq in seqs
        }
        if min(limits.values()) < 1:
            return
        for seq, draft in model.propose(limits, plan).items():
            if self._add_draft(seq, draft, plan):
                plan.by_model[seq] = len(draft)
            elif draft:  # no step will report that it was wrong
                model.learn(seq, len(draft), 0)

    def _draft_room(self, plan: StepPlan) -> int:
        return min(self.limits.max_draft_step_tokens, self.limits.max_step_tokens) - plan.num_tokens

    def _draft_limit(self, seq: Sequence) -> int:
        limit = min(self.limits.max_draft_tokens, seq.max_tokens - seq.num_tokens - 1)
        if self.states is not None:  # a step that saves a state has no drafts
            limit = min(limit, -seq.num_tokens % OUTPUT_TOKENS - 1)
        return limit

    def _add_draft(self, seq: Sequence, draft: list[int], plan: StepPlan) -> int:
        """Add draft tokens to a sequence if blocks are free; return how many.

        They are cut before the first token that its adapter lacks or its grammar does not allow.
        """
        if seq.vocab_size:
            draft = list(takewhile(lambda token: token < seq.vocab_size, draft))
        if seq.matcher is not None:
            draft = seq.matcher.possible(draft)
        missing = _num_blocks(seq.num_tokens + len(draft)) - len(seq.blocks)
        if not draft or missing > self.blocks.num_free:
            return 0
        if missing > 0:
            seq.blocks += self.blocks.allocate(missing)
        plan.drafts[seq] = draft
        plan.num_new[seq] += len(draft)
        return len(draft)

    def postpone(self, seq: Sequence, plan: StepPlan) -> None:
        """Remove a sequence's last token and its draft tokens from a plan; the draft model's then count as wrong.

        Otherwise a grammar with late masks would make every step wait for drafts that are never verified.
        """
        if seq in plan.by_model and self.draft_model is not None:
            self.draft_model.learn(seq, plan.by_model[seq], 0)
        plan.postpone(seq)

    def learn(self, seq: Sequence, plan: StepPlan, num_right: int) -> None:
        """Keep the keys and values of a sequence's right draft tokens in a step, and report the result to the drafter.

        Those of wrong drafts are overwritten. If layers keep states, one wrong draft discards all that the step
        computed for the sequence; it is computed again from the states before, together with the new tokens.
        """
        if self.states is None:
            self.advance(seq, num_right)
        else:
            num_new = plan.num_new[seq] if num_right == len(plan.drafts[seq]) else 0
            self.advance(seq, num_new)
            self.states.complete(seq, num_new, {})
        if seq in plan.by_model and self.draft_model is not None:
            self.draft_model.learn(seq, plan.by_model[seq], num_right)
        elif seq.drafter is not None:
            seq.drafter.learn(len(plan.drafts[seq]), num_right)

    def _grow(self, seq: Sequence, num_new: int, plan: StepPlan) -> bool:
        """Allocate blocks for `num_new` more tokens of a running sequence, preempting others if necessary.

        The latest yielding sequences are preempted first, then the latest others. Return False if `seq` itself was
        preempted.
        """
        missing = _num_blocks(seq.num_computed + num_new) - len(seq.blocks)
        while missing > self.blocks.num_free:
            victim = max(reversed(self.running), key=lambda other: other.priority)
            self._preempt(victim, plan)
            if victim is seq:
                return False
        if missing > 0:
            seq.blocks += self.blocks.allocate(missing)
        return True

    def _preempt(self, seq: Sequence, plan: StepPlan) -> None:
        """Free a sequence's blocks and adapter slot but keep its tokens; it is the first to be readmitted."""
        plan.num_new.pop(seq, None)
        if self.states is not None:
            self.states.release(plan.saves.pop(seq, {}).values())
        plan.preempted.append(seq)
        self.running.remove(seq)
        self._free(seq)
        self.waiting.appendleft(seq)

    def _free(self, seq: Sequence) -> None:
        self.blocks.release(seq.blocks)
        seq.blocks, seq.kept = [], None
        seq.num_computed = 0
        if self.states is not None:
            self.states.free(seq)
        if seq.request.digest:
            self._slots.release(seq.request.digest)
            seq.slot = -1

    def admit(self, seqs: list[Sequence], plan: StepPlan, time: StepTime | None = None) -> None:
        """Admit waiting sequences, in order, within budget and time."""
        if plan.preempted:
            return
        for seq in seqs:
            if plan.budget == 0:
                break
            if self._has_place(seq) and not self._start(seq, plan, time) and seq.num_skips > MAX_SKIPS:
                break

    def _has_place(self, seq: Sequence) -> bool:
        """Return whether fewer sequences run than allowed, or `seq` may replace one that yields to it."""
        if len(self.running) < self.limits.max_num_seqs:
            return True
        return any(other.priority > seq.priority for other in self.running)

    def _start(self, seq: Sequence, plan: StepPlan, time: StepTime | None) -> bool:
        """Admit a waiting sequence and add its tokens. Return False if adapter, blocks, budget or time are lacking."""
        if not seq.is_bound:
            return False  # its adapter has not been resident yet, or its grammar is being compiled
        cached = self._lookup(seq)
        num_cached = len(cached) * BLOCK_TOKENS
        num_new = self._chunk(seq, num_cached, plan, time)
        if not num_new:
            return False
        digest = seq.request.digest
        slot = self._slots.acquire(digest) if digest else -1
        if slot is None:
            return False
        if not self._make_room(seq, cached, plan) or not (self.states is None or self.states.take(seq, len(cached))):
            if digest:
                self._slots.release(digest)
            self.policy.pass_over(seq)
            return False
        seq.slot = slot
        self.blocks.take(cached)
        seq.blocks = cached + self.blocks.allocate(_num_blocks(num_cached + num_new) - len(cached))
        seq.num_computed = num_cached
        seq.num_skips = 0
        if seq.num_cached is None:
            seq.num_cached = max(0, min(num_cached, seq.num_prompt) - seq.num_virtual)
        self.waiting.remove(seq)
        self.running.append(seq)
        self._add(seq, num_new, plan, time)
        plan.num_cached += num_cached
        return True

    def _make_room(self, seq: Sequence, cached: list[int], plan: StepPlan) -> bool:
        """Make a place and blocks available to a waiting sequence, preempting the latest that yield to it if necessary.

        cached: blocks of its beginning found in the prefix cache. Return False, without preempting any, if preempting
        all would not be enough.
        """
        # The whole sequence must fit, plus one block of growth per running sequence; otherwise it would soon be
        # preempted.
        num_free = self.blocks.num_free - self.blocks.num_idle(cached)
        num_running, num_needed = len(self.running), _num_blocks(seq.num_tokens) - len(cached)
        yielding = (other for other in self.running if other.priority > seq.priority)
        candidates = sorted(yielding, key=lambda other: other.priority)
        victims: list[Sequence] = []
        dropped = Counter[int]()
        while num_running == self.limits.max_num_seqs or num_needed + num_running > num_free:
            if not candidates:
                return False
            victims.append(candidates.pop())
            num_running -= 1
            num_free += self.blocks.num_freed(victims[-1].blocks, dropped, set(cached))
        for victim in victims:
            self._preempt(victim, plan)
        return True

    def _lookup(self, seq: Sequence) -> list[int]:
        """Return the cached blocks of a sequence's beginning, excluding its last token, whose logits are needed."""
        if not self.limits.prefix_cache or seq.needs_all_rows:
            return []
        num_full = self._num_shared(seq, seq.num_tokens - 1)
        seq.extend_hashes(num_full, self._fingerprint)
        found = self.blocks.lookup(seq.hashes[:num_full])
        return found if self.states is None else found[: self.states.longest(seq.hashes[: len(found)])[0]]

    def _num_shared(self, seq: Sequence, num_tokens: int) -> int:
        """Return how many full blocks of a sequence's first `num_tokens` tokens equal those of a prompt with them."""
        if self.states is not None and not self.states.saves_outputs:
            num_tokens = min(num_tokens, seq.num_prompt)
        return num_tokens // BLOCK_TOKENS

    def check_integrity(self) -> None:
        """Raise AssertionError unless block tables, reference counts and the state of sequences agree."""
        self.blocks.check_integrity([seq.blocks for seq in self])
        if self.states is not None:
            self.states.check_integrity(slot for seq in self for slot in seq.state_slots)
        if self.draft_model is not None:
            self.draft_model.check_integrity()
        for seq in self.waiting:
            if seq.blocks or seq.num_computed or seq.slot >= 0:
                raise AssertionError(f"{seq.rid} waits but holds blocks or an adapter slot")


def _num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)

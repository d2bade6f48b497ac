"""Decides which sequences come first in a step, which yield, and how long a step may be.

Pure: the batcher holds the sequences and their blocks.

Every sequence has a priority class (`Sequence.priority`): 0 yields to none, 1 to class 0; 2, batch work, yields to
both. The lowest class present is *first*. The next one *yields*: it gets what the first leaves of a step's tokens and,
while the first decodes, of its milliseconds. A third one waits. A class other than 0 that is alone counts as yielding,
for those that may come. `StepPolicy.fill` lists the phases in which a step is filled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from gpu_worker.planning.request import BATCH_PRIORITY
from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.spending import Spending
from gpu_worker.planning.step_limit import (
    ALONE_EVERY,
    BATCH_STEP,
    PROMPT_SHARE,
    SHORT_STEP_TOKENS_PER_SEQ,
    SHORT_STEPS_AFTER,
    StepLimit,
    StepTime,
)
from gpu_worker.planning.step_plan import StepPlan
from protocol.wire.messages import StepModel

MAX_SKIPS = 64
"""Number of plans in which others may overtake a sequence that lacks blocks; then admission waits for it."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Bounds of one step. Raises ValueError if a step could not decode all sequences."""

    max_num_seqs: int  # sequences that run at once
    max_step_tokens: int
    prefix_cache: bool = True
    max_draft_tokens: int = 0  # maximum draft tokens of a sequence in a step; 0: none
    max_draft_step_tokens: int = 0  # draft tokens are added only to steps with fewer tokens
    max_slowdown: float = 0.0  # factor by which sequences that yield may lengthen a step; 0: unlimited
    max_batch_slowdown: float = 0.0  # factor by which batch work may lengthen a step; 0: unlimited
    max_later_chunk: int = 0  # maximum tokens of a sequence per step after its first chunk; 0: unlimited

    @property
    def short_step_tokens(self) -> int:
        """Maximum tokens of a short step."""
        return min(self.max_step_tokens, SHORT_STEP_TOKENS_PER_SEQ * self.max_num_seqs)

    def __post_init__(self) -> None:
        if not 0 < self.max_num_seqs <= self.max_step_tokens:
            raise ValueError("max_step_tokens must be at least max_num_seqs, so that every step can decode all")


class Queues(Protocol):
    """The sequences of an engine, and the operations that give them tokens of a step: the batcher."""

    running: list[Sequence]  # in order of admission
    waiting: deque[Sequence]  # in order of arrival; preempted ones first
    step_model: StepModel

    def __iter__(self) -> Iterator[Sequence]:
        """Iterate over running and waiting sequences."""
        ...

    def run(self, seqs: Iterable[Sequence], plan: StepPlan, time: StepTime | None = None) -> None:
        """Give running sequences their next tokens, in order, within budget, blocks and time."""
        ...

    def admit(self, seqs: list[Sequence], plan: StepPlan, time: StepTime | None = None) -> None:
        """Admit waiting sequences, in order, within places, budget, blocks and time."""
        ...

    def time_of(self, plan: StepPlan) -> StepTime:
        """Return the predicted time of a step that holds decodes only."""
        ...


class StepPolicy:
    """Chooses the contents of an engine's steps, from what earlier steps show.

    `scheduler.fairness` decides which requests yield. If steps are limited, the tenant with most of the recent tokens
    yields too. A request that yields only because its tenant was alone stops yielding when another tenant's requests
    yield for a better reason: otherwise it would compete evenly with a tenant that is over its share.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self.limits = limits
        self.num_plans = 0
        self.first = 0  # priority class that is first
        self.yielding = -1  # class that gets what the first leaves; -1: none
        self.has_third = False  # whether a third class is present, which waits
        self.has_paused = False  # whether the last plan left out the class that yields
        self.num_short = 0  # remaining plans until yielding prompts are computed in long steps again
        self._limit = StepLimit()
        self._spending = Spending(limits.max_num_seqs)
        self._heaviest = ""  # tenant with most of the recent tokens; "" for none

    # ------------------------------------------------------------ who yields

    def is_first(self, seq: Sequence) -> bool:
        """Return whether a sequence yields to none that is present or may come."""
        return seq.priority <= self.first

    def takes_turns(self, seq: Sequence) -> bool:
        """Return whether a sequence's class gets what the first class leaves."""
        return seq.priority == self.yielding

    @property
    def bounds_batch(self) -> bool:
        """Whether the class that yields is batch work with a bound of its own."""
        return self.limits.max_batch_slowdown > 0 and self.yielding == BATCH_PRIORITY

    def arrive(self, seq: Sequence, here: Iterable[Sequence]) -> None:
        """Register a new sequence. If it yields, all present sequences of its tenant yield from now on.

        A tenant's first requests do not yield until the tenant exceeds its share. Otherwise they would fill every step
        beside other tenants' requests, and its later ones would come on top.
        """
        tenant = seq.request.tenant
        seq.yields = seq.yields or bool(tenant and tenant == self._heaviest)
        if seq.priority == 1 and tenant and not seq.request.alone:
            for other in here:
                if other.request.tenant == tenant:
                    other.yields = other.num_skips <= MAX_SKIPS

    def pass_over(self, seq: Sequence) -> None:
        """Count that a waiting sequence lacked blocks. After `MAX_SKIPS` times it no longer yields."""
        seq.num_skips += 1
        seq.yields = seq.yields and seq.num_skips <= MAX_SKIPS

    def _mark_heaviest(self, here: Iterable[Sequence]) -> None:
        """Make the sequences of the tenant with most recent tokens yield, and release those of the previous one."""
        before, self._heaviest = self._heaviest, self._spending.heaviest()
        if before == self._heaviest:
            return
        for seq in here:
            tenant = seq.request.tenant
            if tenant and tenant in (before, self._heaviest):
                seq.yields = (seq.request.priority > 0 or tenant == self._heaviest) and seq.num_skips <= MAX_SKIPS

    def _mark_alone(self, here: Iterable[Sequence]) -> None:
        """Make sequences of tenants that were alone yield, unless another tenant's yield for a better reason."""
        over = {seq.request.tenant for seq in here if seq.priority == 1 and not seq.request.alone} | {self._heaviest}
        for seq in [seq for seq in here if seq.request.alone]:
            seq.yields = not (over - {seq.request.tenant, ""}) and seq.num_skips <= MAX_SKIPS

    # ------------------------------------------------------------ a step

    def fill(self, plan: StepPlan, queues: Queues) -> None:
        """Fill a step phase by phase; each phase gets what the earlier ones left."""
        self._rank(queues)
        step = Phases(self, plan, queues)
        step.decode_first()
        step.limit_time()
        if not (step.may_pause or step.is_measured):
            step.decode_yielding()
        step.prefill_first()
        self.has_paused = step.pauses
        if not step.pauses:
            if step.may_pause:
                step.decode_yielding()
            step.prefill_yielding()
            step.top_up()
        step.lend()

    def close(self, plan: StepPlan, queues: Queues) -> None:
        """Decide whether a filled step measures the first class alone, and count its tokens by tenant."""
        if plan.limited is None:
            if self.num_plans % ALONE_EVERY == 0:
                plan.alone_s = self._alone_s(plan, queues)
        elif plan.num_tokens != plan.limited.num_tokens:
            plan.alone_s = 0.0
        if self.limits.max_slowdown:
            self._spending.note(
                (seq.request.tenant, num_new) for seq, num_new in plan.num_new.items() if not seq.request.batch
            )

    def note_time(self, plan: StepPlan, seconds: float) -> None:
        """Record the measured time of a plan's step."""
        if plan.alone_s:
            self._limit.note_alone(plan.alone_s, seconds)
        elif plan.limited is not None and plan.limited.num_tokens == plan.num_tokens:
            self._limit.note_limited(plan.limited, seconds)

    def _rank(self, queues: Queues) -> None:
        """Determine which priority class is first in the next step, and which one yields."""
        self.num_plans += 1
        self._mark_heaviest(queues)
        self._mark_alone(queues)
        classes = sorted({seq.priority for seq in queues})
        self.first = classes[0] if len(classes) > 1 else 0
        self.yielding = next((one for one in classes[:2] if one > self.first), -1)
        self.has_third = len(classes) > 2
        self.num_short = SHORT_STEPS_AFTER if any(map(self.is_first, queues)) else self.num_short - 1

    # ------------------------------------------------------------ how long a step may be

    def limited(self, plan: StepPlan, queues: Queues) -> StepTime | None:
        """Return the time and limit of a step that so far holds the first class's decodes; None if unlimited."""
        limits, slowdown = self.limits, 0.0
        if plan.num_new and self.yielding >= 0:
            slowdown = limits.max_batch_slowdown if self.bounds_batch else limits.max_slowdown
        elif self.bounds_batch and self.num_short > 0:
            slowdown = BATCH_STEP
        if not slowdown or not self._limit.applies(queues.step_model):
            return None
        return self._limit.set_limit(queues.time_of(plan), slowdown)

    @property
    def is_alone_due(self) -> bool:
        """Whether the first class should run alone in this step, to be measured; never directly after a pause."""
        return self._limit.is_alone_due and not self.has_paused

    def _alone_s(self, plan: StepPlan, queues: Queues) -> float:
        """Return the predicted seconds of an unlimited step, 0 if it holds more than the first class's decodes."""
        seqs, limits = plan.num_new, self.limits.max_slowdown or self.limits.max_batch_slowdown
        if not seqs or not limits or not self._limit.applies(queues.step_model):
            return 0.0
        if plan.num_tokens != len(seqs) or any(seq.num_pending != 1 for seq in seqs):
            return 0.0
        return 0.0 if any(map(self.takes_turns, queues)) else queues.time_of(plan).seconds


class Phases:
    """The phases of one step's plan."""

    def __init__(self, policy: StepPolicy, plan: StepPlan, queues: Queues) -> None:
        """Group the running sequences by class, and into decodes and prompts."""
        self._policy, self._plan, self._queues = policy, plan, queues
        ready = [seq for seq in queues.running if not seq.sits_out]
        first = [seq for seq in ready if policy.is_first(seq)]
        yielding = [seq for seq in ready if policy.takes_turns(seq)]
        self._first_decodes = [seq for seq in first if seq.num_pending == 1]
        self._first_prompts = [seq for seq in first if seq.num_pending != 1]
        self._decodes = [seq for seq in yielding if seq.num_pending == 1]
        self._prompts = [seq for seq in yielding if seq.num_pending != 1]
        self.may_pause = policy.bounds_batch or (not policy.has_paused and self._is_worth_a_step())
        self.is_measured = False  # whether the yielding class is left out, to measure the first class alone
        self.has_prefilled = False  # whether the step computes prompts of the first class

    @property
    def pauses(self) -> bool:
        """Whether the yielding class is left out: for a measurement, or beside a prompt of the first class.

        Beside a prompt it pauses if its decodes would lengthen the step by more than an empty step takes, but never
        twice in a row. Batch work pauses beside every prompt.
        """
        return self.is_measured or (self.may_pause and self.has_prefilled)

    def _is_worth_a_step(self) -> bool:
        """Return whether the yielding decodes would lengthen a step by more than an empty step takes."""
        num_kv_tokens = sum(seq.num_tokens for seq in self._decodes)
        return self._queues.step_model.is_worth_a_step(len(self._decodes), num_kv_tokens)

    def decode_first(self) -> None:
        """Decode all of the first class."""
        self._queues.run(self._first_decodes, self._plan)

    def limit_time(self) -> None:
        """Set the milliseconds that the yielding class may add to the first class's decodes; half are for prompts.

        In one of `ALONE_EVERY` such steps it may add nothing, so that the first class's decodes are measured alone.
        """
        policy, plan = self._policy, self._plan
        time = plan.limited = policy.limited(plan, self._queues)
        if time is None:
            return
        self._decodes.sort(key=lambda seq: seq.last_turn)
        coming = [seq for seq in self._queues.waiting if seq.is_bound]
        if self._prompts or any(map(policy.takes_turns, coming)):
            time.reserve(PROMPT_SHARE)
        num_first = len(self._first_decodes) + len(self._first_prompts)
        has_prompts = len(plan.num_new) < num_first or any(map(policy.is_first, coming))
        self.is_measured = bool(plan.num_new) and policy.is_alone_due and not has_prompts
        plan.alone_s = time.others_s if self.is_measured else 0.0

    def decode_yielding(self) -> None:
        """Decode the yielding class within the time limit, least recently served first, at least one."""
        plan = self._plan
        self._queues.run([seq for seq in self._decodes if seq not in plan.num_new], plan, plan.limited)

    def prefill_first(self) -> None:
        """Compute chunks of the first class's prompts: the running ones, then the waiting ones."""
        policy, plan, queues = self._policy, self._plan, self._queues
        budget = plan.budget
        queues.run(self._first_prompts, plan)
        queues.admit([seq for seq in queues.waiting if policy.is_first(seq)], plan)
        self.has_prefilled = plan.budget < budget

    def prefill_yielding(self) -> None:
        """Compute chunks of yielding prompts, in short steps while the first class is present and for some steps after.

        No waiting prompt is admitted while a sequence that was skipped too often waits.
        """
        policy, plan, queues, limits = self._policy, self._plan, self._queues, self._policy.limits
        if plan.limited is not None:
            plan.limited.reserve(0)
        if policy.num_short > 0:
            plan.budget = max(0, plan.budget + limits.short_step_tokens - limits.max_step_tokens)
        queues.run(self._prompts, plan, plan.limited)
        if not any(seq.num_skips > MAX_SKIPS for seq in queues.waiting):
            queues.admit([seq for seq in queues.waiting if policy.takes_turns(seq)], plan, plan.limited)

    def top_up(self) -> None:
        """Decode more of the yielding class in the time that its prompts left."""
        if self._plan.limited is not None:
            self.decode_yielding()

    def lend(self) -> None:
        """Give batch work that waits for two classes a step in which neither of them can run."""
        plan, queues = self._plan, self._queues
        if plan.num_new or not self._policy.has_third:
            return
        queues.run([seq for seq in queues.running if seq.priority == BATCH_PRIORITY and not seq.sits_out], plan)
        queues.admit([seq for seq in queues.waiting if seq.priority == BATCH_PRIORITY], plan)

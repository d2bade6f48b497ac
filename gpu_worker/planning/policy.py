"""Who is first in a step, who yields, and how long a step may be. Pure: the batcher holds the sequences and the blocks.

Every sequence has a priority class (`Sequence.priority`): 0 yields to nobody, 1 to class 0, 2 is batch work and yields
to both. Of the classes that are here the lowest is *first*. The next one *yields*: it gets what the first leaves of a
step's tokens and, while the first decodes, of its milliseconds. A third one waits. A class that is here alone yields to
those who may come, unless it is class 0.

A step is filled in phases: `StepPolicy.fill` lists them, in their order.
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
"""Plans in which others may overtake a sequence that lacks blocks; then admission waits for it."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Bounds of one step. Raises ValueError if a step could not decode all sequences."""

    max_num_seqs: int  # sequences that run at once
    max_step_tokens: int
    prefix_cache: bool = True
    max_draft_tokens: int = 0  # draft tokens that a sequence may add to a step, 0: none
    max_draft_step_tokens: int = 0  # draft tokens are added only while the step has fewer tokens than that
    max_slowdown: float = 0.0  # times as long a step may take for sequences that yield, 0: any
    max_batch_slowdown: float = 0.0  # times as long a step may take for batch work, 0: any
    max_later_chunk: int = 0  # tokens of a sequence in a step once some are computed, 0: any number

    @property
    def short_step_tokens(self) -> int:
        """Tokens of a short step."""
        return min(self.max_step_tokens, SHORT_STEP_TOKENS_PER_SEQ * self.max_num_seqs)

    def __post_init__(self) -> None:
        if not 0 < self.max_num_seqs <= self.max_step_tokens:
            raise ValueError("max_step_tokens must be at least max_num_seqs, so that every step can decode all")


class Queues(Protocol):
    """The sequences of an engine, and what gives them tokens of a step: the batcher."""

    running: list[Sequence]  # in order of admission
    waiting: deque[Sequence]  # in order of arrival; preempted ones first
    step_model: StepModel

    def __iter__(self) -> Iterator[Sequence]:
        """Return all of them."""
        ...

    def run(self, seqs: Iterable[Sequence], plan: StepPlan, time: StepTime | None = None) -> None:
        """Give running sequences their next tokens, in order, as far as budget, blocks and time allow."""
        ...

    def admit(self, seqs: list[Sequence], plan: StepPlan, time: StepTime | None = None) -> None:
        """Let waiting sequences run, in order, as far as places, budget, blocks and time allow."""
        ...

    def time_of(self, plan: StepPlan) -> StepTime:
        """Return the predicted time of a step that holds decodes and nothing else."""
        ...


class StepPolicy:
    """Decides what comes into the steps of one engine, and remembers of earlier steps what that takes.

    `scheduler.fairness` decides which requests yield. Besides these, where steps are limited, all of the tenant that
    has had most of the tokens of late. One that yields because its tenant was alone does so only until another tenant's
    yield for a better reason: it would wait for whoever has more than a share, on even terms.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self.limits = limits
        self.num_plans = 0
        self.first = 0  # the priority class that is first
        self.yielding = -1  # the class that gets what the first leaves; -1: nobody does
        self.has_third = False  # whether a third class is here, which waits
        self.has_paused = False  # whether what yields was left out of the last plan
        self.num_short = 0  # plans until yielding prompts are computed in long steps again
        self._limit = StepLimit()
        self._spending = Spending(limits.max_num_seqs)
        self._heaviest = ""  # tenant that had most of the last steps; "" for none

    # ------------------------------------------------------------ who yields

    def is_first(self, seq: Sequence) -> bool:
        """Return whether a sequence yields to nobody who is here or may come."""
        return seq.priority <= self.first

    def takes_turns(self, seq: Sequence) -> bool:
        """Return whether a sequence gets what the first class leaves, in turn with others of its class."""
        return seq.priority == self.yielding

    @property
    def bounds_batch(self) -> bool:
        """Whether it is batch work that gets what is left, and it has a bound of its own."""
        return self.limits.max_batch_slowdown > 0 and self.yielding == BATCH_PRIORITY

    def arrive(self, seq: Sequence, here: Iterable[Sequence]) -> None:
        """Note a sequence that comes. If it yields, all that its tenant has here does from now on.

        A tenant's first requests do not yield, until it has more than its share; beside the others they would fill
        every step, and its later ones would come on top.
        """
        tenant = seq.request.tenant
        seq.yields = seq.yields or bool(tenant and tenant == self._heaviest)
        if seq.priority == 1 and tenant and not seq.request.alone:
            for other in here:
                if other.request.tenant == tenant:
                    other.yields = other.num_skips <= MAX_SKIPS

    def pass_over(self, seq: Sequence) -> None:
        """Note that a waiting sequence lacked blocks. Whoever was passed over too often yields no longer."""
        seq.num_skips += 1
        seq.yields = seq.yields and seq.num_skips <= MAX_SKIPS

    def _mark_heaviest(self, here: Iterable[Sequence]) -> None:
        """Let all sequences yield of the tenant that has had most of the last steps, and no longer those it was."""
        before, self._heaviest = self._heaviest, self._spending.heaviest()
        if before == self._heaviest:
            return
        for seq in here:
            tenant = seq.request.tenant
            if tenant and tenant in (before, self._heaviest):
                seq.yields = (seq.request.priority > 0 or tenant == self._heaviest) and seq.num_skips <= MAX_SKIPS

    def _mark_alone(self, here: Iterable[Sequence]) -> None:
        """Let sequences of tenants that were alone yield, unless those of another tenant yield for a better reason."""
        over = {seq.request.tenant for seq in here if seq.priority == 1 and not seq.request.alone} | {self._heaviest}
        for seq in [seq for seq in here if seq.request.alone]:
            seq.yields = not (over - {seq.request.tenant, ""}) and seq.num_skips <= MAX_SKIPS

    # ------------------------------------------------------------ a step

    def fill(self, plan: StepPlan, queues: Queues) -> None:
        """Fill a step phase by phase; each gets what those before it have left."""
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
        """Choose whether a filled step is measured as one of the first class alone, and count whose its tokens are."""
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
        """Learn from how long a plan's step took."""
        if plan.alone_s:
            self._limit.note_alone(plan.alone_s, seconds)
        elif plan.limited is not None and plan.limited.num_tokens == plan.num_tokens:
            self._limit.note_limited(plan.limited, seconds)

    def _rank(self, queues: Queues) -> None:
        """Find which priority class is first in the next step, and which one yields."""
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
        """Return the time of a step that holds the first class's decodes, with its limit; None if it has none."""
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
        """Whether the first class should have this step for itself, to be measured: never just after a pause."""
        return self._limit.is_alone_due and not self.has_paused

    def _alone_s(self, plan: StepPlan, queues: Queues) -> float:
        """Return the predicted seconds of a step without limit, 0 if it holds more than the first class's decodes."""
        seqs, limits = plan.num_new, self.limits.max_slowdown or self.limits.max_batch_slowdown
        if not seqs or not limits or not self._limit.applies(queues.step_model):
            return 0.0
        if plan.num_tokens != len(seqs) or any(seq.num_pending != 1 for seq in seqs):
            return 0.0
        return 0.0 if any(map(self.takes_turns, queues)) else queues.time_of(plan).seconds


class Phases:
    """The phases of one step's plan."""

    def __init__(self, policy: StepPolicy, plan: StepPlan, queues: Queues) -> None:
        """Part the sequences that run by class, and into decodes and prompts."""
        self._policy, self._plan, self._queues = policy, plan, queues
        ready = [seq for seq in queues.running if not seq.sits_out]
        first = [seq for seq in ready if policy.is_first(seq)]
        yielding = [seq for seq in ready if policy.takes_turns(seq)]
        self._first_decodes = [seq for seq in first if seq.num_pending == 1]
        self._first_prompts = [seq for seq in first if seq.num_pending != 1]
        self._decodes = [seq for seq in yielding if seq.num_pending == 1]
        self._prompts = [seq for seq in yielding if seq.num_pending != 1]
        self.may_pause = policy.bounds_batch or (not policy.has_paused and self._is_worth_a_step())
        self.is_measured = False  # whether what yields is left out, so that the time of the first class is measured
        self.has_prefilled = False  # whether it computes prompts of the first class

    @property
    def pauses(self) -> bool:
        """Whether what yields is left out: for a measurement, or beside a prompt of the first class.

        Beside a prompt it pauses for one step, never for two in a row, if its decodes would make the step longer by
        more than an empty one takes. Batch work pauses beside every one.
        """
        return self.is_measured or (self.may_pause and self.has_prefilled)

    def _is_worth_a_step(self) -> bool:
        """Return whether the yielding decodes make a step longer by more than an empty step takes."""
        num_kv_tokens = sum(seq.num_tokens for seq in self._decodes)
        return self._queues.step_model.is_worth_a_step(len(self._decodes), num_kv_tokens)

    def decode_first(self) -> None:
        """Decode the first class, all of it."""
        self._queues.run(self._first_decodes, self._plan)

    def limit_time(self) -> None:
        """Set the milliseconds that what yields may add to the decodes of the first class; half of them for prompts.

        In one of `ALONE_EVERY` such steps it may add nothing, so that what these decodes take is measured.
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
        """Decode what yields, as far as there is time: those first whose turn was longest ago, at least one."""
        plan = self._plan
        self._queues.run([seq for seq in self._decodes if seq not in plan.num_new], plan, plan.limited)

    def prefill_first(self) -> None:
        """Compute chunks of the first class's prompts: of those that run, then of those that wait."""
        policy, plan, queues = self._policy, self._plan, self._queues
        budget = plan.budget
        queues.run(self._first_prompts, plan)
        queues.admit([seq for seq in queues.waiting if policy.is_first(seq)], plan)
        self.has_prefilled = plan.budget < budget

    def prefill_yielding(self) -> None:
        """Compute chunks of yielding prompts, in a short step while the first class is here and for some steps after.

        Of those that wait none is admitted before one that was passed over too often.
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
        """Decode more of what yields in the time that its prompts have left."""
        if self._plan.limited is not None:
            self.decode_yielding()

    def lend(self) -> None:
        """Let batch work that waits for two classes have a step in which neither of them can run."""
        plan, queues = self._plan, self._queues
        if plan.num_new or not self._policy.has_third:
            return
        queues.run([seq for seq in queues.running if seq.priority == BATCH_PRIORITY and not seq.sits_out], plan)
        queues.admit([seq for seq in queues.waiting if seq.priority == BATCH_PRIORITY], plan)

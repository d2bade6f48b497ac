"""The contents of one step."""

from __future__ import annotations

from dataclasses import dataclass, field

from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.step_limit import StepTime


@dataclass(slots=True)
class StepPlan:
    """The contents of one step."""

    budget: int = 0  # tokens that may still be added
    has_states: bool = False  # whether the model's layers keep states, which cannot be rolled back by a token
    num_new: dict[Sequence, int] = field(default_factory=dict[Sequence, int])
    """Tokens to compute per sequence, decodes first: what vLLM calls `num_scheduled_tokens`."""
    drafts: dict[Sequence, list[int]] = field(default_factory=dict[Sequence, list[int]])
    """Draft tokens by sequence, included in `num_new`."""
    by_model: dict[Sequence, int] = field(default_factory=dict[Sequence, int])
    """Number of tokens that the draft model drafted by sequence; `drafts` lacks those that cannot follow."""
    saves: dict[Sequence, dict[int, int]] = field(default_factory=dict[Sequence, dict[int, int]])
    """Positions after which a sequence's states are saved, with the slot for each."""
    preempted: list[Sequence] = field(default_factory=list[Sequence])
    num_cached: int = 0  # tokens of newly admitted sequences found in the prefix cache
    alone_s: float = 0.0
    """Predicted seconds of a step with only decodes that do not yield, if it is to be measured, else 0."""
    limited: StepTime | None = None  # predicted time of a limited step, without prompts that do not yield

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return sum(self.num_new.values())

    @property
    def num_prompt_rows(self) -> int:
        """Tokens in the step of sequences whose prompt logprobs are recorded."""
        return sum(num_new for seq, num_new in self.num_new.items() if seq.prompt_logprobs is not None)

    def postpone(self, seq: Sequence) -> None:
        """Remove a sequence's last token and draft tokens: its next token is chosen in a later step.

        If layers keep states, all of its tokens are removed, and computed again from the states before them.
        """
        num = 1 + len(self.drafts.pop(seq, ()))
        self.num_new[seq] -= self.num_new[seq] if self.has_states else num

    def add(self, seq: Sequence, num_new: int) -> None:
        """Add a sequence's next `num_new` tokens to the step."""
        self.num_new[seq] = num_new
        self.budget -= num_new

"""Drafting by a head of the base, which reads the base's hidden states; those of each step are stored for it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpu_worker.drafting.draft_model import DraftModel, ReadText
from gpu_worker.drafting.head import BaseHead
from gpu_worker.drafting.payoff import Acceptance, Draftable, Payoff
from gpu_worker.memory import send
from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.step_plan import StepPlan
from lora_kernels import ops

ALWAYS = 1 << 20
"""Number of steps assumed for a request that ends so late that reading its text always pays off."""


@dataclass(slots=True, eq=False)
class FollowedText(ReadText):
    """A head's view of a sequence: the tokens after the first stored hidden state."""

    num_kept: int = 0  # tokens of its text whose predecessors' hidden states of the base are stored

    def settle(self) -> None:
        """Forget the guesses: those that come true are read again, with the base's hidden states."""
        self.guessed = []
        self.num_kept = min(self.num_kept, self.num_tokens)
        self.num_read = max(0, min(self.num_read, self.num_tokens - 1, self.num_kept))

    def slots(self, start: int, end: int) -> np.ndarray:
        """Return the cache slots of its tokens [start, end): int64 [end - start]."""
        at = np.arange(start, end)
        return np.array(self.blocks)[at // ops.BLOCK_TOKENS] * ops.BLOCK_TOKENS + at % ops.BLOCK_TOKENS


class DraftHead(DraftModel):
    """A draft model that is a head: its texts begin where the base's hidden states are stored without a gap.

    Hidden states are missing for tokens from the base's prefix cache and for steps that did not store them.
    """

    def __init__(
        self, head: BaseHead, num_blocks: int, vocab_size: int, max_pass_tokens: int, payoff: Payoff, most_tokens: int
    ) -> None:
        """most_tokens: maximum tokens of a step with draft tokens, these included."""
        self.head = head
        self._most_tokens = most_tokens
        super().__init__(head, num_blocks, vocab_size, max_pass_tokens, payoff)

    @contextmanager
    def watching(self, plan: StepPlan) -> Iterator[None]:
        """Store the hidden states of the step that is computed inside the block."""
        if self._num_idle or not self._may_pay(plan.num_new):
            yield
            return
        with self.head.taking() as states:
            yield
        with self._guarded():
            self._keep(plan, states)
        states.clear()

    def _may_pay(self, seqs: Collection[Sequence]) -> bool:
        """Return whether drafts would pay off in steps with these sequences, if new ones are typical.

        If not, nothing is stored, since collecting hidden states takes time.
        """
        most = self._most_tokens // len(seqs) - 1
        if most < 1:
            return False
        known = (self._readings.get(seq) for seq in seqs)
        rates = [self._typical.rate if own is None else own.acceptance.rate for own in known]
        drafts = [Draftable(rate, most, num_unread=2, num_steps=ALWAYS) for rate in rates]
        return self._payoff.choose(drafts, most, len(seqs)).num_drafts > 0

    def _keep(self, plan: StepPlan, states: list[Tensor]) -> None:
        """Store the hidden states of each sequence that generates text."""
        texts: list[FollowedText] = []
        rows: list[np.ndarray] = []
        starts: list[int] = []
        first = 0
        for seq, num in plan.num_new.items():
            if num and seq.pool is None:
                own = self._open(seq)
                start = seq.num_computed + 1 - own.start
                if not 0 <= start <= own.num_kept:
                    self._take_blocks(own)
                    own.start, start = seq.num_computed + 1, 0
                texts.append(own)
                rows.append(np.arange(first, first + num))
                starts.append(start)
            first += num
        ends = [start + len(part) for start, part in zip(starts, rows, strict=True)]
        if not texts:
            return
        if not self._make_room(texts, ends):
            for own in texts:
                self._take_blocks(own)
            return
        slots = np.concatenate([own.slots(*span) for own, *span in zip(texts, starts, ends, strict=True)])
        with torch.inference_mode():
            hidden = self.head.project(states)
            if len(slots) < first:
                hidden = hidden.index_select(0, send(np.concatenate(rows), hidden.device))
            self.head.put(send(slots, hidden.device), hidden)
        for own, end in zip(texts, ends, strict=True):
            own.num_kept = end

    def _propose(self, limits: Mapping[Sequence, int], plan: StepPlan) -> dict[Sequence, list[int]]:
        texts = [self._open(seq) for seq in limits]
        if not all(0 < own.num_tokens == own.num_kept for own in texts):
            self._rest(texts)
            return {}
        return super()._propose(limits, plan)

    def _new_text(self, seq: Sequence) -> FollowedText:
        return FollowedText(seq, Acceptance(self._typical.rate), seq.num_virtual)

    def _open(self, seq: Sequence) -> FollowedText:
        own = super()._open(seq)
        assert isinstance(own, FollowedText)
        return own

    def _take_blocks(self, own: ReadText) -> None:
        super()._take_blocks(own)
        assert isinstance(own, FollowedText)
        own.num_kept = 0

    def _pass(self, readings: list[ReadText], parts: list[np.ndarray], ends: list[int]) -> list[int]:
        """Return the most likely token after each part.

        Beyond the base's tokens, the head reads its own hidden states.
        """
        tokens = super()._pass(readings, parts, ends)
        texts = [own for own in readings if isinstance(own, FollowedText)]
        if all(end >= own.num_kept for own, end in zip(texts, ends, strict=True)):
            slots = np.concatenate([own.slots(end, end + 1) for own, end in zip(texts, ends, strict=True)])
            self.head.put(send(slots, self.head.device), self.head.outputs)
        return tokens

    def _forward(self, ids: np.ndarray, lens: np.ndarray, ends: np.ndarray, tables: np.ndarray) -> list[int]:
        return self.head.base_ids(super()._forward(ids, lens, ends, tables))

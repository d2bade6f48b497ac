"""What the batcher asks of a draft model and reports to it: no step waits for drafts that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np

from gpu_worker.planning.batcher import Batcher, BatchLimits
from gpu_worker.planning.blocks import BlockPool
from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.speculation import Drafter
from gpu_worker.planning.step_plan import StepPlan
from protocol.runtime.settings import BLOCK_TOKENS
from tests.gpu_worker.planning.batches import FakeSlots, make_seq


@dataclass(slots=True)
class Scripted:
    """A draft model that drafts the same tokens for every sequence."""

    draft: list[int]
    asked: list[dict[str, int]] = field(default_factory=list[dict[str, int]])  # request id -> limit, for each call
    learnt: list[tuple[str, int, int]] = field(default_factory=list[tuple[str, int, int]])

    def propose(self, limits: Mapping[Sequence, int], plan: StepPlan) -> dict[Sequence, list[int]]:
        self.asked.append({seq.rid: limit for seq, limit in limits.items()})
        return {seq: self.draft[:limit] for seq, limit in limits.items()}

    def learn(self, seq: Sequence, num_drafted: int, num_right: int) -> None:
        self.learnt.append((seq.rid, num_drafted, num_right))

    def watching(self, plan: StepPlan) -> AbstractContextManager[None]:
        return nullcontext()

    def take_seconds(self) -> float:
        return 0.0

    def note_step(self, plan: StepPlan, seconds: float) -> None: ...
    def forget(self, seq: Sequence) -> None: ...
    def check_integrity(self) -> None: ...


def decoding(source: Scripted, *texts: list[int], num_blocks: int = 100) -> tuple[Batcher, list[Sequence]]:
    """Return a batcher with one sequence per text, each with one token to compute."""
    batcher = Batcher(BatchLimits(4, 64, True, 4, 16), BlockPool(num_blocks), FakeSlots(), "base", draft_model=source)
    seqs = [make_seq(str(i), np.array(text), 40) for i, text in enumerate(texts)]
    for seq in seqs:
        seq.drafter = Drafter(4)
        batcher.add(seq)
    finish(batcher, batcher.plan())
    assert not source.asked, "somebody would wait for drafts with a prompt"
    return batcher, seqs


def finish(batcher: Batcher, plan: StepPlan, token: int = 99) -> None:
    """Complete a plan: each sequence gets `token`, and no draft is correct."""
    batcher.complete(plan)
    for seq in plan.num_new:
        seq.append(token)


def test_tokens_that_an_adapter_lacks_count_as_wrong() -> None:
    source = Scripted([5, 60, 7])
    batcher, [first, second] = decoding(source, [1, 2, 3], [4, 5, 6])
    first.vocab_size, second.vocab_size = 50, 5
    plan = batcher.plan()
    assert plan.drafts == {first: [5]}
    assert source.learnt == [("1", 3, 0)], "no step says that these were wrong"
    batcher.complete(plan)
    first.append(5)
    batcher.learn(first, plan, 1)
    assert source.learnt[1:] == [("0", 3, 1)]


def test_drafts_that_come_too_early_for_a_mask_count_as_wrong() -> None:
    source = Scripted([5, 6])
    batcher, [seq] = decoding(source, [1, 2, 3])
    plan = batcher.plan()
    batcher.postpone(seq, plan)
    assert (plan.num_new[seq], plan.drafts) == (0, {})
    assert source.learnt == [("0", 2, 0)]


def test_who_drafts_from_its_own_text_waits_for_nobodys_drafts() -> None:
    source = Scripted([5])
    batcher, [repeating, _] = decoding(source, [7, 8, 99, 1, 7, 8], [4, 5, 6])
    plan = batcher.plan()
    assert plan.drafts == {repeating: [1, 7, 8, 99]}
    assert not source.asked


def test_nothing_is_drafted_that_has_no_blocks() -> None:
    """Drafts without blocks would be dropped, so the step would wait for them in vain."""
    source = Scripted([5, 6, 7, 8])
    batcher, [seq] = decoding(source, list(range(BLOCK_TOKENS - 3)), num_blocks=1)
    drafted: list[int] = []
    while seq.num_tokens <= BLOCK_TOKENS:
        plan = batcher.plan()
        drafted += map(len, plan.drafts.values())
        finish(batcher, plan, 100 + seq.num_tokens)
        if plan.drafts:
            batcher.learn(seq, plan, 0)
    assert source.asked == [{"0": 2}, {"0": 1}]
    assert drafted == [2, 1]

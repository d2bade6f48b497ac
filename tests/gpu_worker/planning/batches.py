"""Batchers for tests, and sequences for them, with adapters that are resident or not."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from gpu_worker.planning.batcher import Batcher, BatchLimits
from gpu_worker.planning.blocks import BlockPool
from gpu_worker.planning.request import EngineRequest
from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.step_plan import StepPlan
from protocol.wire.messages import Sampling


class FakeSlots:
    """Adapter slots of which the test says which adapters are resident."""

    def __init__(self) -> None:
        self.resident: set[str] = set()
        self.refs: dict[str, int] = {}

    def acquire(self, digest: str) -> int | None:
        if digest not in self.resident:
            return None
        self.refs[digest] = self.refs.get(digest, 0) + 1
        return ord(digest)

    def release(self, digest: str) -> None:
        self.refs[digest] -= 1
        assert self.refs[digest] >= 0

    def rank(self, digest: str) -> int:
        return 16 if digest in self.resident else 0


class FakeDrafts:
    """A draft model that drafts random tokens and checks the batcher's calls."""

    def __init__(self, limits: BatchLimits) -> None:
        self.limits = limits
        self.rng = np.random.default_rng(1)
        self.learnt = 0
        self.known: set[Sequence] = set()

    def propose(self, limits: Mapping[Sequence, int], plan: StepPlan) -> dict[Sequence, list[int]]:
        """Return random drafts up to the limits, or none."""
        assert limits
        assert plan.limited is None
        assert not plan.preempted
        assert not limits.keys() & plan.drafts.keys(), "its own text has drafted for it"
        assert all(seq.num_pending == 1 for seq in plan.num_new), "somebody would wait for drafts with a prompt"
        most = min(self.limits.max_draft_step_tokens, self.limits.max_step_tokens)
        assert plan.num_tokens + sum(limits.values()) <= most
        assert all(1 <= limit <= self.limits.max_draft_tokens for limit in limits.values())
        self.known |= limits.keys()
        if self.rng.integers(4) == 0:
            return {}
        return {seq: self.rng.integers(5, size=self.rng.integers(limit + 1)).tolist() for seq, limit in limits.items()}

    def learn(self, seq: Sequence, num_drafted: int, num_right: int) -> None:
        """Check and count the outcome of a draft."""
        assert seq in self.known
        assert 0 <= num_right <= num_drafted
        assert num_drafted > 0
        self.learnt += 1

    def watching(self, plan: StepPlan) -> AbstractContextManager[None]:
        return nullcontext()

    def take_seconds(self) -> float:
        return 0.0

    def note_step(self, plan: StepPlan, seconds: float) -> None:
        assert plan.num_tokens <= self.limits.max_draft_step_tokens

    def forget(self, seq: Sequence) -> None:
        self.known.discard(seq)

    def check_integrity(self) -> None: ...


def make_seq(
    rid: str,
    prompt: np.ndarray,
    max_new: int,
    digest: str = "",
    output: list[int] | None = None,
    *,
    yields: bool = False,
    alone: bool = False,
    batch: bool = False,
    tenant: str = "",
) -> Sequence:
    request = EngineRequest(
        rid, 1, digest, prompt.astype(np.int32), Sampling(), max_new, output or [], yields=yields or alone,
        alone=alone, batch=batch, tenant=tenant,
    )  # fmt: skip
    seq = Sequence(request, 1 << 20)
    seq.is_bound = True
    return seq


def make_batcher(
    num_blocks: int, max_num_seqs: int = 8, max_step_tokens: int = 64, *, prefix_cache: bool = True,
    max_slowdown: float = 0.0, max_batch_slowdown: float = 0.0,
) -> tuple[Batcher, FakeSlots]:  # fmt: skip
    slots = FakeSlots()
    limits = BatchLimits(
        max_num_seqs, max_step_tokens, prefix_cache, max_slowdown=max_slowdown, max_batch_slowdown=max_batch_slowdown
    )  # fmt: skip
    return Batcher(limits, BlockPool(num_blocks), slots, "base"), slots


def finish_step(batcher: Batcher, plan: StepPlan) -> None:
    batcher.complete(plan)
    for seq in plan.num_new:
        if seq.num_pending == 0:
            seq.append(1)

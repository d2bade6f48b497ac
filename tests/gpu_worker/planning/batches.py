"""Batchers with adapters that are resident or not, and sequences for them."""

from __future__ import annotations

import numpy as np

from gpu_worker.planning.batcher import Batcher, BatchLimits
from gpu_worker.planning.blocks import BlockPool
from gpu_worker.planning.request import EngineRequest
from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.step_plan import StepPlan
from protocol.wire.messages import Sampling


class FakeSlots:
    """Adapters that are resident or not."""

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

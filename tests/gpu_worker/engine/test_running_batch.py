"""What is kept of a batch from step to step is that of its sequences as they run now."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_worker.engine.request import EngineRequest
from gpu_worker.engine.runner import RunningBatch
from gpu_worker.engine.sequence import Sequence
from protocol.wire.messages import Sampling


def sequence(rid: str, blocks: list[int]) -> Sequence:
    prompt: Any = np.zeros(4, np.int32)
    seq = Sequence(EngineRequest(rid, 1, "", prompt, Sampling(), 8), 64)
    seq.blocks = blocks
    return seq


def test_tables_follow_blocks_that_grow() -> None:
    seqs = [sequence("a", [5, 2]), sequence("b", [7])]
    batch = RunningBatch(seqs)
    assert batch.block_tables().tolist() == [[5, 2], [7, 0]]
    seqs[1].blocks += [3, 9]
    assert batch.is_of(seqs)
    assert batch.block_tables().tolist() == [[5, 2, 0], [7, 3, 9]]
    assert batch.block_tables().dtype == np.int32


def test_another_batch_is_noticed_and_so_is_another_admission() -> None:
    seqs = [sequence("a", [5, 2]), sequence("b", [7])]
    batch = RunningBatch(seqs)
    assert batch.is_of(list(seqs))
    assert not batch.is_of(seqs[:1])
    assert not batch.is_of(seqs[::-1])
    seqs[0].blocks = [5, 2]  # it was preempted and has got the same blocks: its adapter may lie in another slot
    assert not batch.is_of(seqs)

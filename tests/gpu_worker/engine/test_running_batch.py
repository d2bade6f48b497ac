"""Data kept of a batch from step to step matches the sequences that run now."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gpu_worker.engine.runner import HeadRows, RunningBatch
from gpu_worker.planning.request import EngineRequest
from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.step_plan import StepPlan
from lora_kernels import ops
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
    seqs[0].blocks = [5, 2]  # preempted, then given the same blocks: its adapter may be in another slot
    assert not batch.is_of(seqs)


def test_lists_that_are_written_over_are_those_made_anew() -> None:
    """Over six decodes, in which one sequence fills its block and gets two more, so that the tables become wider."""
    seqs = [sequence("a", [5]), sequence("b", [7, 1])]
    for seq, num in zip(seqs, (14, 20), strict=True):
        seq.max_tokens, seq._tokens = 64, np.arange(64, dtype=np.int32)
        seq.num_tokens, seq.num_computed = num, num - 1
    batch, plan = RunningBatch(seqs), StepPlan(num_new=dict.fromkeys(seqs, 1))
    assert batch.next_decodes(plan) is None, "what adapters do to its rows is not known yet"
    batch.decodes = HeadRows([], [], [], None, None, (None, None, [], []))
    for _ in range(6):
        if seqs[0].num_computed == 16:
            seqs[0].blocks += [3, 9]
        lists = batch.next_decodes(plan)
        assert lists is not None
        assert lists.input_ids.tolist() == [seq.last_token for seq in seqs]
        ends = np.array([seq.num_tokens for seq in seqs])
        new = ops.build_attention_batch(np.ones(2, np.int64), ends, batch.block_tables().copy(), "cpu")
        for name in ("block_tables", "query_starts", "kv_lens", "slot_mapping", "positions"):
            own, expected = getattr(lists.attention, name), getattr(new, name)
            assert own.dtype == expected.dtype, name
            assert torch.equal(own, expected), name
        for name in ("max_query_len", "max_kv_len", "num_seqs", "num_tokens"):
            assert getattr(lists.attention, name) == getattr(new, name), name
        for seq in seqs:
            seq.num_computed += 1
            seq.append(1)
    seqs[0].append(2)
    assert batch.next_decodes(plan) is None, "it is no decode"
    seqs[0].num_tokens -= 1
    assert batch.next_decodes(StepPlan(num_new={seqs[0]: 1})) is None, "another sequence of it sits out"
    assert batch.next_decodes(StepPlan(num_new=dict.fromkeys(seqs, 2), drafts={seqs[0]: [1]})) is None

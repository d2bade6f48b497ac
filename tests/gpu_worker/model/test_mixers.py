"""Mixers: the states that a run leaves, and their slots."""

from __future__ import annotations

import torch
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan, mamba2_selective_state_update

from gpu_worker.layers.mixers import ChunkScan, Run, StateBatch


def test_a_scan_leaves_the_state_that_it_begins_with_as_it_is() -> None:
    """Also for states with one column, whose transposed view is contiguous without a copy."""
    x, dt, b, c = torch.randn(1, 2, 3, 4), torch.rand(1, 2, 3), *torch.randn(2, 1, 2, 1, 1)
    args, options = (x, dt, -torch.rand(3), b, c), {"chunk_size": 8, "dt_limit": (0.0, 0.5)}
    scan = ChunkScan(mamba2_chunk_scan, mamba2_selective_state_update, args, options)
    scan.allocate(2, torch.device("cpu"))
    states = scan.states
    assert states is not None
    states.normal_()
    before = states[0].clone()
    run = Run(start=0, end=2, num_prompt=0, read=0, write=1, save=-1)
    scan.by_transformers(StateBatch.of([], [run], [], torch.device("cpu")), args, options)
    assert torch.equal(states[0], before)
    assert not torch.equal(states[1], before)

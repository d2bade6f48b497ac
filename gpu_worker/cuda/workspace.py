"""Measures the memory of steps besides weights and caches, by running the largest ones before caches exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from gpu_worker.cuda.graphs import MIXED_TOKENS
from gpu_worker.cuda.warm_up import WarmUpStep, run_steps
from gpu_worker.model.model import BaseModel
from gpu_worker.sampling.sampling import SampleRow, sample
from protocol.wire.messages import Sampling

NUM_LOGPROBS = 20
"""Most likely tokens per row in the trial: the maximum of OpenAI's API."""


class MemoryMeter(Protocol):
    """Measures memory use on a device."""

    def peak(self, run: Callable[[], object]) -> int:
        """Run something; return the peak of allocated bytes during the run, minus those before it."""
        ...


class CudaMeter:
    """Measures with torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def peak(self, run: Callable[[], object]) -> int:
        """See `MemoryMeter.peak`."""
        torch.cuda.empty_cache()
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        run()
        torch.cuda.synchronize(self._device)
        most = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.empty_cache()
        return most - before


def workspace_bytes(
    model: BaseModel, meter: MemoryMeter, *, max_num_seqs: int, max_step_tokens: int, max_model_len: int,
    max_prompt_rows: int, has_graphs: bool,
) -> int:  # fmt: skip
    """Return the bytes that the largest steps need. Replaces the model's caches with minimal ones.

    max_num_seqs, max_step_tokens, max_prompt_rows: as in `warm_up_steps`. max_model_len: maximum tokens of a sequence.
    has_graphs: whether steps will be captured, which keeps their memory permanently.
    """
    for layer in model.layers:
        layer.allocate(1, model.dtype, model.device)
    model.mixers.allocate(2, model.device)
    none = np.int32(-1)
    decodes = WarmUpStep(np.ones(max_num_seqs, np.int64), np.full(max_num_seqs, none))
    num_rows = min(max_prompt_rows, max_step_tokens)
    chunk = WarmUpStep(np.array([max_step_tokens]), np.full(max_step_tokens, none))
    scored = WarmUpStep(np.array([num_rows]), np.full(num_rows, none), through_head=True)

    def run(step: WarmUpStep) -> int:
        return meter.peak(lambda: run_steps(model, [step], max_model_len=max_model_len, block=0, empty_state=1))

    sizes = {name: run(step) for name, step in (("decodes", decodes), ("chunk", chunk), ("scored", scored))}
    sizes["sample"] = meter.peak(lambda: _sample(model, max_num_seqs))
    if not has_graphs:
        return max(sizes.values())
    num = min(max_step_tokens, MIXED_TOKENS[-1])
    recorded = run(WarmUpStep(np.array([num]), np.full(num, none)))
    return max(sizes.values()) + max(sizes["decodes"], recorded)


def _sample(model: BaseModel, num_rows: int) -> None:
    """Sample for the maximum number of rows, with the settings that take the most memory."""
    logits = torch.zeros(num_rows, model.vocab_size, dtype=model.dtype, device=model.device)
    wish = Sampling(temperature=1.0, top_p=0.5, num_logprobs=NUM_LOGPROBS, logprobs_of="choice")
    sample(logits, [SampleRow(wish, np.zeros(0, np.int32)) for _ in range(num_rows)])

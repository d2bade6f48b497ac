"""The steps run before a worker is ready, one of each shape, so that serving compiles no kernels.

Triton compiles a kernel for every set of its constants. A launch's constants depend on the step's numbers of sequences,
tokens and tiles, by thresholds; powers of two on both sides of each threshold cover them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from gpu_worker.layers.mixers import Run, StateBatch
from gpu_worker.layers.step_rows import lora_batch
from gpu_worker.memory import send
from gpu_worker.model.model import BaseModel
from lora_kernels import ops
from lora_kernels.segments import LARGE_TILE_ROWS_PER_SEGMENT


@dataclass(frozen=True, slots=True)
class WarmUpStep:
    """One step of sequences without earlier text."""

    num_new: np.ndarray  # int64 [S], tokens of each sequence
    slots: np.ndarray  # int32 [T], adapter slot of each token; -1: none
    has_scales: bool = False  # whether requests have adapter scales other than 1
    through_head: bool = False  # whether all tokens go through the head, not only each sequence's last

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens in the step."""
        return len(self.slots)


def warm_up_steps(
    max_num_seqs: int, max_step_tokens: int, num_slots: int, max_prompt_rows: int
) -> Iterator[WarmUpStep]:
    """Yield the warm-up steps.

    max_num_seqs, max_step_tokens: maximum sequences and tokens of a step. num_slots: the adapter pool's; the steps use
    its first slots, whether occupied or not. max_prompt_rows: maximum tokens of a step that go through the head besides
    each sequence's last.
    """
    for length in _sizes(max_step_tokens):  # attention: chunks of any length beside decodes
        for num in _sizes(min(max_num_seqs, max_step_tokens - length + 1)):
            yield WarmUpStep(_chunk_and_decodes(length, num), np.full(length + num - 1, -1, np.int32))
    for has_scales in (False, True):
        for num in _sizes(max_num_seqs):
            distinct = (np.arange(num) % num_slots).astype(np.int32)
            yield WarmUpStep(np.ones(num, np.int64), distinct, has_scales)
            yield WarmUpStep(np.ones(num, np.int64), np.zeros(num, np.int32), has_scales)
        # The maximum number of tiles, small and then large: a long chunk beside tokens of other adapters.
        for num in (max_step_tokens, max_step_tokens // LARGE_TILE_ROWS_PER_SEGMENT):
            num_seqs = max(1, min(max_num_seqs, num_slots, num))
            num_new = _chunk_and_decodes(max_step_tokens - num_seqs + 1, num_seqs)
            yield WarmUpStep(num_new, np.repeat(np.arange(num_seqs, dtype=np.int32), num_new), has_scales)
        for num in _sizes(max_step_tokens):
            slots = np.zeros(num, np.int32)
            slots[:1] = -1  # with one adapter for all tokens, library products might replace the kernels
            yield WarmUpStep(np.array([num]), slots, has_scales, through_head=num <= max_prompt_rows)


def _chunk_and_decodes(length: int, num_seqs: int) -> np.ndarray:
    """Return the tokens of each sequence of a step, int64 [num_seqs]: the first has `length`, the others one."""
    return np.array([length] + [1] * (num_seqs - 1))


def _sizes(most: int) -> list[int]:
    """Return `most` and the powers of two below it, descending."""
    return [most, *(1 << bit for bit in reversed(range((most - 1).bit_length())))] if most > 0 else []


def run_steps(
    model: BaseModel, steps: Iterable[WarmUpStep], *, max_model_len: int, block: int, empty_state: int
) -> None:
    """Run steps on a model with allocated, empty caches; afterwards its context has no adapters.

    max_model_len: maximum tokens of a sequence; longer ones are split. block: the KV block for all keys and values,
    which no sequence reads. empty_state: slot of the state that stays empty; the first slot is overwritten.
    """
    device, context = model.device, model.context
    had_rows = context.expert_slots.copy()
    context.expert_slots[:] = True  # compute the LoRA of experts too, though no adapter has rows yet
    for step in steps:
        lens = np.concatenate([_cut(num, max_model_len) for num in step.num_new.tolist()])
        ends = np.cumsum(lens)
        tables = np.full((len(lens), -(-int(lens.max()) // ops.BLOCK_TOKENS)), block, np.int32)
        context.attention = ops.build_attention_batch(lens, lens, tables, device)
        if model.mixers.calls:
            spans = zip((ends - lens).tolist(), ends.tolist(), lens.tolist(), strict=True)
            runs = [Run(start, end, empty_state, 0, num) for start, end, num in spans]
            model.mixers.batch = StateBatch.of([], runs, [], device)
        rows = np.arange(step.num_tokens) if step.through_head else ends - 1
        scales = np.full(step.num_tokens, 0.5 if step.has_scales else 1.0, np.float32)
        context.lora = lora_batch(step.slots, scales, device)
        context.lora_logits = lora_batch(step.slots[rows], scales[rows], device)
        context.extras, context.extras_logits = [], []
        ids = torch.zeros(step.num_tokens, dtype=torch.int64, device=device)
        with torch.inference_mode():
            model.forward(ids, context.attention.positions, send(rows, device))
    context.lora = context.lora_logits = None
    context.expert_slots[:] = had_rows


def _cut(num: int, most: int) -> np.ndarray:
    """Return parts of at most `most` that sum to `num`: int64."""
    return np.diff([*range(0, num, most), num])

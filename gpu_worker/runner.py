"""A plan becomes one forward pass: packed tokens, the step's work lists, logits where they are needed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gpu_worker.batcher import StepPlan
from gpu_worker.model import BaseModel
from gpu_worker.request import Sequence
from lora_kernels import ops
from protocol.errors import Internal


class Runner:
    """Runs plans on a model whose KV cache it allocates."""

    def __init__(self, model: BaseModel, num_blocks: int) -> None:
        self.model = model
        for layer in model.layers:
            layer.allocate(num_blocks, model.dtype, model.device)

    def run(self, plan: StepPlan) -> tuple[list[Sequence], Tensor | None]:
        """Compute a plan's tokens. Returns the sequences whose next token can be chosen, and their logits [n, V]."""
        seqs = list(plan.num_new)
        num_new = np.fromiter(plan.num_new.values(), np.int64, len(seqs))
        computed = np.array([seq.num_computed for seq in seqs], np.int64)
        ends = computed + num_new
        complete = ends == np.array([seq.num_tokens for seq in seqs])
        ids = np.concatenate([seq.tokens[seq.num_computed : end] for seq, end in zip(seqs, ends, strict=True)])
        rows = (np.cumsum(num_new) - 1)[complete]
        logits = self._forward(ids, num_new, ends, block_tables(seqs), rows, seqs)
        ready = [seq for seq, is_complete in zip(seqs, complete, strict=True) if is_complete]
        return ready, logits if ready else None

    def _forward(
        self, ids: np.ndarray, num_new: np.ndarray, ends: np.ndarray, tables: np.ndarray, rows: np.ndarray,
        seqs: list[Sequence],
    ) -> Tensor:  # fmt: skip
        device = self.model.device
        context = self.model.context
        context.attention = ops.build_attention_batch(num_new, ends, tables, device)
        slots = np.array([seq.slot for seq in seqs], np.int32)
        scales = np.array([seq.request.lora_scale for seq in seqs], np.float32)
        scales_given = None if (scales == 1).all() else scales
        context.lora = _lora_batch(slots, scales_given, num_new, device)
        # At least one row goes through the head: an empty batch is nothing that every kernel must know.
        head_rows = rows if len(rows) else np.zeros(1, np.int64)
        seq_of_row = np.searchsorted(np.cumsum(num_new), head_rows, side="right")
        context.lora_logits = _lora_batch(
            slots[seq_of_row], None if scales_given is None else scales[seq_of_row], None, device
        )
        input_ids = torch.from_numpy(ids.astype(np.int64)).to(device, non_blocking=True)
        logit_rows = torch.from_numpy(head_rows).to(device, non_blocking=True)
        with torch.inference_mode():
            return self.model.forward(input_ids, context.attention.positions, logit_rows)

    def check(self) -> float:
        """Hold the finished engine against the untouched model on a random prompt, computed in two chunks.

        Returns the largest difference of logits relative to their spread. Raises Internal when it is too large.
        Overwrites blocks 0 and 1.
        """
        check = self.model.check
        assert check is not None
        ids = check.input_ids.cpu().numpy()
        first = len(ids) // 2 + 1
        table = np.arange(-(-len(ids) // ops.BLOCK_TOKENS), dtype=np.int32)[None]
        parts = []
        for start, end in ((0, first), (first, len(ids))):
            num_new = np.array([end - start])
            rows = np.arange(end - start)
            context = self.model.context
            context.attention = ops.build_attention_batch(num_new, np.array([end]), table, self.model.device)
            context.lora = context.lora_logits = None
            with torch.inference_mode():
                input_ids = torch.from_numpy(ids[start:end]).to(self.model.device)
                logit_rows = torch.from_numpy(rows).to(self.model.device)
                parts.append(self.model.forward(input_ids, context.attention.positions, logit_rows))
        got, expected = torch.cat(parts).float(), check.logits.float()
        error = ((got - expected).abs().max() / expected.std()).item()
        limit = {torch.float32: 1e-3, torch.float16: 0.1}.get(self.model.dtype, 0.5)
        if not error < limit:
            raise Internal(
                f"model type {self.model.config.model_type} cannot be served: with paged attention its logits are off "
                f"by {error:.2g} of their spread (limit {limit})"
            )
        return error


def block_tables(seqs: list[Sequence]) -> np.ndarray:
    """Return the sequences' blocks as one table: int32 [S, max_blocks], padded with 0."""
    table = np.zeros((len(seqs), max(len(seq.blocks) for seq in seqs)), np.int32)
    for row, seq in zip(table, seqs, strict=True):
        row[: len(seq.blocks)] = seq.blocks
    return table


def _lora_batch(
    slots: np.ndarray, scales: np.ndarray | None, repeats: np.ndarray | None, device: torch.device
) -> ops.LoraBatch | None:
    if (slots < 0).all():
        return None
    if repeats is not None:
        slots = np.repeat(slots, repeats)
        scales = None if scales is None else np.repeat(scales, repeats)
    return ops.build_lora_batch(slots, device, scales)

"""Runs plans one sequence at a time: each has its own forward passes, adapter and cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_worker.cuda.graphs import GraphRecorder, Unrecordable
from gpu_worker.engine.runner import Runner, StepInputs, StepRows, without_unknown_ids
from gpu_worker.layers.apply_extras import ExtraRows
from gpu_worker.layers.extras import Extras
from gpu_worker.layers.step_rows import extra_rows, lora_batch
from gpu_worker.memory import send
from gpu_worker.model.model import BaseModel
from gpu_worker.model.one_by_one_trial import difference
from gpu_worker.one_by_one.account import passes_of
from gpu_worker.one_by_one.passes import Kept, Passes
from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.step_plan import StepPlan
from lora_kernels import ops


@dataclass(frozen=True, slots=True, kw_only=True)
class OneByOneInputs(StepInputs):
    """The rows of one step, on the host."""

    rows: StepRows


class OneByOneRunner(Runner):
    """Runs plans on a model whose sequences run unbatched."""

    def __init__(
        self, model: BaseModel, passes: Passes, num_blocks: int, extras: Mapping[str, Extras] | None = None
    ) -> None:
        """Set up running `model` by `passes`. extras: see `Runner`."""
        super().__init__(model, num_blocks, extras)
        self._passes = passes

    def record(self, recorder: GraphRecorder, max_num_seqs: int, max_model_len: int, max_step_tokens: int = 0) -> None:
        """Raise Unrecordable: unbatched sequences have no CUDA graphs."""
        raise Unrecordable("its sequences run unbatched")

    def prepare(self, plan: StepPlan, coming: Tensor | None = None) -> OneByOneInputs:
        """Return which rows of logits a plan's passes will produce; nothing is sent to the device yet.

        coming: must be None, since steps of such a model do not overlap.
        """
        assert coming is None
        rows = StepRows.of(plan)
        pooled = rows.pooled()
        ready = [seq for seq, is_complete in zip(rows.seqs, rows.complete, strict=True) if is_complete]
        return OneByOneInputs(ready=ready, prompt_rows=rows.prompt_rows(), pooled=pooled, rows=rows)

    def run(self, inputs: StepInputs) -> Tensor:
        """Compute a step. Return the logits [n, V] of its rows, or one unused row if there are none."""
        assert isinstance(inputs, OneByOneInputs)
        last: list[Tensor] = []
        of_prompts: list[Tensor] = []
        of_scores: list[Tensor] = []
        scored = {rows.seq_index for rows in inputs.pooled if rows.needs_logits}
        prompts = {prompt.seq_index: prompt for prompt in inputs.prompt_rows}
        rows = inputs.rows
        with torch.inference_mode():
            for i, (seq, is_ready) in enumerate(zip(rows.seqs, rows.complete.tolist(), strict=True)):
                end, prompt = int(rows.ends[i]), prompts.get(i)
                wanted = list(range(prompt.start, prompt.start + prompt.num_rows)) if prompt is not None else []
                found = self._run_sequence(seq, end, [*wanted, end - 1] if is_ready or i in scored else wanted)
                if wanted:
                    of_prompts.append(found[: len(wanted)])
                if is_ready:
                    last.append(found[len(wanted) :])
                elif i in scored:
                    of_scores.append(found)
            parts = [*last, *of_prompts, *of_scores] or [
                torch.zeros(1, self.model.vocab_size, device=self.model.device)
            ]
            # Vocabularies differ: an adapter may add tokens, and a model may have more embeddings than tokens.
            width = max(self.model.vocab_size, *(part.shape[1] for part in parts))
            return torch.cat([F.pad(part, (0, width - part.shape[1]), value=-torch.inf) for part in parts])

    def _run_sequence(self, seq: Sequence, end: int, wanted: list[int]) -> Tensor:
        """Compute a sequence's tokens up to `end`; return the logits [n, V] of those at the `wanted` positions."""
        kept, start = seq.kept, seq.num_computed
        assert kept is None or isinstance(kept, Kept)
        if kept is not None and kept.end > start:  # the last token was undone because its mask was late
            assert kept.logits is not None
            return kept.logits
        found: list[Tensor] = []
        for first, behind in passes_of(self._passes.continues, start, end, is_wanted=bool(wanted)):
            here = [position for position in wanted if first <= position < behind]
            logits, kept = self._pass(seq, kept if first else None, first, behind, here)
            found.append(logits[: len(here)])
        if self._passes.continues != "nothing" and kept is not None:
            kept.logits = found[-1][-1:] if seq.matcher is not None else None
            seq.kept = kept
        return torch.cat(found) if found else torch.empty(0, self.model.vocab_size, device=self.model.device)

    def _pass(
        self, seq: Sequence, kept: Kept | None, first: int, behind: int, wanted: list[int]
    ) -> tuple[Tensor, Kept]:
        """Run the pass over tokens [first, behind). Return the logits of `wanted`, at least one row, and the cache."""
        step = StepRows.after([seq], [first], [behind - first])
        slots, scales = step.adapters()
        rows = np.array(wanted or [first]) - first
        vocab_sizes = self.set_adapters(step, slots, scales, rows, np.zeros(len(rows), np.int64))
        device = self.model.device
        ids, places = send(step.token_ids({}).astype(np.int64), device), send(rows, device)
        self.model.context.of_all = self._adapters_by_rows(seq, behind - first, len(rows), behind)
        try:
            with self.model.hidden_states(is_wanted=seq.pool is not None) as hidden:
                logits, kept = self._passes.run(kept, ids, places)
        finally:
            self.model.context.of_all = None
        if seq.pool is not None:
            seq.pool.add(hidden[-1][0], first)
        return without_unknown_ids(logits, vocab_sizes), kept

    def _adapters_by_rows(
        self, seq: Sequence, num_new: int, num_logits: int, behind: int
    ) -> Callable[[int], tuple[ops.LoraBatch | None, list[ExtraRows]]]:
        """Return a function from a layer's number of rows to the adapter's effect on them.

        A layer with `num_logits` rows is the head; most others have `num_new`. Some see the end of the text again, as
        far as their cache reaches; an activated LoRA's rows are then counted from the end, as in PEFT.
        """
        context, device = self.model.context, self.model.device

        @functools.cache
        def of_end(num: int) -> tuple[ops.LoraBatch | None, list[ExtraRows]]:
            slots, scales = StepRows.after([seq], [behind - num], [num]).adapters()
            batch, extras = lora_batch(slots, scales, device), self._extras.get(seq.request.digest)
            if extras is None:
                return batch, []
            active = np.arange(behind - num, behind) >= seq.active_from
            return batch, [extra_rows(extras, np.arange(num), active, seq.request.lora_scale, device)]

        def by_rows(num: int) -> tuple[ops.LoraBatch | None, list[ExtraRows]]:
            if num == num_logits:
                return context.lora_logits, context.extras_logits
            return (context.lora, context.extras) if num == num_new else of_end(num)

        return by_rows

    def _difference(self) -> float:
        context = self.model.context
        context.lora = context.lora_logits = None
        context.extras = context.extras_logits = []
        assert self.model.check is not None
        return difference(self._passes, self.model.check)

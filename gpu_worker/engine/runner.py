"""A plan becomes one forward pass: packed tokens, the step's work lists, logits where they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gpu_worker.adapters.extras import Extras
from gpu_worker.cuda.graphs import DecodeGraph, DecodeGraphs, DecodeLists, Recorder
from gpu_worker.engine.batcher import StepPlan
from gpu_worker.engine.prompt_logprobs import PromptPart
from gpu_worker.engine.request import Sequence
from gpu_worker.memory import send
from gpu_worker.model.apply_extras import ExtraRows
from gpu_worker.model.logits_check import spread_of
from gpu_worker.model.model import BaseModel
from lora_kernels import ops
from protocol.wire.errors import BadRequest

CHECK_LIMITS = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}
"""Differences of logits that rounding may make: 0.06 measured in bf16 with 30 layers. Wrong attention makes about 1."""

MAX_OVER_SENSITIVITY = 3.0
"""A model that rounds activations may differ by so much more than by a change of its embeddings' last digits."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's inputs on the device; the work lists are in the model's context."""

    input_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    logit_rows: Tensor | None  # int64 [n]; None: all
    ready: list[
        Sequence
    ]  # whose next token can be chosen; logit_rows has their rows in this order: one, and one per guess
    prompt_parts: list[PromptPart] = field(default_factory=list)  # whose rows follow in logit_rows
    vocab_sizes: Tensor | None = None  # int64 [n], where an adapter of the step has a vocabulary of its own
    graph: DecodeGraph | None = None  # replayed instead of running the model on the tensors above, which are its own


class Runner:
    """Runs plans on a model whose KV cache it allocates."""

    def __init__(self, model: BaseModel, num_blocks: int, extras: Mapping[str, Extras] | None = None) -> None:
        """extras: by digest, of the adapters in the pool that do more than plain LoRA; it may change between steps."""
        self.model = model
        self.num_blocks = num_blocks
        self._extras: Mapping[str, Extras] = {} if extras is None else extras
        self._graphs: DecodeGraphs | None = None
        for layer in model.layers:
            layer.allocate(num_blocks + 1, model.dtype, model.device)  # the last is for the padding of recorded steps

    def record(self, recorder: Recorder, max_num_seqs: int, max_model_len: int) -> None:
        """Record the decode steps of up to max_num_seqs sequences, to be replayed from now on. Raises Unrecordable.

        The adapter pool must be there.
        """
        max_blocks = -(-max_model_len // ops.BLOCK_TOKENS)
        graphs = DecodeGraphs(self.model, max_num_seqs, max_blocks, dummy_block=self.num_blocks)
        graphs.record(recorder)
        self._graphs = graphs

    def prepare(self, plan: StepPlan) -> StepInputs:
        """Build a plan's inputs and work lists with numpy and send them to the device."""
        device, context = self.model.device, self.model.context
        seqs = list(plan.num_new)
        num_new = np.fromiter(plan.num_new.values(), np.int64, len(seqs))
        ends = np.array([seq.num_computed for seq in seqs]) + num_new
        complete = ends >= np.array([seq.num_tokens for seq in seqs])
        parts: list[np.ndarray] = []
        for seq, end in zip(seqs, ends, strict=True):
            parts.append(seq.tokens[seq.num_computed : end])
            if seq in plan.drafts:
                parts.append(np.array(plan.drafts[seq], np.int32))
        ids = np.concatenate(parts)
        ready = [seq for seq, is_complete in zip(seqs, complete, strict=True) if is_complete]
        slots = np.array([seq.slot for seq in seqs], np.int32)
        scales = np.array([seq.request.lora_scale for seq in seqs], np.float32)
        token_slots, token_scales = np.repeat(slots, num_new), np.repeat(scales, num_new)
        late = [i for i, seq in enumerate(seqs) if seq.active_from > seq.num_computed]
        for i in late:  # an activated LoRA before its invocation
            first = int(num_new[:i].sum())
            token_slots[first : first + min(num_new[i], seqs[i].active_from - seqs[i].num_computed)] = -1
        has_extras = any(seq.request.digest in self._extras for seq in seqs)
        parts_of_prompts = _prompt_parts(seqs, ends)
        can_replay = self._graphs is not None and not has_extras and not parts_of_prompts
        graph = self._graphs.find(num_new, complete) if self._graphs is not None and can_replay else None
        if graph is not None:
            graph.fill(DecodeLists(ids.astype(np.int64), ends, block_tables(seqs), token_slots, token_scales))
            return StepInputs(graph.input_ids, graph.attention.positions, graph.rows, ready, graph=graph)
        # At least one row goes through the head: an empty batch is nothing that every kernel must know.
        heads = np.flatnonzero(complete) if complete.any() else np.zeros(1, np.int64)
        rows = np.cumsum(num_new)[heads] - 1
        if plan.drafts:
            num_guesses = np.array([len(plan.drafts.get(seqs[i], ())) for i in heads])
            heads, rows = _with_guesses(heads, rows, num_guesses)
        if parts_of_prompts:
            heads, rows = _with_prompts(heads, rows, np.cumsum(num_new) - num_new, seqs, parts_of_prompts)
        context.attention = ops.build_attention_batch(num_new, ends, block_tables(seqs), device)
        context.lora = lora_batch(token_slots, token_scales, device)
        context.lora_logits = lora_batch(token_slots[rows], token_scales[rows], device)
        context.extras, context.extras_logits = [], []
        vocab_sizes = self._set_extras(seqs, num_new, heads, rows) if has_extras else None
        return StepInputs(
            input_ids=send(ids.astype(np.int64), device),
            positions=context.attention.positions,
            logit_rows=None if len(rows) == len(ids) and not parts_of_prompts else send(rows, device),
            ready=ready,
            prompt_parts=parts_of_prompts,
            vocab_sizes=vocab_sizes,
        )

    def _set_extras(
        self, seqs: list[Sequence], num_new: np.ndarray, heads: np.ndarray, rows_of_heads: np.ndarray
    ) -> Tensor | None:
        """Note in the context which rows have extras. Returns the vocabulary sizes of the logits' rows if they differ.

        heads, rows_of_heads: int [n], the sequences of the tokens that go through the head, and these tokens' rows.
        """
        context = self.model.context
        owners: dict[tuple[str, float], list[int]] = {}
        for i, seq in enumerate(seqs):
            if seq.request.digest in self._extras:
                owners.setdefault((seq.request.digest, seq.request.lora_scale), []).append(i)
        device, starts = self.model.device, np.cumsum(num_new) - num_new
        sizes = np.full(len(heads), self.model.vocab_size)
        for (digest, scale), members in owners.items():
            extras = self._extras[digest]
            rows = np.concatenate([np.arange(starts[i], starts[i] + num_new[i]) for i in members])
            positions = np.concatenate([np.arange(num_new[i]) + seqs[i].num_computed for i in members])
            active = positions >= np.repeat([seqs[i].active_from for i in members], num_new[members])
            context.extras.append(extra_rows(extras, rows, active, scale, device))
            head_rows = np.flatnonzero(np.isin(heads, members))
            lasts = np.array(
                [seqs[i].num_computed + row - starts[i] >= seqs[i].active_from
                 for i, row in zip(heads[head_rows], rows_of_heads[head_rows], strict=True)]
            )  # fmt: skip
            if len(head_rows):
                context.extras_logits.append(extra_rows(extras, head_rows, lasts, scale, device))
                sizes[head_rows] = extras.vocab_size or self.model.vocab_size
        return send(sizes, device) if (sizes != self.model.vocab_size).any() else None

    def run(self, inputs: StepInputs) -> Tensor:
        """Compute a step. Returns the logits [n, V] of the sequences in `inputs.ready` (one useless row if none).

        Those of `inputs.prompt_parts` follow.
        """
        if inputs.graph is not None:
            return inputs.graph.replay()
        with torch.inference_mode():
            logits = self.model.forward(inputs.input_ids, inputs.positions, inputs.logit_rows)
            if inputs.vocab_sizes is not None:
                ids = torch.arange(logits.shape[-1], device=logits.device)
                logits = logits.masked_fill(ids >= inputs.vocab_sizes[:, None], -torch.inf)
            return logits

    def check(self) -> float:
        """Hold the finished engine against the untouched model: random prompts, in chunks, packed into the same steps.

        Returns the root mean square difference of logits relative to their spread. Raises BadRequest if it is too
        large: another start would find the same. Overwrites the first blocks.
        """
        check = self.model.check
        assert check is not None
        num = min(len(check.prompts), self.num_blocks)
        room = min(self.num_blocks // num * ops.BLOCK_TOKENS, self.model.max_positions or len(check.prompts[0]))
        prompts = [ids[:room] for ids in check.prompts[:num]]
        lengths = np.array([len(ids) for ids in prompts])
        firsts = lengths // 2 + 1
        context, device = self.model.context, self.model.device
        context.lora = context.lora_logits = None
        context.extras = context.extras_logits = []
        parts: list[list[Tensor]] = [[] for _ in prompts]
        for starts, ends in ((np.zeros_like(firsts), firsts), (firsts, lengths)):
            blocks = -(-ends // ops.BLOCK_TOKENS)
            table = np.zeros((num, blocks.max()), np.int32)
            for i in range(num):
                table[i, : blocks[i]] = i * (self.num_blocks // num) + np.arange(blocks[i])
            context.attention = ops.build_attention_batch(ends - starts, ends, table, device)
            ids = torch.cat([ids[start:end] for ids, start, end in zip(prompts, starts, ends, strict=True)])
            rows = torch.arange(len(ids), device=device)
            logits = self.run(StepInputs(ids, context.attention.positions, rows, []))
            for part, new in zip(parts, logits.split((ends - starts).tolist()), strict=True):
                part.append(new)
        expected = [rows[:n] for rows, n in zip(check.logits, lengths, strict=False)]
        error = spread_of([row for part in parts for row in part], expected)
        limit = max(CHECK_LIMITS[self.model.dtype], MAX_OVER_SENSITIVITY * check.sensitivity)
        if not error < limit:
            raise BadRequest(
                f"model type {self.model.module.config.model_type} cannot be served: with paged attention its logits "
                f"are off by {error:.2g} of their spread (limit {limit:.2g})"
            )
        return error


def block_tables(seqs: list[Sequence]) -> np.ndarray:
    """Return the sequences' blocks as one table: int32 [S, max_blocks], padded with 0."""
    table = np.zeros((len(seqs), max(len(seq.blocks) for seq in seqs)), np.int32)
    for row, seq in zip(table, seqs, strict=True):
        row[: len(seq.blocks)] = seq.blocks
    return table


def _with_guesses(heads: np.ndarray, rows: np.ndarray, num_guesses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put the rows before each last one that guesses follow too among those that go through the head.

    heads, rows, num_guesses: int [n], see `Runner.prepare`.
    """
    counts = num_guesses + 1
    back = np.repeat(np.cumsum(counts), counts) - 1 - np.arange(counts.sum())
    return np.repeat(heads, counts), np.repeat(rows, counts) - back


def _prompt_parts(seqs: list[Sequence], ends: np.ndarray) -> list[PromptPart]:
    """Return the rows that tell of prompts, of the tokens up to `ends` (int [S])."""
    parts: list[PromptPart] = []
    for seq, end in zip(seqs, ends.tolist(), strict=True):
        if seq.prompt_logprobs is not None and (num := seq.prompt_logprobs.num_rows(seq.num_computed, end)):
            parts.append(PromptPart(seq, seq.num_computed, num))
    return parts


def _with_prompts(
    heads: np.ndarray, rows: np.ndarray, starts: np.ndarray, seqs: list[Sequence], parts: list[PromptPart]
) -> tuple[np.ndarray, np.ndarray]:
    """Put the rows that tell of prompts behind those of the head. starts: int [S], the sequences' first rows."""
    for part in parts:
        i = seqs.index(part.seq)
        heads = np.concatenate((heads, np.full(part.num_rows, i)))
        rows = np.concatenate((rows, starts[i] + np.arange(part.num_rows)))
    return heads, rows


def lora_batch(slots: np.ndarray, scales: np.ndarray, device: torch.device) -> ops.LoraBatch | None:
    """Build the list of rows with adapters: slots int32 [T], scales float32 [T]."""
    if (slots < 0).all():
        return None
    return ops.build_lora_batch(slots, device, None if (scales == 1).all() else scales)


def extra_rows(extras: Extras, rows: np.ndarray, active: np.ndarray, scale: float, device: torch.device) -> ExtraRows:
    """Send one group of rows to the device. rows: int [n]; active: bool [n], rows on which the LoRA counts."""
    whole = torch.from_numpy(rows.astype(np.int64)).to(device)
    part = whole if active.all() else torch.from_numpy(rows[active].astype(np.int64)).to(device)
    return ExtraRows(extras, whole, part, scale)

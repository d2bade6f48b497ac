"""Turns a plan into one forward pass: packed tokens, the step's work lists, logits where needed.

The new tokens of all sequences are packed one after another. T is the number of tokens, S of sequences, n of rows of
logits, V the vocabulary size.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gpu_worker.cuda.graphs import GraphRecorder, StepGraph, StepGraphs, StepLists
from gpu_worker.engine.pooled import PooledRows, gather
from gpu_worker.layers.apply_extras import ExtraRows
from gpu_worker.layers.extras import Extras
from gpu_worker.layers.mixers import Run, StateBatch
from gpu_worker.layers.step_rows import extra_rows, lora_batch
from gpu_worker.memory import MemoryAhead, send
from gpu_worker.model.logits_check import CODED_LIMIT
from gpu_worker.model.model import BaseModel
from gpu_worker.planning.request import EngineRequest
from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.step_plan import StepPlan
from gpu_worker.sampling.logprobs import PromptRows
from lora_kernels import ops
from protocol.wire.errors import BadRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """The inputs of one step, and the meaning of its rows of logits."""

    ready: list[Sequence]  # sequences whose next token can be chosen; their rows come first, in this order
    prompt_rows: list[PromptRows] = field(default_factory=list[PromptRows])  # prompts whose rows come next
    pooled: list[PooledRows] = field(default_factory=list[PooledRows])  # requests scored by tokens have the last rows


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedInputs(StepInputs):
    """One packed step's inputs on the device; the work lists are in the model's context."""

    input_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    logit_rows: Tensor | None  # int64 [n], tokens that go through the head; None: all
    vocab_sizes: Tensor | None = None  # int64 [n], if an adapter of the step has its own vocabulary
    graph: StepGraph | None = None  # replayed instead of running the model; it owns the tensors above


@dataclass(frozen=True, slots=True)
class StepRows:
    """A plan's rows on the host, before they are sent."""

    seqs: list[Sequence]
    num_before: np.ndarray  # int64 [S], tokens of each sequence computed before this step
    num_new: np.ndarray  # int64 [S], tokens of each sequence in this step
    ends: np.ndarray  # int64 [S], tokens computed after this step
    complete: np.ndarray  # bool [S], whether this step computes all known tokens, so that the next can be chosen
    are_decodes: bool  # whether each sequence has one token and is complete

    @classmethod
    def of(cls, plan: StepPlan) -> StepRows:
        """Return the rows of a plan."""
        seqs = list(plan.num_new)
        return cls.after(seqs, [seq.num_computed for seq in seqs], list(plan.num_new.values()))

    @classmethod
    def after(cls, seqs: list[Sequence], num_before: list[int], num_new: list[int]) -> StepRows:
        """Return the rows for the `num_new` tokens of each sequence that follow its first `num_before`."""
        ends = list(map(operator.add, num_before, num_new))
        complete = [end >= seq.num_tokens for end, seq in zip(ends, seqs, strict=True)]
        are_decodes = max(num_new) == 1 and all(complete)
        return cls(seqs, np.array(num_before), np.array(num_new), np.array(ends), np.array(complete), are_decodes)

    def pooled(self) -> list[PooledRows]:
        """Return the rows of requests for embeddings or scores, and set `complete` to False for them."""
        found: list[PooledRows] = []
        for i, seq in enumerate(self.seqs):
            if seq.pool is not None:
                first, num, start = int(self.starts[i]), int(self.num_new[i]), int(self.num_before[i])
                found.append(PooledRows(seq, i, first, num, start, bool(self.complete[i])))
                self.complete[i] = False
        return found

    @property
    def starts(self) -> np.ndarray:
        """Each sequence's first row in the step: int64 [S]."""
        return np.cumsum(self.num_new) - self.num_new

    def token_ids(self, drafts: Mapping[Sequence, list[int]]) -> np.ndarray:
        """Return the step's tokens, int64 [T]: each sequence's known tokens, then its draft tokens."""
        if self.are_decodes:
            return np.array([seq.last_token for seq in self.seqs])
        parts: list[np.ndarray] = []
        for seq, start, end in zip(self.seqs, self.num_before.tolist(), self.ends.tolist(), strict=True):
            parts.append(seq.tokens[start:end])
            if seq in drafts:
                parts.append(np.array(drafts[seq], np.int32))
        return np.concatenate(parts, dtype=np.int64)

    def put_expected_(self, input_ids: Tensor, coming: Tensor | None) -> None:
        """Copy the tokens that sequences expect from `coming` (int64 [n]) to their places in input_ids [T]."""
        if coming is None:
            return
        expecting = [i for i, seq in enumerate(self.seqs) if seq.expected_row >= 0 and self.complete[i]]
        if not expecting:
            return
        rows = np.array([self.seqs[i].expected_row for i in expecting])
        places = np.cumsum(self.num_new)[expecting] - 1  # the last token of each
        device = input_ids.device
        input_ids.index_copy_(0, send(places, device), coming.index_select(0, send(rows, device)))

    def adapters(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each token's adapter slot (int32 [T], -1: none) and adapter scale (float32 [T])."""
        slots = np.repeat(np.array([seq.slot for seq in self.seqs], np.int32), self.num_new)
        scales = np.repeat(np.array([seq.request.lora_scale for seq in self.seqs], np.float32), self.num_new)
        for i, (seq, start) in enumerate(zip(self.seqs, self.num_before.tolist(), strict=True)):
            num_inactive = seq.active_from - start
            if num_inactive > 0:  # an activated LoRA before its invocation
                first = int(self.num_new[:i].sum())
                slots[first : first + min(self.num_new[i], num_inactive)] = -1
        return slots, scales

    def prompt_rows(self) -> list[PromptRows]:
        """Return the rows of prompts whose logprobs are recorded."""
        found: list[PromptRows] = []
        spans = zip(self.seqs, self.num_before.tolist(), self.ends.tolist(), strict=True)
        for i, (seq, start, end) in enumerate(spans):
            recorder = seq.prompt_logprobs
            if recorder is not None and (own := recorder.rows(start, end)):
                found.append(PromptRows(recorder, i, own.start, len(own)))
        return found

    def logit_rows(
        self, drafts: Mapping[Sequence, list[int]], prompt_rows: list[PromptRows], pooled: Iterable[PooledRows] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens that go through the head, and the sequence index of each: both int64 [n].

        Order: the last known token of each complete sequence with its draft tokens; then the tokens of `prompt_rows`;
        then the last token of each text of `pooled` that is scored by tokens and ends here.
        """
        # At least one row goes through the head, so that no kernel gets an empty batch.
        heads = np.flatnonzero(self.complete)
        if not len(heads):
            heads = np.zeros(1, np.int64)
        rows = np.cumsum(self.num_new)[heads] - 1
        if drafts:
            counts = 1 + np.array([len(drafts.get(self.seqs[i], ())) for i in heads])
            rows_back = np.repeat(np.cumsum(counts), counts) - 1 - np.arange(counts.sum())
            heads, rows = np.repeat(heads, counts), np.repeat(rows, counts) - rows_back
        starts = self.starts if prompt_rows else rows
        for prompt in prompt_rows:
            heads = np.concatenate((heads, np.full(prompt.num_rows, prompt.seq_index)))
            first = starts[prompt.seq_index] + prompt.start - self.num_before[prompt.seq_index]
            rows = np.concatenate((rows, first + np.arange(prompt.num_rows)))
        for part in pooled:
            if part.needs_logits:
                heads, rows = np.append(heads, part.seq_index), np.append(rows, part.first + part.num - 1)
        return rows, heads


@dataclass(frozen=True, slots=True)
class HeadRows:
    """The rows of a step that go through the head, their sequences, and the adapters of all rows."""

    ready: list[Sequence]
    prompt_rows: list[PromptRows]
    pooled: list[PooledRows]
    logit_rows: Tensor | None
    vocab_sizes: Tensor | None
    adapters: tuple[ops.LoraBatch | None, ops.LoraBatch | None, list[ExtraRows], list[ExtraRows]]
    """LoRA of all rows, LoRA of the head's rows, extras of all rows, extras of the head's rows, as in `StepContext`."""


class DecodeLists:
    """Inputs of a decode step on a CPU, overwritten by the next decode step of the same sequences.

    Rebuilding them would take three times as long: after a forward pass the CPU caches hold little of numpy's code.
    """

    def __init__(self, num_seqs: int) -> None:
        self._rows = np.empty((3, num_seqs), np.int64)
        self._kv_lens = np.empty(num_seqs, np.int32)
        self._tables = np.empty((0, 0), np.int32)
        self.input_ids, positions, slots = torch.from_numpy(self._rows).unbind()
        self.attention = ops.AttentionBatch(
            buffer=None,
            block_tables=torch.from_numpy(self._tables),
            query_starts=torch.arange(num_seqs + 1, dtype=torch.int32),
            kv_lens=torch.from_numpy(self._kv_lens),
            slot_mapping=slots,
            positions=positions,
            max_query_len=1,
            max_kv_len=0,
            num_seqs=num_seqs,
            num_tokens=num_seqs,
        )

    def fill(self, seqs: list[Sequence], tables: np.ndarray) -> None:
        """Write the next step's inputs. tables: int32 [S, max_blocks], the sequences' blocks; its memory is shared."""
        before = [seq.num_computed for seq in seqs]
        size = ops.BLOCK_TOKENS
        slots = [seq.blocks[num // size] * size + num % size for seq, num in zip(seqs, before, strict=True)]
        self._rows[:] = [seq.last_token for seq in seqs], before, slots
        np.add(self._rows[1], 1, out=self._kv_lens, casting="unsafe")
        self.attention.max_kv_len = max(before) + 1
        if tables is not self._tables:
            self._tables, self.attention.block_tables = tables, torch.from_numpy(tables)


class RunningBatch:
    """State that stays the same from step to step while the same sequences run."""

    def __init__(self, seqs: list[Sequence]) -> None:
        self.decodes: HeadRows | None = None  # head rows of pure decode steps, reused between steps
        self._lists: DecodeLists | None = None  # lists of pure decode steps on a CPU
        self._seqs = seqs
        self._blocks = [seq.blocks for seq in seqs]
        self._num_listed = [0] * len(seqs)  # blocks of each sequence already in the tables
        self._tables = np.zeros((len(seqs), 0), np.int32)

    def is_of(self, seqs: list[Sequence]) -> bool:
        """Return whether this batch has exactly these sequences, none of them readmitted."""
        return seqs == self._seqs and all(map(operator.is_, self._blocks, [seq.blocks for seq in seqs]))

    def next_decodes(self, plan: StepPlan) -> DecodeLists | None:
        """Return the inputs of a step in which each sequence decodes one token, None for any other step."""
        if self.decodes is None or plan.drafts or sum(plan.num_new.values()) != len(self._seqs):
            return None
        if {seq.num_tokens - seq.num_computed for seq in self._seqs} != {1}:
            return None
        if self._lists is None:
            self._lists = DecodeLists(len(self._seqs))
        self._lists.fill(self._seqs, self.block_tables())
        return self._lists

    def block_tables(self) -> np.ndarray:
        """Return the blocks as a table: int32 [S, max_blocks], padded with 0. The next call may change it."""
        for row, (blocks, num) in enumerate(zip(self._blocks, self._num_listed, strict=True)):
            if len(blocks) > num:
                missing = len(blocks) - self._tables.shape[1]
                if missing > 0:
                    self._tables = np.pad(self._tables, ((0, 0), (0, missing)))
                self._tables[row, num : len(blocks)] = blocks[num:]
                self._num_listed[row] = len(blocks)
        return self._tables


class Runner:
    """Runs plans on a model whose KV cache it allocates."""

    def __init__(
        self, model: BaseModel, num_blocks: int, extras: Mapping[str, Extras] | None = None, num_states: int = 0
    ) -> None:
        """extras: by digest, for pool adapters that have more than plain LoRA; may change between steps.

        num_states: slots for the states of layers that keep states; one more slot stays all zero.
        """
        self.model = model
        self.num_blocks = num_blocks
        self.num_states = num_states
        self._extras: Mapping[str, Extras] = {} if extras is None else extras
        self._batch = RunningBatch([])
        self.graphs: StepGraphs | None = None  # captured steps; replayed if set
        for layer in model.layers:  # the last block is for the padding of captured steps
            layer.allocate(num_blocks + 1, model.cache_dtype, model.device)
        model.mixers.allocate(num_states + 1, model.device)
        caches = [layer.k_cache for layer in model.layers if layer.owner is None and layer.k_cache is not None]
        self.ahead = MemoryAhead(caches)  # on a CPU a block's values follow its keys

    def record(self, recorder: GraphRecorder, max_num_seqs: int, max_model_len: int, max_step_tokens: int = 0) -> None:
        """Capture the steps of up to max_num_seqs sequences, to be replayed from now on. Raises Unrecordable.

        Needs the adapter pool. max_step_tokens: maximum tokens of a step; 0: capture decodes only.
        """
        max_blocks = -(-max_model_len // ops.BLOCK_TOKENS)
        graphs = StepGraphs(self.model, max_num_seqs, max_blocks, self.num_blocks, max_step_tokens)
        graphs.record(recorder)
        self.graphs = graphs

    def prepare(self, plan: StepPlan, coming: Tensor | None = None) -> StepInputs:
        """Build a plan's inputs and work lists with numpy and send them to the device without waiting for it.

        coming: int64 [n], the tokens of the step in flight, from which some sequences expect their next.
        """
        device, context, seqs = self.model.device, self.model.context, list(plan.num_new)
        if not self._batch.is_of(seqs):
            self._batch = RunningBatch(seqs)
        head = self._batch.decodes
        if head is not None and device.type == "cpu" and coming is None and not self.model.mixers.calls:
            lists = self._batch.next_decodes(plan)
            if lists is not None:
                context.lora, context.lora_logits, context.extras, context.extras_logits = head.adapters
                context.attention, self.model.mixers.batch = lists.attention, None
                return PackedInputs(
                    input_ids=lists.input_ids,
                    positions=lists.attention.positions,
                    logit_rows=None,
                    ready=head.ready,
                    vocab_sizes=head.vocab_sizes,
                )
        step = StepRows.of(plan)
        ids, tables = step.token_ids(plan.drafts), self._batch.block_tables()
        head = self._batch.decodes if step.are_decodes else None
        if head is not None:
            context.lora, context.lora_logits, context.extras, context.extras_logits = head.adapters
        else:
            pooled = step.pooled()
            ready = [seq for seq, is_complete in zip(step.seqs, step.complete.tolist(), strict=True) if is_complete]
            slots, scales = step.adapters()
            prompt_rows = step.prompt_rows()
            rows, heads = step.logit_rows(plan.drafts, prompt_rows, pooled)
            if self.graphs is not None and not prompt_rows and not pooled and self._is_plain(step, slots):
                graph = self.graphs.find(step.num_new, step.complete, len(rows))
                if graph is not None:
                    graph.fill(StepLists(ids, step.num_new, step.ends, tables, slots, scales, rows))
                    step.put_expected_(graph.input_ids, coming)
                    return PackedInputs(
                        input_ids=graph.input_ids,
                        positions=graph.attention.positions,
                        logit_rows=graph.rows,
                        ready=ready,
                        graph=graph,
                    )
            vocab_sizes = self.set_adapters(step, slots, scales, rows, heads)
            are_all = len(rows) == len(ids) and not prompt_rows and not pooled
            adapters = context.lora, context.lora_logits, context.extras, context.extras_logits
            head = HeadRows(ready, prompt_rows, pooled, None if are_all else send(rows, device), vocab_sizes, adapters)
            if step.are_decodes and are_all and all(seq.active_from <= seq.num_computed for seq in step.seqs):
                self._batch.decodes = head
        context.attention = ops.build_attention_batch(step.num_new, step.ends, tables, device)
        self.model.mixers.batch = state_batch(step, plan.saves, device) if self.model.mixers.calls else None
        input_ids = send(ids, device)
        step.put_expected_(input_ids, coming)
        return PackedInputs(
            input_ids=input_ids,
            positions=context.attention.positions,
            logit_rows=head.logit_rows,
            ready=head.ready,
            prompt_rows=head.prompt_rows,
            pooled=head.pooled,
            vocab_sizes=head.vocab_sizes,
        )

    def set_adapters(
        self, step: StepRows, slots: np.ndarray, scales: np.ndarray, rows: np.ndarray, heads: np.ndarray
    ) -> Tensor | None:
        """Set the adapters of all rows in the model's context. Return vocabulary sizes like `_set_extras`.

        slots, scales: see `StepRows.adapters`. rows, heads: see `StepRows.logit_rows`.
        """
        context, device = self.model.context, self.model.device
        context.lora = lora_batch(slots, scales, device)
        context.lora_logits = lora_batch(slots[rows], scales[rows], device)
        context.extras, context.extras_logits = [], []
        return self._set_extras(step, rows, heads) if self._has_extras(step) else None

    def _is_plain(self, step: StepRows, slots: np.ndarray) -> bool:
        return not self._has_extras(step) and not self.model.context.are_expert_rows(slots)

    def _has_extras(self, step: StepRows) -> bool:
        return len(self._extras) > 0 and any(
            (extras := self._extras.get(seq.request.digest)) is not None
            and extras.in_steps
            and (not extras.num_virtual or before < extras.num_virtual)
            for seq, before in zip(step.seqs, step.num_before.tolist(), strict=True)
        )

    def _set_extras(self, step: StepRows, rows: np.ndarray, heads: np.ndarray) -> Tensor | None:
        """Set the rows that have extras in the model's context. Return the rows' vocabulary sizes if they differ.

        rows, heads: int64 [n], see `StepRows.logit_rows`.
        """
        seqs, num_new, starts = step.seqs, step.num_new, step.starts
        context, device, own_size = self.model.context, self.model.device, self.model.vocab_size
        active_from = np.array([seq.active_from for seq in seqs])
        num_before = step.num_before
        logit_positions = num_before[heads] + rows - starts[heads]
        sizes = np.full(len(heads), own_size)
        for (digest, scale), members in group_by_adapter([seq.request for seq in seqs], self._extras).items():
            extras = self._extras[digest]
            if not extras.in_steps:
                continue
            own_rows = np.concatenate([np.arange(starts[i], starts[i] + num_new[i]) for i in members])
            positions = np.concatenate([np.arange(num_new[i]) + num_before[i] for i in members])
            if extras.num_virtual:
                own_rows = own_rows[positions < extras.num_virtual]
                if len(own_rows):
                    context.extras.append(extra_rows(extras, own_rows, own_rows >= 0, scale, device))
                continue
            active = positions >= np.repeat(active_from[members], num_new[members])
            context.extras.append(extra_rows(extras, own_rows, active, scale, device))
            own_heads = np.flatnonzero(np.isin(heads, members))
            if len(own_heads):
                active = logit_positions[own_heads] >= active_from[heads[own_heads]]
                context.extras_logits.append(extra_rows(extras, own_heads, active, scale, device))
                sizes[own_heads] = extras.vocab_size or own_size
        return send(sizes, device) if (sizes != own_size).any() else None

    def run(self, inputs: StepInputs) -> Tensor:
        """Compute a step. Return the logits [n, V] of its rows, or one unused row if nothing is ready."""
        assert isinstance(inputs, PackedInputs)
        if inputs.graph is not None:
            return inputs.graph.replay()
        with torch.inference_mode():
            with self.model.hidden_states(is_wanted=bool(inputs.pooled)) as hidden:
                logits = self.model.forward(inputs.input_ids, inputs.positions, inputs.logit_rows)
            if inputs.pooled:
                gather(inputs.pooled, hidden[-1][0])
            self.model.mixers.save()
            return without_unknown_ids(logits, inputs.vocab_sizes)

    def check(self) -> float:
        """Compare the finished engine with the untouched model. Overwrites the first blocks.

        Returns the RMS difference of logits relative to their spread. Raises BadRequest if it is too large.
        """
        check, error = self.model.check, self._difference()
        assert check is not None
        limit = check.limit(self.model.dtype)
        if self.model.kv_dtype == torch.int8:
            limit = max(limit, CODED_LIMIT)
        if not error < limit:
            kept = f"; at an earlier start they were as stored in {check.origin}" if check.origin else ""
            raise BadRequest(
                f"model type {self.model.module.config.model_type} cannot be served: its logits are off by {error:.2g} "
                f"of their spread (limit {limit:.2g}){kept}"
            )
        return error

    def _difference(self) -> float:
        """Return the difference between the model as run here and the untouched one, as `spread_of` computes it."""
        return self.model.packed_difference(self.num_blocks, self.num_states)


def without_unknown_ids(logits: Tensor, vocab_sizes: Tensor | None) -> Tensor:
    """Return logits [n, V] set to -inf from each row's vocabulary size on. vocab_sizes: int64 [n]; None: unchanged."""
    if vocab_sizes is None:
        return logits
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return logits.masked_fill(ids >= vocab_sizes[:, None], -torch.inf)


def state_batch(step: StepRows, saves: Mapping[Sequence, dict[int, int]], device: torch.device) -> StateBatch:
    """Return the runs of a step. saves: for each sequence, positions after which states are saved, and the slots."""
    rows: list[tuple[int, int, int]] = []
    runs: list[Run] = []
    copies: list[tuple[int, int]] = []
    for seq, num, first in zip(step.seqs, step.num_new.tolist(), step.starts.tolist(), strict=True):
        read, write, wanted = seq.state_read, seq.state_slots[0], saves.get(seq, {})
        if num == 1 and seq.num_computed >= seq.num_prompt:
            rows.append((first, read, write))
            copies += [(write, slot) for slot in wanted.values()]
            continue
        offset, start = first - seq.num_computed, first
        for end in sorted({*(position + offset for position in wanted), first + num}):
            num_prompt = min(max(seq.num_prompt + offset - start, 0), end - start)
            runs.append(Run(start, end, read, write, num_prompt, wanted.get(end - offset, -1)))
            start, read = end, write
    return StateBatch.of(rows, runs, copies, device)


def group_by_adapter(
    requests: Iterable[EngineRequest], extras: Mapping[str, Extras]
) -> dict[tuple[str, float], list[int]]:
    """Return the indexes of requests whose adapter has extras, grouped by digest and adapter scale."""
    groups: dict[tuple[str, float], list[int]] = {}
    for i, request in enumerate(requests):
        if request.digest in extras:
            groups.setdefault((request.digest, request.lora_scale), []).append(i)
    return groups

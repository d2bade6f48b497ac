"""Steps captured once and replayed: which steps, their padding, and their input tensors.

This module is independent of CUDA: a `GraphRecorder` (`capture.py` on a GPU) captures the device work of a step and
repeats it. A capture fixes everything except the content of tensors, so all inputs that change are written into tensors
that never move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from gpu_worker.memory import host_tensor
from gpu_worker.model.model import BaseModel
from lora_kernels import ops
from lora_kernels.segments import LARGE_TILE_ROWS_PER_SEGMENT

Replay = Callable[[], object]


class GraphRecorder(Protocol):
    """Captures steps, so that they can be replayed without launching each kernel."""

    def record(self, step: Callable[[], object]) -> Replay:
        """Run a step; return a function that repeats it on the same tensors. Raises Unrecordable."""
        ...


class Unrecordable(Exception):
    """A model's step waits for the device, so that a capture would freeze the values that the host read."""


MIXED_TOKENS = (64, 128, 192, 256, 384, 512)
"""Numbers of tokens for which steps with prompts are captured.

A longer step keeps the device busy longer than its launches take, and padding it would cost more.
"""

FEW_SEQS = 8
"""Sequences of a small mixed step. With few sequences, attention splits the keys of decodes into more parts."""

Tiles = Literal["none", "small", "large"]
"""Size of a step's tiles of LoRA rows, as `triton_ops.lora` chooses it; "none": no row has an adapter."""


@dataclass(frozen=True, slots=True)
class StepLists:
    """The inputs of a step on the host: S sequences, T tokens, of which n go through the head."""

    input_ids: np.ndarray  # int64 [T]
    query_lens: np.ndarray  # int64 [S], tokens of each sequence
    kv_lens: np.ndarray  # int64 [S], tokens computed after the step
    block_tables: np.ndarray  # int32 [S, blocks]
    slots: np.ndarray  # int32 [T], adapter slot, -1 for the base model
    scales: np.ndarray  # float32 [T], each request's scale on its adapter
    rows: np.ndarray  # int64 [n], tokens that go through the head

    def padded_decodes(self, size: int, dummy_block: int) -> StepLists:
        """Return a decode step padded to `size` sequences; the added ones have no adapter.

        Their only key goes to dummy_block, which no other sequence reads.
        """
        return self._padded(np.ones(size - len(self.kv_lens), np.int64), size, dummy_block)

    def padded(self, num_tokens: int, num_seqs: int, dummy_block: int) -> StepLists:
        """Return the step padded by one sequence that has all missing tokens, and by empty sequences.

        `num_seqs` must leave a place for it, unless no token is missing. Its keys overwrite each other in dummy_block.
        The first token goes through the head once per missing row.
        """
        query_lens = np.zeros(num_seqs - len(self.kv_lens), np.int64)
        query_lens[:1] = num_tokens - len(self.input_ids)
        return self._padded(query_lens, num_seqs, dummy_block)

    def _padded(self, query_lens: np.ndarray, num_rows: int, dummy_block: int) -> StepLists:
        num_seqs, num_tokens = len(query_lens), int(query_lens.sum())
        kv_lens = np.maximum(query_lens, 1)
        width = max(self.block_tables.shape[1], -(-int(kv_lens.max(initial=1)) // ops.BLOCK_TOKENS))
        tables = np.full((len(self.kv_lens) + num_seqs, width), dummy_block, np.int32)
        tables[: len(self.kv_lens), : self.block_tables.shape[1]] = self.block_tables
        return StepLists(
            np.pad(self.input_ids, (0, num_tokens)),
            np.concatenate((self.query_lens, query_lens)),
            np.concatenate((self.kv_lens, kv_lens)),
            tables,
            np.pad(self.slots, (0, num_tokens), constant_values=-1),
            np.pad(self.scales, (0, num_tokens), constant_values=1),
            np.pad(self.rows, (0, num_rows - len(self.rows))),
        )

    @property
    def tiles(self) -> Tiles:
        """The size of the step's LoRA tiles."""
        adapted = self.slots[self.slots >= 0]
        if not len(adapted):
            return "none"
        return "large" if len(adapted) >= LARGE_TILE_ROWS_PER_SEGMENT * len(np.unique(adapted)) else "small"


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Return the numbers of sequences for which decode steps are captured, ascending.

    They are few, yet close enough that padding to the next one is cheap.
    """
    sizes = [1, 2, 4, *range(8, min(max_num_seqs, 256), 8), *range(256, max_num_seqs, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def mixed_sizes(max_num_seqs: int, most_tokens: int) -> list[tuple[int, int]]:
    """Return the (tokens, sequences) for which other steps are captured, ascending, including a place for padding.

    most_tokens: maximum tokens of a step, and of a sequence. 0: none are captured.
    """
    tokens = [num for num in MIXED_TOKENS if num < most_tokens] + [min(most_tokens, MIXED_TOKENS[-1])]
    seqs = sorted({min(FEW_SEQS, max_num_seqs) + 1, max_num_seqs + 1})
    return [(num, places) for num in sorted(set(tokens)) for places in seqs] if most_tokens else []


def choose_size(sizes: Sequence[int], num_new: np.ndarray, complete: np.ndarray) -> int | None:
    """Return the smallest captured size that fits a step of decodes, None for any other step.

    num_new: int [S], tokens of each sequence. complete: bool [S], whether its next token can be chosen afterwards.
    """
    if (num_new != 1).any() or not complete.all():  # prompts or draft tokens, which vary in length
        return None
    return next((size for size in sizes if size >= len(num_new)), None)


class StepGraph:
    """Steps of one padded size: their input and output tensors, and their captures."""

    def __init__(
        self, model: BaseModel, num_tokens: int, block_tables: Tensor, dummy_block: int, *, decodes: bool
    ) -> None:
        """block_tables: int32 [sequences, max_blocks]; graphs of other sizes may share it.

        decodes: whether every sequence has one token, which goes through the head.
        """
        self.num_tokens, self.num_seqs = num_tokens, len(block_tables)
        device = block_tables.device
        self.input_ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self.attention = ops.recordable_attention_batch(block_tables, num_tokens)
        self.lora = ops.recordable_lora_batch(num_tokens, device)
        # All rows of a decode go through the head, so one list serves both.
        self.lora_logits = self.lora if decodes else ops.recordable_lora_batch(self.num_seqs, device)
        self.rows = torch.zeros(self.num_seqs, dtype=torch.int64, device=device)
        if decodes:
            torch.arange(self.num_seqs, out=self.rows)
        self._model, self._dummy_block, self._decodes = model, dummy_block, decodes
        self._kinds: tuple[Tiles, ...] = ("small", "none") if decodes else ("large", "small", "none")
        self._logits = torch.empty(0)
        self._replays: dict[Tiles, Replay] = {}
        self._num_rows = 0  # rows of the step currently in the tensors
        self._tiles: Tiles = "none"

    def forward(self, tiles: Tiles) -> Tensor:
        """Compute the step in the tensors; return the logits [rows, V]."""
        context = self._model.context
        context.attention = self.attention
        lora = self.lora
        if tiles == "large":  # enough rows per segment to select these tiles
            lora = replace(lora, num_rows=LARGE_TILE_ROWS_PER_SEGMENT * lora.num_segments)
        context.lora, context.lora_logits = (None, None) if tiles == "none" else (lora, self.lora_logits)
        context.extras, context.extras_logits = [], []
        with torch.inference_mode():
            return self._model.forward(self.input_ids, self.attention.positions, self.rows)

    def record(self, recorder: GraphRecorder, logits: Tensor) -> None:
        """Capture the step with and without adapters; all captures write to logits [rows, V]. Raises Unrecordable."""
        self._logits = logits

        def step(tiles: Tiles) -> None:
            logits.copy_(self.forward(tiles))

        for tiles in self._kinds:
            self._replays[tiles] = recorder.record(partial(step, tiles))

    def fill(self, lists: StepLists) -> None:
        """Overwrite the tensors with a step's inputs. The host does not wait for the device."""
        device = self.input_ids.device
        self._num_rows, tiles = len(lists.rows), lists.tiles
        self._tiles = "small" if self._decodes and tiles == "large" else tiles
        if self._decodes:
            lists = lists.padded_decodes(self.num_seqs, self._dummy_block)
        else:
            lists = lists.padded(self.num_tokens, self.num_seqs, self._dummy_block)
            self.rows.copy_(host_tensor(lists.rows, device), non_blocking=True)
        self.input_ids.copy_(host_tensor(lists.input_ids, device), non_blocking=True)
        ops.build_attention_batch(lists.query_lens, lists.kv_lens, lists.block_tables, device, into=self.attention)
        if self._tiles == "none":
            return
        ops.build_lora_batch(lists.slots, device, lists.scales, into=self.lora)
        if not self._decodes:
            slots, scales = lists.slots[lists.rows], lists.scales[lists.rows]
            slots[self._num_rows :] = -1
            if ops.build_lora_batch(slots, device, scales, into=self.lora_logits) is None:
                self.lora_logits.buffer.zero_()

    def replay(self) -> Tensor:
        """Compute the step last filled in. Return its logits [n, V], valid until the next replay of any size."""
        self._replays[self._tiles]()
        return self._logits[: self._num_rows]


class StepGraphs:
    """The captured steps of a model: decodes by number of sequences, others by numbers of tokens and sequences."""

    def __init__(
        self, model: BaseModel, max_num_seqs: int, max_blocks: int, dummy_block: int, max_step_tokens: int = 0
    ) -> None:
        """max_blocks: maximum KV blocks per sequence. dummy_block: one that belongs to no sequence.

        max_step_tokens: maximum tokens of a step; 0: capture only decodes.
        """
        self.sizes = graph_sizes(max_num_seqs)
        most = min(max_step_tokens, max_blocks * ops.BLOCK_TOKENS)
        tables = torch.full((max_num_seqs + 1, max_blocks), dummy_block, dtype=torch.int32, device=model.device)
        self._decodes = {size: StepGraph(model, size, tables[:size], dummy_block, decodes=True) for size in self.sizes}
        self._mixed = [
            StepGraph(model, num_tokens, tables[:num_seqs], dummy_block, decodes=False)
            for num_tokens, num_seqs in mixed_sizes(max_num_seqs, most)
        ]

    def record(self, recorder: GraphRecorder) -> None:
        """Capture all steps. Raises Unrecordable."""
        # All sizes share one logits tensor: otherwise each capture would own memory for its output.
        graphs = [*reversed(self._mixed), *(self._decodes[size] for size in reversed(self.sizes))]
        largest = max(graphs, key=lambda graph: graph.num_seqs)
        logits = torch.zeros_like(largest.forward("none"))
        for graph in graphs:  # largest first: smaller ones reuse their memory
            graph.record(recorder, logits[: graph.num_seqs])

    def find(self, num_new: np.ndarray, complete: np.ndarray, num_rows: int) -> StepGraph | None:
        """Return the graph that can replay a step, None if there is none.

        num_new, complete: as in `choose_size`. num_rows: tokens that go through the head.
        """
        size = choose_size(self.sizes, num_new, complete)
        if size is not None:
            return self._decodes[size]
        num_tokens, places = int(num_new.sum()), max(len(num_new) + 1, num_rows)
        return next((one for one in self._mixed if one.num_tokens >= num_tokens and one.num_seqs >= places), None)

"""Decode steps recorded once and replayed: which steps those are, how they are padded, where their inputs are.

Nothing here knows CUDA: a `GraphRecorder` (`capture.py` on a GPU) keeps what a step did to the device and does it
again. A recording fixes everything but the content of tensors, so all that changes from step to step is written into
tensors that never move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gpu_worker.memory import host_tensor
from gpu_worker.model.model import BaseModel
from lora_kernels import ops

Replay = Callable[[], object]


class GraphRecorder(Protocol):
    """Records steps, so that they can be replayed without launching each of their kernels."""

    def record(self, step: Callable[[], object]) -> Replay:
        """Run a step and return a function that does the same to the same tensors again. Raises Unrecordable."""
        ...


class Unrecordable(Exception):
    """A model's step waits for the device, so that a recording would keep what the host read when it was made."""


@dataclass(frozen=True, slots=True)
class DecodeLists:
    """The inputs of a step in which every sequence computes one token, on the host."""

    input_ids: np.ndarray  # int64 [S]
    kv_lens: np.ndarray  # int64 [S] tokens computed after the step
    block_tables: np.ndarray  # int32 [S, blocks]
    slots: np.ndarray  # int32 [S] adapter slot, -1 for the base model
    scales: np.ndarray  # float32 [S] each request's factor on its adapter

    def padded(self, size: int, dummy_block: int) -> DecodeLists:
        """Return the step with sequences added up to `size`: of one token each, without an adapter.

        Their only key goes to dummy_block, which nobody else reads.
        """
        num = size - len(self.input_ids)
        tables = np.pad(self.block_tables, ((0, num), (0, 0)))
        tables[size - num :, 0] = dummy_block
        return DecodeLists(
            np.pad(self.input_ids, (0, num)),
            np.pad(self.kv_lens, (0, num), constant_values=1),
            tables,
            np.pad(self.slots, (0, num), constant_values=-1),
            np.pad(self.scales, (0, num), constant_values=1),
        )


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Return the numbers of sequences to record steps for, ascending.

    They are few, yet so close that padding to the next one costs little.
    """
    sizes = [1, 2, 4, *range(8, min(max_num_seqs, 256), 8), *range(256, max_num_seqs, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def choose_size(sizes: Sequence[int], num_new: np.ndarray, complete: np.ndarray) -> int | None:
    """Return the smallest recorded size that holds a step, None for a step that cannot be replayed.

    num_new: int [S] tokens of each sequence; complete: bool [S], whether its next token can be chosen afterwards.
    """
    if (num_new != 1).any() or not complete.all():  # prompts or draft tokens, which have any length
        return None
    return next((size for size in sizes if size >= len(num_new)), None)


class DecodeGraph:
    """Decode steps of one number of sequences: the tensors that they read and write, and their recordings."""

    def __init__(self, model: BaseModel, block_tables: Tensor, dummy_block: int) -> None:
        """block_tables: int32 [size, max_blocks]; graphs of other sizes may share it."""
        self.size = len(block_tables)
        device = block_tables.device
        self.input_ids = torch.zeros(self.size, dtype=torch.int64, device=device)
        self.attention = ops.recordable_attention_batch(block_tables)
        self.lora = ops.recordable_lora_batch(self.size, device)
        self.rows = torch.arange(self.size, device=device)
        self._model = model
        self._dummy_block = dummy_block
        self._logits = torch.empty(0)
        self._replays: dict[bool, Replay] = {}  # by whether any row has an adapter
        self._num_seqs = 0  # of the step that the tensors hold
        self._with_adapters = False

    def forward(self, *, with_adapters: bool) -> Tensor:
        """Compute the step that the tensors hold: logits [size, V]."""
        context = self._model.context
        context.attention = self.attention
        # Every row goes through the head, so one list serves both.
        context.lora = context.lora_logits = self.lora if with_adapters else None
        context.extras, context.extras_logits = [], []
        with torch.inference_mode():
            return self._model.forward(self.input_ids, self.attention.positions, self.rows)

    def record(self, recorder: GraphRecorder, logits: Tensor) -> None:
        """Record the step with adapters and the one without. Both write to logits [size, V]. Raises Unrecordable."""
        self._logits = logits

        def step(with_adapters: bool) -> None:
            logits.copy_(self.forward(with_adapters=with_adapters))

        for with_adapters in (True, False):
            self._replays[with_adapters] = recorder.record(partial(step, with_adapters))

    def fill(self, lists: DecodeLists) -> None:
        """Write a step's inputs over the last one's. The host does not wait for the device."""
        device = self.input_ids.device
        self._num_seqs = len(lists.input_ids)
        lists = lists.padded(self.size, self._dummy_block)
        self.input_ids.copy_(host_tensor(lists.input_ids, device), non_blocking=True)
        ones = np.ones(self.size, np.int64)
        ops.build_attention_batch(ones, lists.kv_lens, lists.block_tables, device, into=self.attention)
        found = ops.build_lora_batch(lists.slots, device, lists.scales, into=self.lora)
        self._with_adapters = found is not None

    def replay(self) -> Tensor:
        """Compute the step last filled in. Returns logits [S, V], valid until the next replay of any size."""
        self._replays[self._with_adapters]()
        return self._logits[: self._num_seqs]


class DecodeGraphs:
    """The recorded decode steps of a model, by padded number of sequences."""

    def __init__(self, model: BaseModel, max_num_seqs: int, max_blocks: int, dummy_block: int) -> None:
        """max_blocks: most KV blocks of one sequence. dummy_block: one that belongs to no sequence."""
        self.sizes = graph_sizes(max_num_seqs)
        tables = torch.full((max_num_seqs, max_blocks), dummy_block, dtype=torch.int32, device=model.device)
        self._graphs = {size: DecodeGraph(model, tables[:size], dummy_block) for size in self.sizes}

    def record(self, recorder: GraphRecorder) -> None:
        """Record all steps. Raises Unrecordable."""
        # All sizes share one tensor of logits: each recording's own outputs would keep memory of their own.
        logits = torch.zeros_like(self._graphs[self.sizes[-1]].forward(with_adapters=False))
        for size in reversed(self.sizes):  # largest first: the smaller ones reuse its memory
            self._graphs[size].record(recorder, logits[:size])

    def find(self, num_new: np.ndarray, complete: np.ndarray) -> DecodeGraph | None:
        """Return the graph that replays a step, None if none does. Arguments as in `choose_size`."""
        size = choose_size(self.sizes, num_new, complete)
        return None if size is None else self._graphs[size]

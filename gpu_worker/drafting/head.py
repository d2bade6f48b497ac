"""The common base of heads: they continue from the base's hidden states, and store one per token of a text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu_worker.layers.attention import AttentionCall, PagedLayer
from gpu_worker.loading.checkpoint import head_dim_of
from gpu_worker.memory import zeros
from gpu_worker.model.model import BaseModel
from lora_kernels import ops
from protocol.wire.errors import BadRequest


class BaseHead(ABC):
    """A head with its cache; `DraftModel` runs it like a draft model.

    For each token, the cache holds keys, values and the hidden state that is read with it: the base's for the previous
    token, or the head's own for draft tokens.
    """

    def __init__(self, base: BaseModel, layer: PagedLayer, width: int, max_positions: int) -> None:
        """layer: its only attention. width: size of a hidden state."""
        self.device = base.device
        self.dtype = base.dtype
        self.vocab_size = base.vocab_size
        self.max_positions = max_positions
        self.context = layer.context
        self.outputs = torch.empty(0)  # hidden states [S, D] of the last pass
        self._layer = layer
        self._width = width
        self._hidden = torch.empty(0)  # [slots, D]

    @abstractmethod
    def taking(self) -> AbstractContextManager[list[Tensor]]:
        """Return a context that collects the base's hidden states of a step's tokens."""

    @abstractmethod
    def project(self, states: list[Tensor]) -> Tensor:
        """Return the hidden states [T, D] to store, from the collected ones."""

    @abstractmethod
    def run(self, ids: Tensor, positions: Tensor, hidden: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the hidden states [rows, D] and the logits for tokens, int64 [T] each, and their hidden states [T, D].

        rows: int64 [rows], those needed; None: all T. May overwrite `hidden`.
        """

    def base_ids(self, ids: list[int]) -> list[int]:
        """Return the base's ids of tokens; they differ if the head has its own vocabulary."""
        return ids

    @property
    def block_bytes(self) -> int:
        """Size of a block of its cache, in bytes."""
        return self._layer.block_bytes(self.dtype) + ops.BLOCK_TOKENS * self._width * self.dtype.itemsize

    def allocate(self, num_blocks: int) -> None:
        """Allocate the cache, with a spare block for passes whose results are discarded."""
        self._layer.allocate(num_blocks + 1, self.dtype, self.device)
        self._hidden = zeros(((num_blocks + 1) * ops.BLOCK_TOKENS, self._width), self.dtype, self.device)

    def put(self, slots: Tensor, hidden: Tensor) -> None:
        """Store hidden states [n, D], to be read with the tokens in cache slots int64 [n]."""
        self._hidden.index_copy_(0, slots, hidden)

    def forward(self, input_ids: Tensor, position_ids: Tensor, logit_rows: Tensor | None) -> Tensor:
        """Run the pass that the context describes, like `BaseModel`; return the logits [rows, V]."""
        batch = self.context.attention
        assert batch is not None
        hidden = self._hidden.index_select(0, batch.slot_mapping.long())
        self.outputs, logits = self.run(input_ids, position_ids, hidden, logit_rows)
        return logits


def check_device(base: BaseModel) -> None:
    """Raise BadRequest unless the base is on a CPU: captured CUDA graphs do not expose hidden states."""
    if base.device.type != "cpu":
        raise BadRequest(f"it is a head of the base, which is served on a CPU only; the device is {base.device.type}")


def attention_call(module: nn.Module, config: Any) -> AttentionCall:
    """Return the parameters of a head's attention. module: the module that calls attention, if transformers does."""
    head_dim = head_dim_of(config)
    return AttentionCall(
        module,
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim,
        head_dim,
        window=0,
        scale=head_dim**-0.5,
        softcap=0.0,
        sinks=None,
        is_causal=True,
        mask=None,
        kv=None,
    )


def embedding(base: BaseModel, own: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Return the embedding of a head: its own, or else the base's without changes by adapters."""
    if own is not None:
        return lambda ids: F.embedding(ids, own)
    module: Any = base.module.get_input_embeddings()
    return lambda ids: type(module).forward(module, ids)

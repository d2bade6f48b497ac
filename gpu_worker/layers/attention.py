"""Paged attention inside a Hugging Face model: the function registered with transformers' AttentionInterface.

The model calls it with the step's queries, keys and values. Their places in the cache are in the `StepContext` of the
calling module's `PagedLayer`. No mask function is registered, so transformers builds no mask: the paged cache provides
causality, windows and sequence boundaries. No `Cache` object is passed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from gpu_worker.layers.apply_extras import ExtraRows
from gpu_worker.memory import zeros
from lora_kernels import kv_codes, ops

ATTENTION = "lorafleet"
_SLOT = "_lorafleet_layer"


@dataclass(slots=True)
class StepContext:
    """The step's work lists, set before each forward pass; every layer of the model reads them from here."""

    attention: ops.AttentionBatch | None = None
    lora: ops.LoraBatch | None = None  # None: no token of the step has an adapter
    lora_logits: ops.LoraBatch | None = None  # like `lora`, for the rows that go through the head
    extras: list[ExtraRows] = field(default_factory=list)  # tokens whose adapters have extras
    extras_logits: list[ExtraRows] = field(default_factory=list)  # like `extras`, for the rows that go through the head
    expert_slots: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """Bool [num_slots]: whether the slot's adapter has rows for experts in the pool. Empty if the pool has none."""

    of_all: Callable[[int], tuple[ops.LoraBatch | None, list[ExtraRows]]] | None = None
    """Replaces the above in unbatched passes, where all rows are of one text: returns LoRA and extras for a layer with
    the given number of rows. None: layers use the step's rows."""

    @property
    def has_expert_rows(self) -> bool:
        """Whether an adapter of the step has rows for experts."""
        return self.lora is not None and self.are_expert_rows(self.lora.host_slots)

    def are_expert_rows(self, slots: np.ndarray) -> bool:
        """Return whether an adapter in one of these slots, int [n], has rows for experts; -1 means no adapter."""
        return len(self.expert_slots) > 0 and bool(self.expert_slots[slots[slots >= 0]].any())


@dataclass(slots=True)
class AttentionCall:
    """The parameters of a module's attention call, seen in a trial run."""

    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int
    scale: float
    softcap: float
    sinks: Tensor | None
    is_causal: bool
    mask: Tensor | None  # mask passed by the model; None after the trial
    kv: tuple[Tensor, Tensor] | None  # keys and values, whose identity shows which calls share them; see `make_layers`
    chunk: int = 0  # queries see only keys in their own chunk of this many positions; 0: no chunks
    has_own_mask: bool = False  # whether it got a mask that transformers did not make for our attention

    @property
    def widths(self) -> list[int]:
        """Widths of a token's queries, keys and values, over all heads."""
        return [self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.value_dim]


class AttentionLayer(Protocol):
    """An object that computes the attention of a module."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, sinks: Tensor | None) -> Tensor:
        """Return the attention [T, Hq, Dv] of the step's q [T, Hq, D], k [T, Hkv, D] and v [T, Hkv, Dv]."""
        ...


class PagedLayer:
    """The attention of one call in each step, with its part of the KV cache."""

    def __init__(
        self,
        call: AttentionCall,
        context: StepContext,
        impl: ops.Impl | None,
        owner: PagedLayer | None = None,
        index: int = 0,
    ) -> None:
        """owner: the layer called with the same keys and values, whose cache is shared.

        index: among the model's layers.
        """
        self.index = index
        self.call = call
        self.context = context
        self.impl: ops.Impl | None = impl
        self.owner = owner
        self.handle: Tensor | None = None  # key by which compiled layers find it, see `compiled.py`
        self.k_cache: Tensor | None = None  # [blocks, Hkv, 16, D], or int8 in the format of lora_kernels.kv_codes
        self.v_cache: Tensor | None = None  # [blocks, Hkv, 16, Dv]

    def block_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of one block of this layer's cache in a dtype; 0 if it shares another layer's."""
        if self.owner is not None:
            return 0
        return ops.BLOCK_TOKENS * self.call.num_kv_heads * sum(self._row_widths(dtype)) * dtype.itemsize

    def _row_widths(self, dtype: torch.dtype) -> list[int]:
        return [kv_codes.row_width(dim, dtype) for dim in (self.call.head_dim, self.call.value_dim)]

    def allocate(self, num_blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate the cache, or share the owner's, which must be allocated already.

        On a CPU a block's values follow its keys in memory: longer runs are read faster.
        """
        if self.owner is not None:
            self.k_cache, self.v_cache = self.owner.k_cache, self.owner.v_cache
            return
        call = self.call
        rows, widths = call.num_kv_heads * ops.BLOCK_TOKENS, self._row_widths(dtype)
        if device.type == "cpu":
            parts = zeros((num_blocks, rows * sum(widths)), dtype, device).split([rows * n for n in widths], dim=1)
        else:
            parts = [zeros((num_blocks, rows * n), dtype, device) for n in widths]
        shape = (num_blocks, call.num_kv_heads, ops.BLOCK_TOKENS)
        self.k_cache, self.v_cache = (part.view(*shape, n) for part, n in zip(parts, widths, strict=True))

    @property
    def attention(self) -> ops.PagedAttention:
        """The attention as input of a whole-layer operation. The cache must be allocated."""
        call, k_cache, v_cache = self.call, self.k_cache, self.v_cache
        assert k_cache is not None
        assert v_cache is not None
        return ops.PagedAttention(
            call.num_heads, call.num_kv_heads, call.head_dim, call.value_dim, call.window, call.scale, call.softcap,
            call.sinks, k_cache, v_cache,
        )  # fmt: skip

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, sinks: Tensor | None) -> Tensor:
        """Write the step's k [T, Hkv, D] and v [T, Hkv, Dv] to the cache; return the attention [T, Hq, Dv] of q.

        q: [T, Hq, D]. sinks: [Hq]. See `ops.paged_attention`. Raises RuntimeError before a step's work list is set.
        """
        batch = self.context.attention
        if batch is None or self.k_cache is None or self.v_cache is None:
            raise RuntimeError("attention was called before the step's work list and the cache were there")
        if self.owner is None:
            if self.context.extras:
                k, v = self._with_prefixes(k, v, batch.positions)
            ops.kv_write_(k, v, self.k_cache, self.v_cache, batch, impl=self.impl)
        return ops.paged_attention(
            q, self.k_cache, self.v_cache, batch,
            scale=scale, window=self.call.window, softcap=softcap, sinks=sinks, impl=self.impl,
        )  # fmt: skip

    def _with_prefixes(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the step's keys and values, with adapters' own at their virtual tokens.

        k [T, Hkv, D], v [T, Hkv, Dv]: as computed, not changed. positions: int64 [T].
        """
        for group in self.context.extras:
            prefix = group.extras.prefix
            if prefix is not None:
                keys, values = prefix[self.index][:, positions[group.rows]].to(k.dtype)
                k, v = k.index_copy(0, group.rows, keys), v.index_copy(0, group.rows, values)
        return k, v


class LoopedAttention:
    """The attention layers of a module that a looped model calls several times per forward pass."""

    def __init__(self, layers: list[PagedLayer], context: StepContext) -> None:
        """layers: one per call, in order."""
        self.layers = layers
        self.context = context
        self._batch: ops.AttentionBatch | None = None
        self._next = 0

    def take(self) -> PagedLayer:
        """Return the layer for the next call in this step."""
        if self.context.attention is not self._batch:
            self._batch, self._next = self.context.attention, 0
        layer = self.layers[self._next % len(self.layers)]
        self._next += 1
        return layer


class AttentionRecorder:
    """Collects the attention calls of a trial run, in order."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def record(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> None:
        """Record a call. q, k, v: [1, heads, T, D]. options: transformers' other arguments, by name."""
        self.calls.append(
            AttentionCall(
                module=module,
                num_heads=q.shape[1],
                num_kv_heads=k.shape[1],
                head_dim=q.shape[3],
                value_dim=v.shape[3],
                window=options.get("sliding_window") or 0,
                scale=q.shape[3] ** -0.5 if options.get("scaling") is None else options["scaling"],
                softcap=options.get("softcap") or 0.0,
                sinks=options.get("s_aux"),
                is_causal=options.get("is_causal", getattr(module, "is_causal", True)) is not False,
                mask=options["attention_mask"],
                kv=(k, v),
            )
        )


def bind(module: nn.Module, layer: AttentionLayer | LoopedAttention | AttentionRecorder) -> None:
    """Make `paged_attention_forward` use `layer` for calls from `module`, until `unbind`."""
    module.__dict__[_SLOT] = layer


def make_layers(calls: list[AttentionCall], context: StepContext, impl: ops.Impl | None) -> list[PagedLayer]:
    """Create a layer for each attention call of a trial run, in order, and bind the calling modules to them."""
    layers: list[PagedLayer] = []
    owners: dict[tuple[int, int], PagedLayer] = {}
    by_module: dict[nn.Module, list[PagedLayer]] = {}
    for call in calls:
        assert call.kv is not None
        key = (id(call.kv[0]), id(call.kv[1]))
        layer = PagedLayer(call, context, impl, owners.get(key), len(layers))
        owners.setdefault(key, layer)
        layers.append(layer)
        by_module.setdefault(call.module, []).append(layer)
    for call in calls:
        call.kv = None
    for module, own in by_module.items():
        bind(module, own[0] if len(own) == 1 else LoopedAttention(own, context))
    return layers


def bound_to(module: nn.Module) -> PagedLayer | LoopedAttention | AttentionRecorder | None:
    """Return the object bound to a module, None if there is none."""
    return module.__dict__.get(_SLOT)


def unbind(module: nn.Module) -> None:
    """Undo `bind`."""
    module.__dict__.pop(_SLOT, None)


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend over the paged cache: the function that transformers calls.

    query: [1, Hq, T, D]. key: [1, Hkv, T, D]. value: [1, Hkv, T, Dv]. Returns [1, T, Hq, Dv], and None for the weights.
    In a trial run, the call is recorded instead and zeros are returned.
    """
    layer = module.__dict__[_SLOT]
    if type(layer) is AttentionRecorder:
        layer.record(module, query, key, value, {"attention_mask": attention_mask, "scaling": scaling, **kwargs})
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    if type(layer) is LoopedAttention:
        layer = layer.take()
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    softcap, sinks = kwargs.get("softcap") or 0.0, kwargs.get("s_aux")
    if torch.compiler.is_compiling():
        attend = torch.ops.lorafleet_layers.attend
        return attend(q, k, v, layer.handle, scale, softcap, sinks, v.shape[2])[None], None
    return layer.attend(q, k, v, scale, softcap, sinks)[None], None


AttentionInterface.register(ATTENTION, paged_attention_forward)

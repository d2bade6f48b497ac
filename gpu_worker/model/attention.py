"""Paged attention inside a Hugging Face model: the function registered with its AttentionInterface.

The model calls it with the step's queries, keys and values; where they belong is in the `StepContext` that the layer's
`PagedLayer` points to. No mask function is registered: transformers then builds no mask, and causality, windows and
sequence borders come from the paged cache. No `Cache` object is passed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from gpu_worker.adapters.extras import ExtraRows
from gpu_worker.memory import zeros
from lora_kernels import ops

ATTENTION = "lorafleet"
_SLOT = "_lorafleet_layer"


@dataclass(slots=True)
class StepContext:
    """The step's work lists, set before each forward pass; every layer of the model reads them here."""

    attention: ops.AttentionBatch | None = None
    lora: ops.LoraBatch | None = None  # None: no token of the step has an adapter
    lora_logits: ops.LoraBatch | None = None  # the same for the rows that go through the head
    extras: list[ExtraRows] = field(default_factory=list)  # tokens whose adapters do more than plain LoRA
    extras_logits: list[ExtraRows] = field(default_factory=list)


@dataclass(slots=True)
class AttentionCall:
    """How a layer calls attention, seen in a trial run."""

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
    mask: Tensor | None  # as it was given, forgotten after the trial
    kv: (
        tuple[Tensor, Tensor] | None
    )  # kept until layers are made, so that a layer given another's keys and values can be told by identity
    chunk: int = 0  # queries see only keys of their own chunk of that many positions; 0: there are no chunks
    has_own_mask: bool = False  # one that transformers did not make for it

    @property
    def widths(self) -> list[int]:
        """Entries of a token's queries, keys and values."""
        return [self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.value_dim]


class AttentionLayer(Protocol):
    """What a module's attention is done by."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, sinks: Tensor | None) -> Tensor:
        """Attend with the step's q [T, Hq, D], k [T, Hkv, D] and v [T, Hkv, Dv]: [T, Hq, Dv]."""
        ...


class PagedLayer:
    """One attention call's share of the KV cache."""

    def __init__(
        self, call: AttentionCall, context: StepContext, impl: ops.Impl | None, owner: PagedLayer | None = None
    ) -> None:
        """owner: the layer whose keys and values this one is given too; they are kept once."""
        self.call = call
        self.context = context
        self.impl: ops.Impl | None = impl
        self.owner = owner
        self.handle: Tensor | None = None  # how compiled layers name it, see `compiled.py`
        self.k_cache: Tensor | None = None  # [blocks, Hkv, 16, D]
        self.v_cache: Tensor | None = None  # [blocks, Hkv, 16, Dv]

    def block_bytes(self, dtype: torch.dtype) -> int:
        if self.owner is not None:
            return 0
        call = self.call
        return ops.BLOCK_TOKENS * call.num_kv_heads * (call.head_dim + call.value_dim) * dtype.itemsize

    def allocate(self, num_blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make room for blocks; of a shared cache its owner must have done so before."""
        if self.owner is not None:
            self.k_cache, self.v_cache = self.owner.k_cache, self.owner.v_cache
            return
        call = self.call
        shape = (num_blocks, call.num_kv_heads, ops.BLOCK_TOKENS)
        self.k_cache = zeros((*shape, call.head_dim), dtype, device)
        self.v_cache = zeros((*shape, call.value_dim), dtype, device)

    @property
    def attention(self) -> ops.PagedAttention:
        """What an operation over whole layers needs to know of this one. The cache must be there."""
        call, k_cache, v_cache = self.call, self.k_cache, self.v_cache
        assert k_cache is not None
        assert v_cache is not None
        return ops.PagedAttention(
            call.num_heads, call.num_kv_heads, call.head_dim, call.value_dim, call.window, call.scale, call.softcap,
            call.sinks, k_cache, v_cache,
        )  # fmt: skip

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, sinks: Tensor | None) -> Tensor:
        """Write the step's k [T, Hkv, D] and v [T, Hkv, Dv], attend with q [T, Hq, D]: [T, Hq, Dv]."""
        batch = self.context.attention
        if batch is None or self.k_cache is None or self.v_cache is None:
            raise RuntimeError("attention was called before the step's work list and the cache were there")
        if self.owner is None:
            ops.kv_write_(k, v, self.k_cache, self.v_cache, batch, impl=self.impl)
        return ops.paged_attention(
            q, self.k_cache, self.v_cache, batch,
            scale=scale, window=self.call.window, softcap=softcap, sinks=sinks, impl=self.impl,
        )  # fmt: skip


class Turns:
    """The layers of a module that calls attention several times in one forward pass, as a looped model does."""

    def __init__(self, layers: list[PagedLayer], context: StepContext) -> None:
        self.layers = layers
        self.context = context
        self._batch: ops.AttentionBatch | None = None
        self._next = 0

    def take(self) -> PagedLayer:
        """Return the layer of the next call of this step."""
        if self.context.attention is not self._batch:
            self._batch, self._next = self.context.attention, 0
        layer = self.layers[self._next % len(self.layers)]
        self._next += 1
        return layer


class Recorder:
    """Collects the attention calls of a trial run, in order."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> None:
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


def bind(module: nn.Module, layer: AttentionLayer | Turns | Recorder) -> None:
    """Make `paged_attention_forward` use `layer` for calls from `module`."""
    module.__dict__[_SLOT] = layer


def make_layers(calls: list[AttentionCall], context: StepContext, impl: ops.Impl | None) -> list[PagedLayer]:
    """Make a layer for each attention call of a trial run and bind the calling modules to them."""
    layers: list[PagedLayer] = []
    owners: dict[tuple[int, int], PagedLayer] = {}
    by_module: dict[nn.Module, list[PagedLayer]] = {}
    for call in calls:
        assert call.kv is not None
        key = (id(call.kv[0]), id(call.kv[1]))
        layer = PagedLayer(call, context, impl, owners.get(key))
        owners.setdefault(key, layer)
        layers.append(layer)
        by_module.setdefault(call.module, []).append(layer)
    for call in calls:
        call.kv = None
    for module, own in by_module.items():
        bind(module, own[0] if len(own) == 1 else Turns(own, context))
    return layers


def bound_to(module: nn.Module) -> PagedLayer | Turns | Recorder | None:
    """Return what was bound to a module."""
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
    """Attend over the paged cache, as transformers calls it. q, k, v: [1, heads, T, D]; returns [1, T, heads, Dv]."""
    layer = module.__dict__[_SLOT]
    if type(layer) is Recorder:
        layer.attend(module, query, key, value, {"attention_mask": attention_mask, "scaling": scaling, **kwargs})
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    if type(layer) is Turns:
        layer = layer.take()
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    softcap, sinks = kwargs.get("softcap") or 0.0, kwargs.get("s_aux")
    if torch.compiler.is_compiling():
        attend = torch.ops.lorafleet_layers.attend
        return attend(q, k, v, layer.handle, scale, softcap, sinks, v.shape[2])[None], None
    return layer.attend(q, k, v, scale, softcap, sinks)[None], None


AttentionInterface.register(ATTENTION, paged_attention_forward)

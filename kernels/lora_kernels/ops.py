"""The operations a worker's step is made of: batched LoRA, paged attention, and what surrounds them.

Each docstring gives the operation as torch would write it. `reference.py` is that definition in code; `cpu/` and
`triton_ops/` are fast implementations of the same. CUDA tensors use Triton and CPU tensors the native kernels (the
reference where no compiler was found, said once in the log); an explicit `impl=` wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Literal, Protocol

from torch import Tensor

from lora_kernels import reference
from lora_kernels.segments import (
    BLOCK_TOKENS,
    PAGE_ROWS,
    AttentionBatch,
    LoraBatch,
    build_attention_batch,
    build_lora_batch,
    recordable_attention_batch,
    recordable_lora_batch,
)
from lora_kernels.tables import (
    Activation,
    AdapterTable,
    DecoderLayer,
    LoraSite,
    PackedLinear,
    PagedAttention,
    RmsNorm,
    SiblingLinears,
)

__all__ = [
    "BLOCK_TOKENS",
    "PAGE_ROWS",
    "Activation",
    "AdapterTable",
    "AttentionBatch",
    "DecoderLayer",
    "DecoderStack",
    "Impl",
    "LoraBatch",
    "LoraSite",
    "PackedLinear",
    "PagedAttention",
    "RmsNorm",
    "SiblingLinears",
    "argmax",
    "build_attention_batch",
    "build_lora_batch",
    "decoder_stack",
    "gated_act",
    "kv_write_",
    "linear",
    "lora_add_",
    "mask_logits_",
    "pack_linear",
    "paged_attention",
    "recordable_attention_batch",
    "recordable_lora_batch",
    "rms_norm",
    "rotary_",
    "unpack_linear",
]

Impl = Literal["reference", "cpu", "triton"]


def lora_add_(
    outs: Sequence[Tensor],
    x: Tensor,
    sites: Sequence[LoraSite],
    table: AdapterTable,
    batch: LoraBatch,
    impl: Impl | None = None,
) -> None:
    """outs[i][row] += scale * (x[row] @ A_i.T) @ B_i for every row of every segment.

    x: [T, K], contiguous rows. outs[i]: [T, N_i] of x's dtype, changed in place; may be a column slice of one fused
    output. All sites share the input x. bf16, fp16 or fp32 throughout; accumulates in fp32.
    """
    _choose(x, impl).lora_add_(outs, x, sites, table, batch)


def kv_write_(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, impl: Impl | None = None
) -> None:
    """k_cache[slot // 16, :, slot % 16] = k and the same for v, slot being batch.slot_mapping[token].

    k: [T, Hkv, D], v: [T, Hkv, Dv], any strides but the last. k_cache: [blocks, Hkv, 16, D], v_cache:
    [blocks, Hkv, 16, Dv], contiguous, changed in place.
    """
    _choose(k, impl).kv_write_(k, v, k_cache, v_cache, batch)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """softmax(softcap(scale * q @ k.T)) @ v per sequence, causal by absolute position: [T, Hq, Dv].

    q: [T, Hq, D]; head h reads kv head h // (Hq // Hkv). window > 0: only the last `window` keys up to the query's own
    are seen. softcap > 0: logits become softcap * tanh(logits / softcap). sinks: [Hq], a logit of each head that joins
    the softmax's denominator and has no value. The step's own keys must have been written already.
    """
    return _choose(q, impl).paged_attention(
        q, k_cache, v_cache, batch, scale=scale, window=window, softcap=softcap, sinks=sinks
    )


def pack_linear(weight: Tensor, impl: Impl | None = None) -> PackedLinear:
    """Lay out a weight [N, K] for `linear`. The result may share the weight's memory or hold a copy of it."""
    return _choose(weight, impl).pack_linear(weight)


def linear(x: Tensor, packed: PackedLinear, bias: Tensor | None = None, impl: Impl | None = None) -> Tensor:
    """x @ weight.T + bias: x [T, K] -> [T, N]. `packed` must come from `pack_linear` of the same implementation."""
    return _choose(x, impl).linear(x, packed, bias)


def unpack_linear(packed: PackedLinear) -> Tensor:
    """Return the weight [N, K] that was packed, bit for bit; a copy unless the layout is plain."""
    if packed.layout == "plain":
        return packed.weight
    return packed.weight.permute(0, 2, 1, 3).reshape(-1, packed.in_features)[: packed.out_features]


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    plus_one: bool = False,
    impl: Impl | None = None,
) -> Tensor:
    """weight * (x / sqrt(mean(x ** 2) + eps)) over the last dimension: fp32, rounded before the weight as Llama does.

    residual: same shape as x; residual += x first (in place), and the sum is what is normalized. plus_one: the weight
    is 1 + weight and rounding comes last, as in Gemma.
    """
    return _choose(x, impl).rms_norm(x, weight, eps, residual=residual, plus_one=plus_one)


def rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, impl: Impl | None = None) -> None:
    """x = x * cos + rotate_half(x) * sin for q and k, in place, on the first cos.shape[-1] entries of each head.

    q: [T, Hq, D], k: [T, Hkv, D], any strides but the last. cos, sin: [T, R] with R <= D even, halves repeated as
    Hugging Face builds them.
    """
    _choose(q, impl).rotary_(q, k, cos, sin)


def gated_act(gate: Tensor, up: Tensor, act: Activation = "silu", impl: Impl | None = None) -> Tensor:
    """act(gate) * up, in fp32, rounded once: [T, N]. gate and up may be column slices of one fused output."""
    return _choose(gate, impl).gated_act(gate, up, act)


def mask_logits_(logits: Tensor, rows: Tensor, words: Tensor, impl: Impl | None = None) -> None:
    """logits[rows[i], v] = -inf wherever bit v % 32 of words[i, v // 32] is 0, in place.

    logits: [n, V]. rows: int64 [m], each at most once. words: int32 [m, V / 32 rounded up].
    """
    _choose(logits, impl).mask_logits_(logits, rows, words)


def argmax(x: Tensor, impl: Impl | None = None) -> tuple[Tensor, Tensor]:
    """x.max(-1).indices, the first of equals, and isfinite(x.max(-1).values): int64 and bool [n] of x [n, V].

    A row that holds a NaN is not finite, and its index means nothing. Either 0 may win over the other.
    """
    return _choose(x, impl).argmax(x)


class DecoderStack(Protocol):
    """Consecutive decoder layers that run as one call."""

    def run(
        self, x: Tensor, cos: Tensor, sin: Tensor, attention: AttentionBatch, table: AdapterTable | None,
        lora: LoraBatch | None,
    ) -> None:  # fmt: skip
        """Turn x [T, width] into what the last layer gives, in place. cos, sin: as `rotary_` takes them."""
        ...


def decoder_stack(layers: Sequence[DecoderLayer], impl: Impl | None = None) -> DecoderStack | None:
    """Prepare layers to run as one call that computes what the operations above compute one by one.

    None where the implementation has nothing better than one by one.
    """
    return _choose(layers[0].qkv.packed.weight, impl).decoder_stack(layers)


# Filled on first use, so that nothing heavy is imported until chosen. A plain dict, because torch.compile can read it.
_implementations: dict[str, ModuleType] = {"reference": reference}


def _choose(tensor: Tensor, impl: Impl | None) -> ModuleType:
    name = impl or ("triton" if tensor.is_cuda else "host")
    found = _implementations.get(name)
    return found if found is not None else _load(name)


def _load(name: str) -> ModuleType:
    if name == "triton":
        from lora_kernels import triton_ops as module
    elif name in ("cpu", "host"):
        from lora_kernels import cpu

        loaded = cpu.load()
        if name == "cpu" and not loaded:
            raise RuntimeError("the native CPU kernels cannot be used on this machine; the log says why")
        module = cpu if loaded else reference
    else:
        raise ValueError(f"impl is {name!r}; it must be 'reference', 'cpu' or 'triton'")
    _implementations[name] = module
    return module

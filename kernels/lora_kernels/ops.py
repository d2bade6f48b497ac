"""The operations of a worker's step: batched LoRA, paged attention, and the operations around them.

Each docstring begins with the operation as torch would write it. `reference.py` is that definition in code; `cpu/` and
`triton_ops/` are fast implementations. CUDA tensors use Triton. CPU tensors use the native kernels, or the reference if
they cannot be built, which is logged once. An explicit `impl=` overrides the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Literal, Protocol

import torch
from torch import Tensor

from lora_kernels import reference, sums
from lora_kernels.quantised import QuantisedWeight
from lora_kernels.reference import row_pieces
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
    PANEL_COLUMNS,
    Activation,
    AdapterChanges,
    AdapterTable,
    ChangedRows,
    DecoderLayer,
    GatedDelta,
    GatedExperts,
    GatedScan,
    LayerChange,
    LoraSite,
    ModelEnds,
    PackedLinear,
    PagedAttention,
    QuantisedLinear,
    RmsNorm,
    SiblingLinears,
    changed_rows,
)

Impl = Literal["reference", "cpu", "triton"]


def fix_sums(is_fixed: bool) -> None:
    """Choose whether every row's sums have a fixed order, independent of the other rows: see `sums.py`.

    Applies to the whole process; call it before weights are packed. Affects `linear` with unquantized weights,
    `lora_add_` and `paged_attention`; the other operations compute row by row anyway.
    """
    from lora_kernels import cpu

    sums.set_fixed(is_fixed)
    cpu.fix_sums(is_fixed)


def lora_add_(
    outs: Sequence[Tensor],
    x: Tensor,
    sites: Sequence[LoraSite],
    table: AdapterTable,
    batch: LoraBatch,
    impl: Impl | None = None,
) -> None:
    """outs[i][row] += scale * (x[row] @ A_i.T) @ B_i for every row of every segment of `batch`.

    x: [T, K], contiguous rows, the input of all sites. outs[i]: [T, N_i] with x's dtype, changed in place; may be a
    column slice of a fused output. All are bf16, fp16 or fp32; accumulates in fp32.
    """
    _choose(x, impl).lora_add_(outs, x, sites, table, batch)


def copy_rows_(pools: Sequence[Tensor], buffer: Tensor, pieces: Tensor, impl: Impl | None = None) -> None:
    """pools[p][row : row + num] = the bytes of `buffer` from `begin`, for every (p, row, num, begin) of `pieces`.

    pools: matrices or vectors of contiguous rows, changed in place. buffer: uint8 [bytes]; every piece begins at a
    multiple of its pool's element size. pieces: int64 [n, 4]. All on the host.
    """
    _choose(buffer, impl).copy_rows_(pools, buffer, pieces)


def kv_write_(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, impl: Impl | None = None
) -> None:
    """k_cache[slot // 16, :, slot % 16] = k[token] with slot = batch.slot_mapping[token], and the same for v.

    k: [T, Hkv, D]. v: [T, Hkv, Dv]. Their last stride is 1, the others are arbitrary. k_cache: [blocks, Hkv, 16, D].
    v_cache: [blocks, Hkv, 16, Dv]. Both are changed in place, and contiguous; on a CPU only each block must be
    contiguous. Their dtype is k's or, on a CPU, int8 codes (see `kv_codes.py`) for D and Dv that are multiples of 4.
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
    """softmax(softcap(scale * q @ k.T)) @ v for each sequence, causal by absolute position: [T, Hq, Dv].

    q: [T, Hq, D], last stride 1; head h reads KV head h // (Hq // Hkv). k_cache, v_cache: see `kv_write_`; they must
    include the step's own keys and values. window > 0: a query sees only the last `window` keys up to its own. softcap
    > 0: logits become softcap * tanh(logits / softcap). sinks: [Hq], a logit per head that joins the softmax's
    denominator and has no value.
    """
    return _choose(q, impl).paged_attention(
        q, k_cache, v_cache, batch, scale=scale, window=window, softcap=softcap, sinks=sinks
    )


def pack_linear(*weights: Tensor, impl: Impl | None = None) -> PackedLinear:
    """Pack a weight [N, K] for `linear`, or several [N_i, K] of one dtype as one, concatenated by rows.

    The result shares the weight's memory or holds a copy.
    """
    return _choose(weights[0], impl).pack_linear(*weights)


def pack_quantised(weights: Sequence[QuantisedWeight], impl: Impl | None = None) -> QuantisedLinear:
    """Pack weights [N_i, K] with a common input for `linear`, concatenated by outputs. Their kinds may differ.

    The result holds a copy of their memory, except with the reference.
    """
    return _choose(weights[0].rows, impl).pack_quantised(weights)


def linear(
    x: Tensor, packed: PackedLinear | QuantisedLinear, bias: Tensor | None = None, impl: Impl | None = None
) -> Tensor:
    """x @ weight.T + bias: [T, N].

    x: [T, K]. packed: the weight [N, K], from `pack_linear` or `pack_quantised` of the same implementation. bias: [N].
    Quantized weights are multiplied with their exact dequantized values, or for many rows with these in bf16; if they
    have `int8_inputs`, x is first rounded like `quantised.round_inputs`.
    """
    return _choose(x, impl).linear(x, packed, bias)


def grouped_linear(x: Tensor, packed: PackedLinear | QuantisedLinear, ends: Tensor, impl: Impl | None = None) -> Tensor:
    """out[i] = x[i] @ weights[e].T for ends[e - 1] <= i < ends[e]: [S, N].

    x: [S, K]. packed: E weights [N, K], packed as one [E * N, K]; unless its layout is plain, N is a multiple of
    PANEL_COLUMNS. Quantized weights are multiplied as by `linear`. ends: int32 [E], ascending to S.
    """
    return _choose(x, impl).grouped_linear(x, packed, ends)


def experts(x: Tensor, ids: Tensor, weights: Tensor, layer: GatedExperts, impl: Impl | None = None) -> Tensor:
    """sum over j of weights[t, j] * down(act(gate(x[t])) * up(x[t])) of expert ids[t, j]: [T, D].

    x: [T, D]. ids: int64 [T, k], each below the number of experts. weights: [T, k]. Results of each product are rounded
    to x's dtype; the sum is in fp32 and rounded once. Quantized weights are multiplied as by `linear`.
    """
    return _choose(x, impl).experts(x, ids, weights, layer)


def unpack_linear(packed: PackedLinear) -> Tensor:
    """Return the original weight [N, K], bit for bit; a copy unless the layout is plain."""
    if packed.layout == "plain":
        return packed.weight
    pairs = packed.weight.view(torch.int32).squeeze(-1).transpose(1, 2)  # [panels, lanes, K / 2]
    rows = pairs.clone(memory_format=torch.contiguous_format).view(packed.weight.dtype)
    return rows.flatten(0, 1)[: packed.out_features]


def unpack_rows(packed: PackedLinear, index: Tensor) -> Tensor:
    """Return rows of a packed weight, bit for bit: `weight[index]`, [..., K] for index int64 [...].

    A row of a "vnni" weight is scattered over its panel. For the few rows of a step, gathering takes less than a
    thousandth of the step.
    """
    if packed.layout == "plain":
        return packed.weight[index]
    num_lanes = packed.weight.shape[2]
    pairs = packed.weight.view(torch.int32).squeeze(-1).transpose(1, 2)  # [panels, lanes, K / 2]
    return pairs[index // num_lanes, index % num_lanes].view(packed.weight.dtype)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    plus_one: bool = False,
    impl: Impl | None = None,
) -> Tensor:
    """weight * (x / sqrt(mean(x ** 2, -1) + eps)): the shape of x.

    x: [..., D]. weight: [D]. Computes in fp32 and rounds before multiplying by the weight, as Llama does. residual: the
    shape of x; first residual += x in place, then the sum is normalized. plus_one: multiplies by 1 + weight, and rounds
    last, as in Gemma.
    """
    return _choose(x, impl).rms_norm(x, weight, eps, residual=residual, plus_one=plus_one)


def rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, impl: Impl | None = None) -> None:
    """x = x * cos + rotate_half(x) * sin for q and k, in place, on the first cos.shape[-1] entries of each head.

    q: [T, Hq, D]. k: [T, Hkv, D]. Their last stride is 1, the others are arbitrary. cos, sin: [T, R] with R <= D even;
    the second half of each row repeats the first, as Hugging Face builds them.
    """
    _choose(q, impl).rotary_(q, k, cos, sin)


def gated_act(gate: Tensor, up: Tensor, act: Activation = "silu", impl: Impl | None = None) -> Tensor:
    """act(gate) * up: [T, N], computed in fp32 and rounded once. gate, up: [T, N], may be slices of one output."""
    return _choose(gate, impl).gated_act(gate, up, act)


def mask_logits_(logits: Tensor, rows: Tensor, words: Tensor, impl: Impl | None = None) -> None:
    """logits[rows[i], v] = -inf wherever bit v % 32 of words[i, v // 32] is 0.

    logits: [n, V], changed in place. rows: int64 [m], each row at most once. words: int32 [m, ceil(V / 32)].
    """
    _choose(logits, impl).mask_logits_(logits, rows, words)


def argmax(x: Tensor, impl: Impl | None = None) -> tuple[Tensor, Tensor]:
    """x.max(-1).indices and isfinite(x.max(-1).values): int64 [n] and bool [n].

    x: [n, V]. The first of equal numbers is taken; the order of 0.0 and -0.0 is undefined. A row with a NaN is not
    finite, and its index is undefined.
    """
    return _choose(x, impl).argmax(x)


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, *, skip: Tensor | None = None,
    gate: Tensor | None = None, dt_bias: Tensor | None = None, softplus: bool = False, impl: Impl | None = None,
) -> Tensor:  # fmt: skip
    """For each token in turn: state = exp(dt * a) * state + dt * x * b; output = state @ c.

    x: [T, C]. dt: [T, C], fp32 or x's dtype. a: [C, N]. b, c: [T, N]. state: fp32 [C, N], the state before the tokens,
    changed in place. Returns [T, C] in x's dtype, computed in fp32 and rounded once. dt_bias: [C], added to dt.
    softplus: then dt = log(1 + exp(dt)). skip: [C]; skip * x is added to the output. gate: [T, C]; the output is
    multiplied by silu(gate). Gu and Dao, Mamba, 2023.
    """
    return _choose(x, impl).selective_scan(
        x, dt, a, b, c, state, skip=skip, gate=gate, dt_bias=dt_bias, softplus=softplus
    )


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Tensor, runs: Tensor, *, normalize: bool = False,
    additive: bool = False, impl: Impl | None = None,
) -> Tensor:  # fmt: skip
    """For each token in turn: s = exp(g) * s; s += outer(k, beta * (v - k @ s)); output = q @ s / sqrt(K).

    q, k: [T, H, K]. v: [T, G, V], G a multiple of H: head g reads key head g // (G // H). g: [T, G], or [T, G, K] for a
    decay per channel of a key. beta: [T, G]. states: fp32 [slots, G, K, V], changed in place. runs: int64 [n, 5] on the
    CPU, which cover every token: first row, end, slot of the initial state, slot of the final state, and another slot
    for the final state, or -1. Runs are computed in order. normalize: q and k are divided by their length, sqrt(sum(x
    ** 2) + 1e-6). additive: s += outer(k, beta * v), Mamba2's scan (Dao and Gu, 2024). Returns [T, G, V] in v's dtype,
    computed in fp32 and rounded once. Yang et al., Gated Delta Networks, 2024; with a decay per channel: Kimi Linear,
    2025.
    """
    return _choose(q, impl).delta_rule(q, k, v, g, beta, states, runs, normalize=normalize, additive=additive)


def causal_conv(
    x: Tensor, weight: Tensor, states: Tensor, runs: Tensor, *, bias: Tensor | None = None, silu: bool = False,
    impl: Impl | None = None,
) -> Tensor:  # fmt: skip
    """out[t] = (weight * x[t - K + 1 : t + 1].T).sum(1) + bias, continuing each run's state: [T, C].

    x: [T, C]. weight: [C, K]. bias: [C]. states: [slots, K, C], the last K inputs, oldest first, changed in place. All
    have one dtype; computed in fp32 and rounded once. runs: see `delta_rule`. silu: return silu(out).
    """
    return _choose(x, impl).causal_conv(x, weight, states, runs, bias=bias, silu=silu)


def gated_delta(
    qkv: Tensor, b: Tensor, a: Tensor, layer: GatedDelta, runs: Tensor, *, impl: Impl | None = None
) -> Tensor:
    """delta_rule(*split(silu(causal_conv(qkv))), rates * softplus(a + dt_bias), sigmoid(b)): [T, G, V].

    qkv: [T, C], concatenated queries, keys and values; queries and keys are normalized after the convolution. b, a: [T,
    G]. runs: see `delta_rule`. The states of both are changed in place.
    """
    return _choose(qkv, impl).gated_delta(qkv, b, a, layer, runs)


def gated_scan(
    gate: Tensor, xbc: Tensor, dt: Tensor, layer: GatedScan, runs: Tensor, *, impl: Impl | None = None
) -> Tensor:
    """norm((scan(*split(silu(causal_conv(xbc))), dt) + skip * x) * silu(gate)) * weight, Mamba2's scan: [T, I].

    gate: [T, I]. xbc: [T, C], values, then keys and queries of each group of heads. dt: [T, H], transformed to
    softplus(dt + dt_bias). norm: x / rms(x) in groups of columns. runs: see `delta_rule`. The states of both are
    changed in place. Everything after the convolution is in fp32, up to the result.
    """
    return _choose(xbc, impl).gated_scan(gate, xbc, dt, layer, runs)


def gate_heads_(x: Tensor, gate: Tensor, *, impl: Impl | None = None) -> None:
    """x *= sigmoid(gate), in place. x, gate: [T, H, D], each head's entries contiguous."""
    _choose(x, impl).gate_heads_(x, gate)


def is_native(tensor: Tensor) -> bool:
    """Return whether operations on this tensor run in native code: CPU tensors, if the kernels could be built."""
    return tensor.device.type == "cpu" and _choose(tensor, None) is not reference


class DecoderStack(Protocol):
    """Consecutive decoder layers that run as one call."""

    def run(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention: AttentionBatch,
        table: AdapterTable | None,
        lora: LoraBatch | None,
        changes: ChangedRows | None = None,
        runs: Tensor | None = None,
    ) -> None:
        """Replace x [T, width] with the output of the last layer, in place.

        cos, sin: see `rotary_`. attention, table, lora: see `paged_attention` and `lora_add_`; lora is None for a step
        without adapters. changes: other changes by adapters; LoRA reads the unchanged inputs, and outputs are changed
        after it. runs: see `delta_rule`; None if no layer has states.
        """
        ...

    def logits(
        self, tokens: Tensor, positions: Tensor, angles: Tensor, logit_rows: Tensor | None, attention: AttentionBatch,
        table: AdapterTable | None, lora: LoraBatch | None, head_lora: LoraBatch | None,
        changes: ChangedRows | None = None, head_changes: ChangedRows | None = None, runs: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the logits [n, V] of selected tokens, through the ends that the stack was created with.

        tokens: int64 [T] ids, or embeddings [T, width], which are overwritten. positions: int64 [T]. angles:
        [positions, 2 * R], cos and sin of each position. logit_rows: int64 [n], None for all tokens. head_lora,
        head_changes: for the rows that go through the head.
        """
        ...

    def prepare(self, changes: Sequence[LayerChange]) -> AdapterChanges | None:
        """Prepare an adapter's changes; those of one site are applied in this order. Their tensors are on the CPU.

        Returns None if sums must have a fixed order: torch, which otherwise computes the changes, adds in another
        order.
        """
        ...


def decoder_stack(
    layers: Sequence[DecoderLayer], ends: ModelEnds | None = None, impl: Impl | None = None
) -> DecoderStack | None:
    """Prepare layers to run as one call, equivalent to the operations above in sequence.

    ends: embedding and head; without them the stack has no logits. Returns None if the implementation has nothing
    faster than the sequence of operations.
    """
    return _choose(layers[0].attention_norm.weight, impl).decoder_stack(layers, ends)


# Filled on first use, so that only the chosen implementations are imported. A dict, because torch.compile reads it.
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

"""The memory-bound operations of a layer: KV cache write, RMS norm, rotary embedding and gated activation.

Each reads and writes every element once, computes in fp32 and rounds once; RMS norm rounds where Llama does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.segments import BLOCK_TOKENS, AttentionBatch
from lora_kernels.tables import Activation
from lora_kernels.triton_ops.launch import Launch, Limits, pad_to_power_of_2, require_rows

_TILE_ELEMENTS = 4096  # per program: 32 per thread with 4 warps
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)


@triton.jit
def kv_write_kernel(
    k,  # [T, num_heads, HEAD_DIM]
    v,  # [T, num_heads, HEAD_DIM_V]
    k_cache,  # [blocks, num_heads, BLOCK_TOKENS, HEAD_DIM]
    v_cache,  # [blocks, num_heads, BLOCK_TOKENS, HEAD_DIM_V]
    slot_mapping,  # int64 [T]
    num_heads,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    BLOCK_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write BLOCK_H heads of one token to its cache slot. See `ops.kv_write_`."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    cache_row = (slot // BLOCK_TOKENS * num_heads + head) * BLOCK_TOKENS + slot % BLOCK_TOKENS
    mask = (head < num_heads)[:, None] & (d < HEAD_DIM)[None, :]
    values = tl.load(k + token * k_token_stride + head[:, None] * k_head_stride + d[None, :], mask=mask)
    tl.store(k_cache + cache_row[:, None] * HEAD_DIM + d[None, :], values, mask=mask)
    mask = (head < num_heads)[:, None] & (d < HEAD_DIM_V)[None, :]
    values = tl.load(v + token * v_token_stride + head[:, None] * v_head_stride + d[None, :], mask=mask)
    tl.store(v_cache + cache_row[:, None] * HEAD_DIM_V + d[None, :], values, mask=mask)


@triton.jit
def rms_norm_kernel(
    out,  # [rows, size]
    x,  # [rows // heads, heads, size]
    residual,  # [rows, size] or None; x is added to it and the sum is normalized
    weight,  # [size]
    heads,
    size,
    x_token_stride,
    x_head_stride,
    eps,
    PLUS_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalize one row. See `ops.rms_norm`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < size
    values = tl.load(x + row // heads * x_token_stride + row % heads * x_head_stride + column, mask=mask, other=0.0)
    dtype = values.dtype
    if residual is not None:
        carried = tl.load(residual + row * size + column, mask=mask, other=0.0)
        values = (carried.to(tl.float32) + values.to(tl.float32)).to(dtype)
        tl.store(residual + row * size + column, values, mask=mask)
    hidden = values.to(tl.float32)
    hidden *= tl.rsqrt(tl.sum(hidden * hidden, axis=0) / size + eps)
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    if PLUS_ONE:
        hidden *= 1.0 + w
    else:
        hidden = hidden.to(dtype).to(tl.float32) * w
    tl.store(out + row * size + column, hidden.to(out.dtype.element_ty), mask=mask)


@triton.jit
def rotary_kernel(
    x,  # [T, num_heads, >= 2 * half]
    cos,  # [T, 2 * half]
    sin,  # [T, 2 * half]
    num_heads,
    half,
    token_stride,
    head_stride,
    cos_stride,
    sin_stride,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rotate BLOCK_H heads of one token. See `ops.rotary_`."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    live = d < half
    mask = (head < num_heads)[:, None] & live[None, :]
    first_at = x + token * token_stride + head[:, None] * head_stride + d[None, :]
    first = tl.load(first_at, mask=mask).to(tl.float32)
    second = tl.load(first_at + half, mask=mask).to(tl.float32)
    cos_at, sin_at = cos + token * cos_stride + d, sin + token * sin_stride + d
    cos_first = tl.load(cos_at, mask=live).to(tl.float32)[None, :]
    cos_second = tl.load(cos_at + half, mask=live).to(tl.float32)[None, :]
    sin_first = tl.load(sin_at, mask=live).to(tl.float32)[None, :]
    sin_second = tl.load(sin_at + half, mask=live).to(tl.float32)[None, :]
    rotated = first * cos_first - second * sin_first
    tl.store(first_at, rotated.to(x.dtype.element_ty), mask=mask)
    rotated = second * cos_second + first * sin_second
    tl.store(first_at + half, rotated.to(x.dtype.element_ty), mask=mask)


@triton.jit
def gated_act_kernel(
    out,  # [T, size]
    gate,  # [T, size]
    up,  # [T, size]
    size,
    gate_stride,
    up_stride,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute a block of one output row. See `ops.gated_act`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    x = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    if ACT == "silu":
        x *= tl.sigmoid(x)
    elif ACT == "gelu":
        x *= 0.5 * (1.0 + tl.math.erf(x * _SQRT_HALF))
    else:
        # 0.5 * (1 + tanh(a)) is sigmoid(2 a), with a = sqrt(2 / pi) * (x + 0.044715 x^3).
        x *= tl.sigmoid((x + 0.044715 * x * x * x) * _SQRT_8_OVER_PI)
    x *= tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, x.to(out.dtype.element_ty), mask=mask)


def kv_write_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch) -> None:
    """Write each token's k and v to its cache slot. See `ops.kv_write_`.

    Negative slots, the padding of a captured graph, are skipped.
    """
    plan_kv_write(k, v, k_cache, v_cache, batch)()


def plan_kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch) -> Launch:
    """Return the launch of `kv_write_`. Raises ValueError for tensors that the kernel would misread."""
    require_rows(k, v, same_dtype=False)
    num_tokens, num_heads, head_dim = k.shape
    block_d = pad_to_power_of_2(max(head_dim, v.shape[2]))
    block_h = _heads_per_program(num_heads, block_d)
    args = {
        "k": k,
        "v": v,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "slot_mapping": batch.slot_mapping,
        "num_heads": num_heads,
        "k_token_stride": k.stride(0),
        "k_head_stride": k.stride(1),
        "v_token_stride": v.stride(0),
        "v_head_stride": v.stride(1),
        "BLOCK_TOKENS": BLOCK_TOKENS,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": v.shape[2],
        "BLOCK_H": block_h,
        "BLOCK_D": block_d,
    }
    return Launch(kv_write_kernel, (num_tokens, triton.cdiv(num_heads, block_h), 1), args, Limits())


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, plus_one: bool = False
) -> Tensor:
    """weight * (x / sqrt(mean(x ** 2) + eps)) over the last dimension, after residual += x. See ops.rms_norm."""
    out = torch.empty(
        x.shape, dtype=x.dtype if plus_one else torch.promote_types(x.dtype, weight.dtype), device=x.device
    )
    plan_rms_norm(out, x, weight, eps, residual, plus_one)()
    return out


def plan_rms_norm(
    out: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, plus_one: bool
) -> Launch:
    """Return the launch that writes `rms_norm` of x to `out`.

    Raises ValueError for a residual that is not contiguous.
    """
    if residual is not None and not residual.is_contiguous():
        raise ValueError(f"residual of strides {residual.stride()} must be contiguous: it is changed in place")
    if x.dim() != 3 or x.stride(2) != 1:
        x = x.reshape(-1, 1, x.shape[-1])
    size = x.shape[2]
    block = pad_to_power_of_2(size)
    args = {
        "out": out,
        "x": x,
        "residual": residual,
        "weight": weight,
        "heads": x.shape[1],
        "size": size,
        "x_token_stride": x.stride(0),
        "x_head_stride": x.stride(1),
        "eps": eps,
        "PLUS_ONE": plus_one,
        "BLOCK": block,
    }
    num_warps = min(16, max(1, block // 512))
    return Launch(rms_norm_kernel, (x.shape[0] * x.shape[1], 1, 1), args, Limits(num_warps))


def rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate the first cos.shape[-1] entries of every head of q and k in place. See ops.rotary_."""
    for heads in (q, k):
        plan_rotary(heads, cos, sin)()


def plan_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Launch:
    """Return the launch that rotates the heads of x, queries or keys, in place.

    Raises ValueError for tensors that the kernel would misread.
    """
    require_rows(x, cos, sin, same_dtype=False)
    num_tokens, num_heads, _ = x.shape
    half = cos.shape[1] // 2
    block_d = pad_to_power_of_2(half)
    block_h = _heads_per_program(num_heads, 2 * block_d)
    args = {
        "x": x,
        "cos": cos,
        "sin": sin,
        "num_heads": num_heads,
        "half": half,
        "token_stride": x.stride(0),
        "head_stride": x.stride(1),
        "cos_stride": cos.stride(0),
        "sin_stride": sin.stride(0),
        "BLOCK_H": block_h,
        "BLOCK_D": block_d,
    }
    return Launch(rotary_kernel, (num_tokens, triton.cdiv(num_heads, block_h), 1), args, Limits())


def gated_act(gate: Tensor, up: Tensor, act: Activation = "silu") -> Tensor:
    """act(gate) * up: [T, N]. See ops.gated_act."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    plan_gated_act(out, gate, up, act)()
    return out


def plan_gated_act(out: Tensor, gate: Tensor, up: Tensor, act: Activation) -> Launch:
    """Return the launch that writes act(gate) * up to `out`. Raises ValueError for tensors that it would misread."""
    require_rows(gate, up)
    num_tokens, size = gate.shape
    block = min(1024, pad_to_power_of_2(size))
    args = {
        "out": out,
        "gate": gate,
        "up": up,
        "size": size,
        "gate_stride": gate.stride(0),
        "up_stride": up.stride(0),
        "ACT": act,
        "BLOCK": block,
    }
    return Launch(gated_act_kernel, (num_tokens, triton.cdiv(size, block), 1), args, Limits())


def _heads_per_program(num_heads: int, elements_per_head: int) -> int:
    return min(pad_to_power_of_2(num_heads), max(1, _TILE_ELEMENTS // elements_per_head))

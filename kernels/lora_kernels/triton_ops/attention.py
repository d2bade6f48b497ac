"""Attention over the paged cache: one kernel for decodes and prefill chunks, and the reduction of split decodes.

A tile's rows are (query, head) pairs of one sequence and one KV head, so that a decode with grouped heads fills a
tensor-core dot by itself. Decodes split their keys over programs; the number of parts depends only on the batch's
shape. Parts are joined in order, so the result is always bit-identical and a captured graph serves any length. Chunks
are not split: they have enough rows to fill a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import lora_kernels.triton_ops.tuning as tuning
from lora_kernels import sums
from lora_kernels.segments import BLOCK_TOKENS, AttentionBatch
from lora_kernels.triton_ops.launch import Device, Launch, device_of, pad_to_power_of_2, require_rows

_LOG2_E = tl.constexpr(1.4426950408889634)  # logits are in base 2, because the hardware has exp2
MAX_DECODE_ROWS = 64  # maximum (query, head) rows of a step of short queries that runs as decodes

# Arguments that change from step to step must not select a kernel variant: each variant is a compilation.
_PER_STEP = ("num_seqs", "tables_stride", "window")
_UNALIGNED = ("block_tables", "query_starts", "kv_lens", "part_max", "part_sum")


@triton.jit
def _find_sequence(tile, query_starts, num_seqs, QUERIES: tl.constexpr):
    """Return the sequence of a tile of QUERIES queries, and the tile's index in it.

    Sequence s has the tiles from query_starts[s] // QUERIES + s on: always enough of them, found without a scan.
    """
    low = 0
    high = num_seqs - 1
    while low < high:
        middle = (low + high + 1) // 2
        first_tile = tl.load(query_starts + middle) // QUERIES + middle
        if first_tile <= tile:
            low = middle
        else:
            high = middle - 1
    return low, tile - (tl.load(query_starts + low) // QUERIES + low)


@triton.jit
def _logits(q, k, scale, softcap, SOFTCAP: tl.constexpr):
    """Return attention logits before masking, in base 2."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if SOFTCAP:
        # tanh via exp2, exact at both ends: the exponential overflows to inf or vanishes, and the quotient to 0 or 2.
        logits = softcap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * _LOG2_E / softcap)) + 1.0))
    return logits * _LOG2_E


@triton.jit(do_not_specialize=_PER_STEP, do_not_specialize_on_alignment=_UNALIGNED)
def attention_kernel(
    out,  # [num_tokens, heads, HEAD_DIM_V]; the unnormalized parts (see reduce_kernel) if SPLIT
    part_max,  # float32 [splits, num_seqs, DECODE_QUERIES, heads] or None
    part_sum,  # like part_max
    q,  # [num_tokens, heads, HEAD_DIM]
    k_cache,  # [blocks, kv heads, BLOCK_TOKENS, HEAD_DIM]
    v_cache,  # [blocks, kv heads, BLOCK_TOKENS, HEAD_DIM_V]
    sinks,  # [heads] or None
    block_tables,  # int32 [num_seqs, max_blocks]
    query_starts,  # int32 [num_seqs + 1]
    kv_lens,  # int32 [num_seqs]
    num_seqs,
    q_token_stride,
    q_head_stride,
    tables_stride,
    scale,
    softcap,
    window,
    BLOCK_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUERIES: tl.constexpr,
    DECODE_QUERIES: tl.constexpr,
    DECODE: tl.constexpr,
    SPLIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write the attention of a tile of queries over its keys, or part of its keys if SPLIT, by an online softmax."""
    kv_head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    split = tl.program_id(2)
    if DECODE:
        seq = tl.program_id(0)
        seq_tile = 0
    else:
        seq, seq_tile = _find_sequence(tl.program_id(0), query_starts, num_seqs, QUERIES)
    query_start = tl.load(query_starts + seq)
    query_len = tl.load(query_starts + seq + 1) - query_start
    first_query = seq_tile * QUERIES
    # A mixed step runs both variants of this kernel over all sequences; each variant computes its own.
    if DECODE:
        if query_len == 0 or query_len > DECODE_QUERIES:
            return
    else:
        if first_query >= query_len or query_len <= DECODE_QUERIES:
            return
    kv_len = tl.load(kv_lens + seq)

    row = tl.arange(0, BLOCK_M)
    query = first_query + row // GROUP
    head = kv_head * GROUP + row % GROUP
    live = (query < query_len) & (row < QUERIES * GROUP)
    position = kv_len - query_len + query
    token = (query_start + query).to(tl.int64)
    d_range = tl.arange(0, BLOCK_D)
    dv_range = tl.arange(0, BLOCK_DV)
    q_block = tl.load(
        q + token[:, None] * q_token_stride + head[:, None] * q_head_stride + d_range[None, :],
        mask=live[:, None] & (d_range < HEAD_DIM)[None, :],
        other=0.0,
    )
    if UPCAST:
        q_block = q_block.to(tl.float32)

    row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if not SPLIT and sinks is not None:
        row_max = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * _LOG2_E
        row_sum += 1.0
    acc = tl.zeros((BLOCK_M, BLOCK_DV), dtype=tl.float32)

    kv_begin = 0
    kv_end = kv_len - query_len + tl.minimum(first_query + QUERIES, query_len)
    if WINDOW:
        kv_begin = tl.maximum(kv_len - query_len + first_query - window + 1, 0) // BLOCK_N * BLOCK_N
    if SPLIT:
        part = tl.cdiv(tl.cdiv(kv_end - kv_begin, BLOCK_N), tl.num_programs(2)) * BLOCK_N
        kv_begin += split * part
        kv_end = tl.minimum(kv_end, kv_begin + part)

    table = block_tables + tl.cast(seq, tl.int64) * tables_stride
    for start in range(kv_begin, kv_end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        in_range = key < kv_end
        block = tl.load(table + key // BLOCK_TOKENS, mask=in_range, other=0).to(tl.int64)
        cache_row = (block * num_kv_heads + kv_head) * BLOCK_TOKENS + key % BLOCK_TOKENS
        k = tl.load(
            k_cache + cache_row[:, None] * HEAD_DIM + d_range[None, :],
            mask=in_range[:, None] & (d_range < HEAD_DIM)[None, :],
            other=0.0,
        )
        v = tl.load(
            v_cache + cache_row[:, None] * HEAD_DIM_V + dv_range[None, :],
            mask=in_range[:, None] & (dv_range < HEAD_DIM_V)[None, :],
            other=0.0,
        )
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        logits = _logits(q_block, k, scale, softcap, SOFTCAP)
        visible = in_range[None, :] & (key[None, :] <= position[:, None])
        if WINDOW:
            visible &= key[None, :] > position[:, None] - window
        logits = tl.where(visible, logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        # A row that has seen no key yet has maximum -inf; it is replaced by 0, so that -inf - -inf never occurs.
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(logits - safe_max[:, None])
        shrink = tl.exp2(row_max - safe_max)
        row_sum = row_sum * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        row_max = new_max

    num_heads = num_kv_heads * GROUP
    out_row = token * num_heads + head
    if SPLIT:
        out_row = ((split.to(tl.int64) * num_seqs + seq) * DECODE_QUERIES + query) * num_heads + head
        tl.store(part_max + out_row, row_max, mask=live)
        tl.store(part_sum + out_row, row_sum, mask=live)
    else:
        acc = acc / tl.where(live, row_sum, 1.0)[:, None]
    target = out + out_row[:, None] * HEAD_DIM_V + dv_range[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=live[:, None] & (dv_range < HEAD_DIM_V)[None, :])


@triton.jit(do_not_specialize=("num_seqs",), do_not_specialize_on_alignment=("query_starts", "part_max", "part_sum"))
def reduce_kernel(
    out,  # [num_tokens, heads, HEAD_DIM_V]
    parts,  # float32 [SPLITS, num_seqs, DECODE_QUERIES, heads, HEAD_DIM_V]
    part_max,  # float32 [SPLITS, num_seqs, DECODE_QUERIES, heads]
    part_sum,  # like part_max
    sinks,  # [heads] or None
    query_starts,  # int32 [num_seqs + 1]
    num_seqs,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    DECODE_QUERIES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Join the parts of split decodes, in order: sums weighted by exp2 of their maxima, plus sinks."""
    seq = tl.program_id(0)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    first = tl.load(query_starts + seq)
    end = tl.load(query_starts + seq + 1)
    if end - first > DECODE_QUERIES:
        return
    split = tl.arange(0, SPLITS)
    dv_range = tl.arange(0, BLOCK_DV)
    for query in range(end - first):
        part_row = ((split.to(tl.int64) * num_seqs + seq) * DECODE_QUERIES + query) * num_heads + head
        maxima = tl.load(part_max + part_row)
        sums = tl.load(part_sum + part_row)
        values = tl.load(
            parts + part_row[:, None] * HEAD_DIM_V + dv_range[None, :], mask=(dv_range < HEAD_DIM_V)[None, :], other=0.0
        )
        # A sink is a further part, with weight 1 at its logit and no value.
        sink = float("-inf")
        if sinks is not None:
            sink = tl.load(sinks + head).to(tl.float32) * _LOG2_E
        row_max = tl.maximum(tl.max(maxima, axis=0), sink)
        weights = tl.exp2(maxima - row_max)
        total = tl.sum(weights * sums, axis=0) + tl.exp2(sink - row_max)
        result = tl.fdiv(tl.sum(weights[:, None] * values, axis=0), total)
        out_row = ((first + query).to(tl.int64) * num_heads + head) * HEAD_DIM_V
        tl.store(out + out_row + dv_range, result.to(out.dtype.element_ty), mask=dv_range < HEAD_DIM_V)


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
) -> Tensor:
    """Return the causal attention of new tokens over their sequences' keys: [T, Hq, Dv]. See `ops.paged_attention`.

    Sequences without queries, the padding of a captured graph, are skipped; their rows in the result are undefined.
    """
    out = q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3])
    logits = Logits(scale, window, softcap, sinks)
    for launch in plan_attention(out, q, k_cache, v_cache, batch, logits, device_of(q)):
        launch()
    return out


@dataclass(frozen=True, slots=True)
class Logits:
    """The operations between q @ k.T and the softmax: keyword arguments of `ops.paged_attention`."""

    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None


def plan_attention(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    logits: Logits,
    device: Device,
) -> Iterator[Launch]:
    """Yield the launches of one call: decodes with their reduction, chunks, or both. Runs nothing.

    Raises ValueError for tensors that the kernels would misread.
    """
    require_rows(q, k_cache, v_cache)
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError(f"caches of strides {k_cache.stride()} and {v_cache.stride()} must be contiguous")
    if sums.are_fixed():  # decodes as chunks, whose keys are added in blocks independent of the step
        args = _shared_args(q, k_cache, v_cache, batch, logits)
        yield _plan_prefill(out, args | {"DECODE_QUERIES": 0, "UPCAST": device.upcast}, batch, device)
        return
    group = q.shape[1] // k_cache.shape[1]
    decode_rows = _decode_rows(batch.max_query_len, group)
    decode_queries = decode_rows // group
    args = _shared_args(q, k_cache, v_cache, batch, logits) | {
        "DECODE_QUERIES": decode_queries,
        "UPCAST": device.upcast,
    }
    all_alike = batch.num_tokens == batch.num_seqs * batch.max_query_len
    if batch.max_query_len <= decode_queries or not all_alike:
        yield from _plan_decode(out, args, decode_rows, batch, device)
    if batch.max_query_len > decode_queries:
        yield _plan_prefill(out, args, batch, device)


def _decode_rows(max_query_len: int, group: int) -> int:
    """Return the rows of a decode tile; with only short queries (speculation), a tile holds a whole query."""
    rows = max_query_len * group if max_query_len * group <= MAX_DECODE_ROWS else group
    return pad_to_power_of_2(rows, at_least=16)


def _shared_args(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, logits: Logits
) -> dict[str, object]:
    head_dim, head_dim_v = k_cache.shape[3], v_cache.shape[3]
    return {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "sinks": logits.sinks,
        "block_tables": batch.block_tables,
        "query_starts": batch.query_starts,
        "kv_lens": batch.kv_lens,
        "num_seqs": batch.num_seqs,
        "q_token_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "tables_stride": batch.block_tables.stride(0),
        "scale": logits.scale,
        "softcap": logits.softcap,
        "window": logits.window,
        "BLOCK_TOKENS": BLOCK_TOKENS,
        "GROUP": q.shape[1] // k_cache.shape[1],
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "BLOCK_D": pad_to_power_of_2(head_dim, at_least=16),
        "BLOCK_DV": pad_to_power_of_2(head_dim_v, at_least=16),
        "SOFTCAP": logits.softcap > 0,
        "WINDOW": logits.window > 0,
    }


def _plan_decode(
    out: Tensor, args: dict[str, Any], rows: int, batch: AttentionBatch, device: Device
) -> Iterator[Launch]:
    num_heads, head_dim_v = out.shape[1:]
    num_kv_heads, queries = num_heads // args["GROUP"], args["DECODE_QUERIES"]
    blocks = tuning.attention_blocks(rows, max(args["BLOCK_D"], args["BLOCK_DV"]), out.element_size(), device)
    splits = tuning.kv_splits(batch.num_seqs * num_kv_heads, device)
    parts, part_max, part_sum = out, None, None
    if splits > 1:
        shape = (splits, batch.num_seqs, queries, num_heads)
        parts = out.new_empty(*shape, head_dim_v, dtype=torch.float32)
        part_max, part_sum = out.new_empty(2, *shape, dtype=torch.float32)
    own = {"out": parts, "part_max": part_max, "part_sum": part_sum, "BLOCK_M": rows, "BLOCK_N": blocks.keys}
    own |= {"QUERIES": queries, "DECODE": True, "SPLIT": splits > 1}
    grid = (batch.num_seqs, num_kv_heads, splits)
    yield Launch(attention_kernel, grid, args | own, blocks.limits)
    if splits > 1:
        names = ("sinks", "query_starts", "num_seqs", "HEAD_DIM_V", "BLOCK_DV", "DECODE_QUERIES")
        own = {"out": out, "parts": parts, "part_max": part_max, "part_sum": part_sum, "SPLITS": splits}
        reduce_args = {name: args[name] for name in names} | own
        yield Launch(reduce_kernel, (batch.num_seqs, num_heads, 1), reduce_args, tuning.reduce_limits(device))


def _plan_prefill(out: Tensor, args: dict[str, Any], batch: AttentionBatch, device: Device) -> Launch:
    num_heads, group = out.shape[1], args["GROUP"]
    head_dim = max(args["BLOCK_D"], args["BLOCK_DV"])
    rows = pad_to_power_of_2(group, at_least=tuning.prefill_rows(head_dim, out.element_size(), device))
    blocks = tuning.attention_blocks(rows, head_dim, out.element_size(), device)
    queries = rows // group
    own = {"out": out, "part_max": None, "part_sum": None, "BLOCK_M": rows, "BLOCK_N": blocks.keys}
    own |= {"QUERIES": queries, "DECODE": False, "SPLIT": False}
    grid = (batch.num_tokens // queries + batch.num_seqs, num_heads // group, 1)
    return Launch(attention_kernel, grid, args | own, blocks.limits)

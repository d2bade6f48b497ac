"""A linear layer whose rows have the same bits in any batch: it uses one tile size for every number of rows.

Libraries choose tiles, and splits of K, by the shape of a product. Only used with `fix_sums`.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

import lora_kernels.triton_ops.tuning as tuning
from lora_kernels import reference, sums
from lora_kernels.tables import PackedLinear, QuantisedLinear
from lora_kernels.triton_ops.launch import Device, Launch, device_of, require_rows


@triton.jit(do_not_specialize=("num_rows",))
def linear_kernel(
    out,  # [num_rows, n]
    x,  # [num_rows, k]
    weight,  # [n, k]
    bias,  # [n] or None
    num_rows,
    n,
    k,
    x_stride,
    weight_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out = x @ weight.T + bias: sums over K in order, in fp32, rounded once."""
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_rows = rows < num_rows
    live_columns = columns < n
    x_row = x + rows[:, None].to(tl.int64) * x_stride
    weight_row = weight + columns[:, None].to(tl.int64) * weight_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k_start in range(0, k, BLOCK_K):
        k_range = k_start + tl.arange(0, BLOCK_K)
        live_k = k_range[None, :] < k
        x_block = tl.load(x_row + k_range[None, :], mask=live_rows[:, None] & live_k, other=0.0)
        weight_block = tl.load(weight_row + k_range[None, :], mask=live_columns[:, None] & live_k, other=0.0)
        if UPCAST:
            x_block = x_block.to(tl.float32)
            weight_block = weight_block.to(tl.float32)
        acc = tl.dot(x_block, tl.trans(weight_block), acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + columns, mask=live_columns, other=0.0).to(tl.float32)[None, :]
    target = out + rows[:, None].to(tl.int64) * n + columns[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=live_rows[:, None] & live_columns[None, :])


def linear(x: Tensor, packed: PackedLinear | QuantisedLinear, bias: Tensor | None = None) -> Tensor:
    """See `ops.linear`: uses torch's product, unless sums are fixed."""
    if not sums.are_fixed() or isinstance(packed, QuantisedLinear):
        return reference.linear(x, packed, bias)
    out = x.new_empty(len(x), packed.out_features)
    plan_linear(out, x, packed.weight, bias, device_of(x))()
    return out


def plan_linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, device: Device) -> Launch:
    """Return the launch of a product with fixed sums. Raises ValueError for tensors that it would misread."""
    require_rows(out, x, weight)
    blocks = tuning.linear_blocks(x.element_size(), device)
    args = {
        "out": out, "x": x, "weight": weight, "bias": bias, "num_rows": len(x), "n": weight.shape[0],
        "k": weight.shape[1], "x_stride": x.stride(0), "weight_stride": weight.stride(0), "BLOCK_M": blocks.rows,
        "BLOCK_N": blocks.n, "BLOCK_K": blocks.k, "UPCAST": device.upcast,
    }  # fmt: skip
    grid = (-(-weight.shape[0] // blocks.n), -(-len(x) // blocks.rows), 1)
    return Launch(linear_kernel, grid, args, blocks.limits)

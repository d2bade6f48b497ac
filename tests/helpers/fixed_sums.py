"""Checks of fixed sums: rows computed in a batch must have the same bits as when computed alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from helpers.kernel_cases import randn
from lora_kernels import ops
from lora_kernels.ops import BLOCK_TOKENS, PAGE_ROWS, AdapterTable, Impl, LoraSite


@contextmanager
def fixed_sums() -> Iterator[None]:
    ops.fix_sums(True)
    try:
        yield
    finally:
        ops.fix_sums(False)


def assert_linear_is_fixed(impl: Impl, dtype: torch.dtype, num_rows: int = 70) -> None:
    for width in (330, 1504):  # tile registers are used for the second width, with many rows in parts
        x, weight, bias = (
            randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(((num_rows, width), (90, width), (90,)))
        )
        packed = ops.pack_linear(weight, impl=impl)
        together = ops.linear(x, packed, bias, impl=impl)
        for first, last in ((0, 1), (3, 4), (17, 50), (num_rows - 1, num_rows)):
            assert torch.equal(ops.linear(x[first:last], packed, bias, impl=impl), together[first:last])


def assert_lora_is_fixed(impl: Impl, dtype: torch.dtype, num_rows: int = 70, *, int8: bool = False) -> None:
    """Check rows of two adapters, one with a rank of several pages. int8: use int8 rows."""
    ranks, k, widths = (5, 40), 96, (48, 33)
    num_pages = [-(-rank // PAGE_ROWS) for rank in ranks]
    pages = torch.zeros(2, 1, max(num_pages), dtype=torch.int32)
    pages[0, 0, :1], pages[1, 0, : num_pages[1]] = 3, torch.tensor([0, 2, 1], dtype=torch.int32)
    table = AdapterTable(
        torch.tensor([[rank] * len(widths) for rank in ranks], dtype=torch.int32),
        torch.full((2, len(widths)), 0.7),
        pages,
    )
    sites = [
        LoraSite(i, 0, *(randn(4 * PAGE_ROWS, n, dtype=dtype, seed=10 * i + n) for n in (k, width)))
        for i, width in enumerate(widths)
    ]  # fmt: skip
    if int8:
        factors, bytes_of = torch.rand(4 * PAGE_ROWS) / 2500, lambda rows: (rows.float() * 50).to(torch.int8)
        sites = [LoraSite(s.index, 0, bytes_of(s.a_rows), bytes_of(s.b_rows), factors) for s in sites]
    x, base = randn(num_rows, k, dtype=dtype, seed=4), [randn(num_rows, width, dtype=dtype, seed=5) for width in widths]
    slots = np.arange(num_rows, dtype=np.int32) % 2

    def run(rows: slice) -> list[Tensor]:
        outs = [out[rows].clone() for out in base]
        batch = ops.build_lora_batch(slots[rows], "cpu")
        assert batch is not None
        ops.lora_add_(outs, x[rows], sites, table, batch, impl=impl)
        return outs

    together = run(slice(None))
    for rows in (slice(0, 1), slice(1, 2), slice(8, 13), slice(20, 60)):
        for alone, beside in zip(run(rows), together, strict=True):
            assert torch.equal(alone, beside[rows])


def assert_attention_is_fixed(impl: Impl, dtype: torch.dtype, kv_len: int, window: int) -> None:
    """Check the same queries as decodes one at a time, in chunks, and with enough other sequences for all threads."""
    group, kv_heads, size = 3, 2, 32
    num_blocks = -(-kv_len // BLOCK_TOKENS)
    caches = [randn(num_blocks + 1, kv_heads, BLOCK_TOKENS, size, dtype=dtype, seed=i) for i in range(2)]
    tables = np.arange(num_blocks, dtype=np.int32)[None]
    num = 21
    q = randn(num, group * kv_heads, size, dtype=dtype, seed=3)

    def run(first: int, last: int, num_others: int = 0) -> Tensor:
        lens = np.array([last - first, *[1] * num_others])
        ends = np.array([kv_len - num + last, *[1] * num_others])
        own = np.pad(tables, ((0, num_others), (0, 0)), constant_values=num_blocks)
        batch = ops.build_attention_batch(lens, ends, own, "cpu")
        rows = torch.cat([q[first:last], q[:1].expand(num_others, -1, -1)])
        out = ops.paged_attention(
            rows.contiguous(), caches[0], caches[1], batch, scale=size**-0.5, window=window, impl=impl
        )
        return out[: last - first]

    together = run(0, num, num_others=9)
    for first, last in ((0, 1), (4, 5), (num - 1, num), (2, 13), (13, num)):
        assert torch.equal(run(first, last), together[first:last])
        assert torch.equal(run(first, last, num_others=3), together[first:last])

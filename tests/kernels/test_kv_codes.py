"""Int8 caches: writes produce the codes of `kv_codes`, and attention over codes equals attention over their values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.kernel_cases import AttentionCase, AttentionOptions, assert_close, attention_case

from lora_kernels import kv_codes, ops
from lora_kernels.ops import Impl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIXED = (1, 33, 1, 2, 7), (65, 33, 16, 90, 600)
OPTIONS: list[AttentionOptions] = [{}, {"window": 20}, {"window": 33, "softcap": 5.0, "sinks": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("head_dims", [(64, 64), (20, 12), (192, 128)], ids=str)
def test_attention_is_that_of_the_decoded_cache(
    options: AttentionOptions, head_dims: tuple[int, int], impl: Impl
) -> None:
    for dtype in DTYPES:
        case = attention_case(*MIXED, (6, 2), head_dims, dtype, **options).coded()
        assert_close(case.run(impl), case.expected())


def test_one_long_decode(impl: Impl) -> None:
    """The decode is split over threads."""
    case = attention_case((1,), (1100,), (9, 3), (64, 64), torch.bfloat16).coded()
    assert_close(case.run(impl), case.expected())


def test_codes_are_the_references(native: Impl) -> None:
    for dtype in DTYPES:
        case = attention_case(*MIXED, (6, 2), (32, 24), dtype).coded()
        k, v = torch.randn(case.batch.num_tokens, 2, 32).to(dtype), torch.randn(case.batch.num_tokens, 2, 24).to(dtype)
        k[3], v[5, 1], k[7] = 0, 1e-30, 1e4 * k[7]
        written: list[list[torch.Tensor]] = []
        for impl in (native, "reference"):
            caches = [case.k_cache.clone(), case.v_cache.clone()]
            ops.kv_write_(k, v, caches[0], caches[1], case.batch, impl=impl)
            written.append([part for cache in caches for part in kv_codes.parts(cache)])
        for own, other in zip(*written, strict=True):
            torch.testing.assert_close(own, other, equal_nan=True, rtol=0, atol=0)


def test_a_number_is_off_by_half_a_step_at_most(impl: Impl) -> None:
    case = attention_case((40,), (40,), (2, 2), (32, 32), torch.float32).coded()
    k = torch.randn(40, 2, 32) * torch.logspace(-3, 3, 40)[:, None, None]
    ops.kv_write_(k, k, case.k_cache, case.v_cache, case.batch, impl=impl)
    slots = case.batch.slot_mapping
    decoded = kv_codes.decode(case.k_cache)[slots // 16, :, slots % 16]
    assert ((decoded - k).abs() <= k.abs().amax(-1, keepdim=True) / 253).all()
    assert (decoded != k).any()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_lost(wrong: float, impl: Impl) -> None:
    """Otherwise a text would continue with garbage instead of ending with an error."""
    for dtype in DTYPES:
        case = attention_case((20,), (20,), (2, 2), (32, 32), dtype).coded()
        k, v = torch.randn(20, 2, 32).to(dtype), torch.randn(20, 2, 32).to(dtype)
        v[3, 1, 5] = wrong
        ops.kv_write_(k, v, case.k_cache, case.v_cache, case.batch, impl=impl)
        out = case.run(impl)
        assert not out[3:, 1].isfinite().all(-1).any()
        assert out[:3, 0].isfinite().all()


@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_with_fixed_sums_a_text_in_chunks_has_the_same_bits(dtype: torch.dtype, window: int, native: Impl) -> None:
    """Although tasks of few rows read codes in place, and others pack them first."""
    case = attention_case((150,), (150,), (4, 2), (64, 64), dtype, window=window).coded()
    k, v = torch.randn(150, 2, 64).to(dtype), torch.randn(150, 2, 64).to(dtype)
    ops.fix_sums(True)
    try:
        whole, parts = (_in_chunks(case, k, v, sizes, native) for sizes in ([150], [40, 60, 49, 1]))
    finally:
        ops.fix_sums(False)
    assert torch.equal(whole, parts)


def _in_chunks(case: AttentionCase, k: torch.Tensor, v: torch.Tensor, sizes: list[int], impl: Impl) -> torch.Tensor:
    """Write a text into an empty cache and attend to it, chunk by chunk; return all outputs."""
    caches, outs, end = (torch.zeros_like(case.k_cache), torch.zeros_like(case.v_cache)), list[torch.Tensor](), 0
    for size in sizes:
        own, end = slice(end, end + size), end + size
        batch = ops.build_attention_batch(np.array([size]), np.array([end]), case.batch.block_tables.numpy(), "cpu")
        ops.kv_write_(k[own], v[own], *caches, batch, impl=impl)
        outs.append(ops.paged_attention(case.q[own], *caches, batch, impl=impl, **case.logits))
    return torch.cat(outs)


def test_rows_of_a_width_that_codes_lack_are_refused(native: Impl) -> None:
    case = attention_case((1,), (16,), (2, 2), (30, 30), torch.float32).coded()
    with pytest.raises(RuntimeError, match="rows of a multiple of 4 entries; there are 30"):
        case.run(native)

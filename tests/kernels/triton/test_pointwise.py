"""The cache write, RMS norm, rotary embedding and gated activation against the reference, in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.kernel_cases import assert_close, randn

from lora_kernels import ops
from lora_kernels.ops import Activation

DTYPES = (torch.float32, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "head_dims"), [(1, (16, 16)), (3, (24, 8)), (300, (32, 32))])
def test_kv_write(num_heads: int, head_dims: tuple[int, int], dtype: torch.dtype) -> None:
    tables = np.array([[4, 1], [2, 3]], dtype=np.int32)
    batch = ops.build_attention_batch(np.array([3, 17]), np.array([18, 17]), tables, "cpu")
    fused = randn(20, num_heads, sum(head_dims), dtype=dtype)
    k, v = fused.split(head_dims, dim=-1)
    k_cache, v_cache = (randn(5, num_heads, 16, d, dtype=dtype, seed=1) for d in head_dims)
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    ops.kv_write_(k, v, k_cache, v_cache, batch, impl="triton")
    ops.kv_write_(k, v, expected_k, expected_v, batch, impl="reference")
    assert torch.equal(k_cache, expected_k)
    assert torch.equal(v_cache, expected_v)


def test_kv_write_passes_over_negative_slots() -> None:
    batch = ops.build_attention_batch(np.array([2]), np.array([2]), np.array([[1]], dtype=np.int32), "cpu")
    batch.slot_mapping = torch.tensor([16, -1])
    k_cache, v_cache = torch.zeros(2, 1, 16, 16), torch.zeros(2, 1, 16, 16)
    ops.kv_write_(torch.ones(2, 1, 16), torch.ones(2, 1, 16), k_cache, v_cache, batch, impl="triton")
    for cache in (k_cache, v_cache):
        assert cache.sum() == 16
        assert torch.equal(cache[1, 0, 0], torch.ones(16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(dtype: torch.dtype, plus_one: bool, with_residual: bool) -> None:
    x, weight = randn(5, 200, dtype=dtype), randn(200, dtype=dtype, seed=1)
    residual = randn(5, 200, dtype=dtype, seed=2) if with_residual else None
    expected_residual = None if residual is None else residual.clone()
    actual = ops.rms_norm(x, weight, 1e-5, residual=residual, plus_one=plus_one, impl="triton")
    expected = ops.rms_norm(x, weight, 1e-5, residual=expected_residual, plus_one=plus_one, impl="reference")
    assert actual.dtype == expected.dtype
    assert_close(actual, expected)
    if residual is not None and expected_residual is not None:
        assert torch.equal(residual, expected_residual)


def test_rms_norm_of_heads_in_a_fused_projection() -> None:
    heads = randn(4, 3 * 32 + 10)[:, 10:].unflatten(1, (3, 32))
    weight = randn(32, seed=1)
    actual = ops.rms_norm(heads, weight, 1e-5, impl="triton")
    assert_close(actual, ops.rms_norm(heads, weight, 1e-5, impl="reference"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(32, 32), (24, 24), (48, 20)])
def test_rotary(dtype: torch.dtype, head_dim: int, rotary_dim: int) -> None:
    fused = randn(5, 4 * head_dim, dtype=dtype)
    expected = fused.clone()
    angles = randn(5, rotary_dim // 2, seed=1).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    q, k = fused.unflatten(1, (4, head_dim)).split([3, 1], dim=1)
    ops.rotary_(q, k, cos, sin, impl="triton")
    q, k = expected.unflatten(1, (4, head_dim)).split([3, 1], dim=1)
    ops.rotary_(q, k, cos, sin, impl="reference")
    assert_close(fused, expected)
    assert torch.equal(fused.unflatten(1, (4, head_dim))[..., rotary_dim:], expected.view(5, 4, -1)[..., rotary_dim:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # the overflow to inf is correct
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
def test_gated_act(dtype: torch.dtype, act: Activation) -> None:
    fused = 3 * randn(3, 2 * 1100, dtype=dtype)
    gate, up = fused.split(1100, dim=1)
    assert_close(ops.gated_act(gate, up, act, impl="triton"), ops.gated_act(gate, up, act, impl="reference"))

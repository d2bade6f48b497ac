"""The packed linear layer against fp32."""

from __future__ import annotations

import pytest
import torch
from helpers.kernel_cases import assert_close, poisoned_memory

from lora_kernels import ops
from lora_kernels.ops import Impl

BF16 = torch.bfloat16


def weight_and_input(n: int, k: int, m: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n + k + m)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    return weight.to(dtype), torch.randn(m, k, generator=generator).to(dtype)


def product(x: torch.Tensor, weight: torch.Tensor, impl: Impl, bias: torch.Tensor | None = None) -> torch.Tensor:
    with poisoned_memory():
        return ops.linear(x, ops.pack_linear(weight, impl=impl), bias, impl=impl)


@pytest.mark.parametrize("m", [1, 2, 3, 13, 14, 15, 16, 17, 29, 32, 33, 64, 257])
def test_rows(m: int, impl: Impl) -> None:
    """Row counts with every remainder of the register tile, and more rows than a block has."""
    for n, k in ((96, 64), (33, 130), (200, 2)):
        weight, x = weight_and_input(n, k, m, BF16)
        assert_close(product(x, weight, impl), x.float() @ weight.float().T)


@pytest.mark.parametrize(("n", "k", "m"), [(330, 4128, 65), (330, 4128, 110), (330, 4128, 257), (64, 4096, 700)])
def test_features_in_parts(n: int, k: int, m: int, native: Impl) -> None:
    """Sums over many inputs are computed in parts, stored in between, and many rows are processed in blocks."""
    weight, x = weight_and_input(n, k, m, BF16)
    assert_close(product(x, weight, native), x.float() @ weight.float().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("k", [33, 64])
def test_dtypes_and_bias(dtype: torch.dtype, k: int, impl: Impl) -> None:
    weight, x = weight_and_input(50, k, 9, dtype)
    bias = torch.linspace(-1, 1, 50).to(dtype)
    assert_close(product(x, weight, impl, bias), x.float() @ weight.float().T + bias.float())


def test_leading_dimensions_and_strided_rows(impl: Impl) -> None:
    weight, x = weight_and_input(40, 64, 12, BF16)
    packed = ops.pack_linear(weight, impl=impl)
    expected = ops.linear(x, packed, impl=impl)
    assert torch.equal(ops.linear(x.view(1, 12, 64), packed, impl=impl), expected.view(1, 12, 40))
    fused = torch.cat([x, x], dim=1)
    assert torch.equal(ops.linear(fused[:, 64:], packed, impl=impl), expected)


def test_no_rows(impl: Impl) -> None:
    weight, _ = weight_and_input(40, 64, 1, BF16)
    assert product(torch.empty(0, 64, dtype=BF16), weight, impl).shape == (0, 40)


def test_bf16_weights_are_packed(native: Impl) -> None:
    packed = ops.pack_linear(weight_and_input(40, 64, 1, BF16)[0], impl=native)
    assert packed.layout == "vnni"
    with pytest.raises(RuntimeError, match="x has 32 features; the weight takes 64"):
        ops.linear(torch.zeros(1, 32, dtype=BF16), packed, impl=native)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("sizes", [(64, 32), (40, 7, 33), (1, 31, 32)])
@pytest.mark.parametrize("width", [2, 24, 64, 70])
def test_weights_that_are_packed_together_are_those_below_each_other(
    impl: Impl, dtype: torch.dtype, sizes: tuple[int, ...], width: int
) -> None:
    weights = [torch.randn(width, size).to(dtype).T for size in sizes]
    packed = ops.pack_linear(*weights, impl=impl)
    assert torch.equal(ops.unpack_linear(packed), torch.cat(weights))
    rows = torch.tensor([[sum(sizes) - 1, 0, 3], [1, 1, sum(sizes) // 2]]) % sum(sizes)
    assert torch.equal(ops.unpack_rows(packed, rows), torch.cat(weights)[rows])


def test_the_comparison_notices_one_weight_row(native: Impl) -> None:
    weight, x = weight_and_input(40, 64, 12, BF16)
    broken = weight.clone()
    broken[17] = weight[18]
    with pytest.raises(AssertionError):
        assert_close(product(x, broken, native), x.float() @ weight.float().T)

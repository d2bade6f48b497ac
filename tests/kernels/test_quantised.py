"""Weights that stay quantized: the values of GGUF's blocks, and products with them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import product as product_of
from typing import Literal

import gguf
import numpy as np
import pytest
import torch
from helpers.fixed_sums import fixed_sums
from helpers.kernel_cases import assert_close, poisoned_memory, randn
from helpers.quantised_weights import random_weight

from lora_kernels import cpu, kv_codes, ops, quantised
from lora_kernels.ops import Impl
from lora_kernels.quantised import KINDS, Kind, QuantisedWeight

BF16 = torch.bfloat16


def oracle(weight: QuantisedWeight) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType[weight.kind.upper()]
    return torch.from_numpy(gguf.dequantize(weight.rows.numpy(), kind))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def product(
    x: torch.Tensor,
    weights: list[QuantisedWeight],
    impl: Impl,
    bias: torch.Tensor | None = None,
    *,
    int8_inputs: bool = False,
) -> torch.Tensor:
    with poisoned_memory():
        packed = replace(ops.pack_quantised(weights, impl=impl), int8_inputs=int8_inputs)
        return ops.linear(x, packed, bias, impl=impl)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_the_gguf_package(kind: Kind) -> None:
    weight = random_weight(kind, 33, 768)
    assert torch.equal(weight.dequantise(), oracle(weight))
    ids = torch.tensor([[3, 32], [0, 3]])
    assert torch.equal(weight.dequantise(ids), oracle(weight)[ids])


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantising_is_that_of_the_gguf_package(kind: Literal["q8_0", "q4_0"]) -> None:
    numbers = randn(40, 96)
    numbers[3] = 0.0
    found = quantised.quantise(numbers, kind)
    expected = gguf.quantize(numbers.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    # Rounding of a value halfway between two codes may differ.
    assert (found.rows.numpy() != expected).mean() < 0.002
    step = 1 / 127 if kind == "q8_0" else 1 / 8
    farthest = numbers.view(-1, 32).abs().amax(1).repeat_interleave(32).view(40, 96)
    assert ((found.dequantise() - numbers).abs() <= farthest * step * 1.01).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_product_is_that_of_the_numbers(kind: Kind, dtype: torch.dtype, impl: Impl) -> None:
    weight = random_weight(kind, 70, 512)
    x = randn(9, 512, dtype=dtype)
    bias = torch.linspace(-1, 1, 70).to(dtype)
    assert_close(product(x, [weight], impl, bias), x.float() @ oracle(weight).T + bias.float())


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 8, 13, 29, 33, 48, 127, 128, 129, 300])
def test_rows(rows: int, native: Impl) -> None:
    """Row counts with every remainder of the register tiles, and more rows than share a widened chunk."""
    for weight in (random_weight("q4_k", 33, 512), random_weight("q8_0", 64, 352)):
        k = weight.in_features
        for dtype in (torch.float32, BF16):
            x = randn(rows, k, dtype=dtype)
            assert_close(product(x, [weight], native), x.float() @ oracle(weight).T)


@pytest.mark.parametrize("kind", KINDS)
def test_any_width(kind: Kind, native: Impl) -> None:
    """Last chunks and panels that are not full, down to one block and one column."""
    generator = np.random.default_rng(0)
    block = quantised.block_inputs(kind)
    for _ in range(8):
        n, k = int(generator.integers(1, 100)), block * int(generator.integers(1, 1600 // block))
        weight, rows = random_weight(kind, n, k, seed=n), int(generator.integers(1, 20))
        x = randn(rows, k, dtype=BF16, seed=k)
        assert_close(product(x, [weight], native), x.float() @ oracle(weight).T)


def test_siblings_of_several_kinds(impl: Impl) -> None:
    weights = [random_weight("q4_k", 40, 256), random_weight("q6_k", 7, 256), random_weight("q4_0", 32, 256)]
    x = randn(5, 256, dtype=BF16)
    expected = torch.cat([x.float() @ oracle(weight).T for weight in weights], dim=1)
    assert_close(product(x, weights, impl), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_times_many_panels(kind: Kind, native: Impl) -> None:
    """A task may multiply several panels, and a panel may have parts, whose sums wait in memory for the next."""
    block = quantised.block_inputs(kind)
    for rows, n, k in ((65, 1000, 512 + block), (300, 410, 1280), (257, 410, 1536 + block)):
        weights = [random_weight(kind, n, k), random_weight("q8_0", 40, k)]
        x = randn(rows, k, dtype=BF16, seed=k)
        expected = torch.cat([x.float() @ oracle(weight).T for weight in weights], dim=1)
        assert_close(product(x, weights, native), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_int8_inputs(kind: Kind, dtype: torch.dtype, impl: Impl) -> None:
    """The product with rounded inputs, for every kind, tile remainders, and a last chunk that is not full."""
    block = quantised.block_inputs(kind)
    for rows, n, k in ((1, 70, 512), (9, 33, 256 + block), (13, 64, block)):
        weight, bias = random_weight(kind, n, k), torch.linspace(-1, 1, n).to(dtype)
        x = randn(rows, k, dtype=dtype)
        x[0, :32] = 0
        expected = quantised.round_inputs(x) @ oracle(weight).T + bias.float()
        assert_close(product(x, [weight], impl, bias, int8_inputs=True), expected)


def test_int8_inputs_are_rounded(native: Impl) -> None:
    """Otherwise the test above would pass with exact inputs, within its tolerance for bf16."""
    weight = random_weight("q8_0", 64, 512)
    x = randn(40, 512)
    exact, rounded = x @ oracle(weight).T, product(x, [weight], native, int8_inputs=True)
    assert 1e-3 < (rounded - exact).norm() / exact.norm() < 2e-2
    assert torch.allclose(rounded, quantised.round_inputs(x) @ oracle(weight).T, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_codes_of_inputs_are_exact(kind: Literal["q8_0", "q4_0"], native: Impl) -> None:
    """Each output is one code times its scale, times the scale of the weight's only nonzero value."""
    weight = quantised.quantise(torch.eye(256) * (8 if kind == "q4_0" else 127), kind)
    weight.rows.view(-1, quantised.row_bytes(kind, 32))[:, :2] = torch.tensor([1.0]).half().view(torch.uint8)
    factor = weight.dequantise().diagonal()
    assert torch.equal(weight.dequantise(), torch.diag(factor))
    x = randn(12, 256, seed=3)
    x[1, 5], x[2, 64:96] = 40.0, 0.5
    got = product(x, [weight], native, int8_inputs=True)
    codes, scales = kv_codes.encode(x.unflatten(-1, (-1, 32)))
    numbers = got.unflatten(-1, (-1, 32)) / scales[..., None]
    assert torch.equal(numbers.round(), codes * factor.view(-1, 32))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_are_exact_whatever_the_size_of_their_numbers(
    kind: Kind, dtype: torch.dtype, rows: int, native: Impl
) -> None:
    """Few rows are multiplied as sums of int8 codes: the error of an input is at most 2^-22 of its group's maximum.

    Magnitudes differ from group to group; within a group they go down to 2^-12 of its maximum.
    """
    weight, groups = random_weight(kind, 40, 1024), 1024 // 32
    sizes = torch.randint(-40 if dtype != torch.float16 else -6, 6, (rows, groups, 1), generator=seeded(rows))
    within = torch.randint(-12 if dtype != torch.float16 else -4, 1, (rows, groups, 32), generator=seeded(7))
    x = (randn(rows, groups, 32) * 2.0**sizes * 2.0**within).to(dtype)
    x[0, 3], x[0, 4, 1:] = 0, 0
    assert_exact(x.view(rows, -1), weight, native)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q4_k", "q8_0", "q6_k"])
def test_sums_of_the_largest_codes_and_inputs_are_exact(kind: Kind, native: Impl) -> None:
    """A group's integer is the largest that there is, of either sign. In fp32 more of equal terms would be rounded."""
    width = quantised.block_inputs(kind)
    for byte in (0x00, 0x7F, 0x80, 0xFF):
        weight = random_weight(kind, 40, width, byte=byte)
        for largest in (2 - 2.0**-23, 2 - 2.0**-15, 1.0):
            x = torch.zeros(8, width)
            x[::2, :32], x[1::2, :32] = largest, -largest
            for rows in (1, 2, 3, 8):
                assert_exact(x[:rows], weight, native)


@pytest.mark.parametrize("rows", [7, 12, 13, 30, 63, 200])
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_lose_little_whatever_the_size_of_their_numbers(
    kind: Kind, dtype: torch.dtype, rows: int, native: Impl
) -> None:
    """More rows are multiplied as 16-bit integers, or by weights in bf16: errors are at most 2^-15 of a group's
    largest input, or 2^-9 of each product."""
    weight, groups = random_weight(kind, 40, 512), 512 // 32
    sizes = torch.randint(-20 if dtype != torch.float16 else -6, 6, (rows, groups, 1), generator=seeded(rows))
    within = torch.randint(-6 if dtype != torch.float16 else -4, 1, (rows, groups, 32), generator=seeded(7))
    x = (randn(rows, groups, 32) * 2.0**sizes * 2.0**within).to(dtype)
    x[0, 3], x[0, 4, 1:] = 0, 0
    x = x.view(rows, -1)
    rounds_weights = "amx" in cpu.isa() and dtype == BF16 and rows >= 64
    of_weights = 2.0**-9 * (x.double().abs() @ oracle(weight).double().abs().T) if rounds_weights else 0.0
    assert_exact(x, weight, native, lost=2.0**-15, more=of_weights)


def test_weights_are_rounded_for_many_rows_alone(native: Impl) -> None:
    """Otherwise the tests above would pass with rounded weights for any number of rows, by the tolerance of bf16."""
    if "amx" not in cpu.isa():
        pytest.skip("only tile registers multiply by rounded weights")
    weight = random_weight("q8_0", 64, 512)
    x = torch.zeros(64, 512, dtype=BF16)
    x[:, 100], x[:, 164] = 1.0, -1.0  # of other groups, so of other scales
    exact = oracle(weight)[:, 100] - oracle(weight)[:, 164]
    rounded = oracle(weight)[:, 100].to(BF16).float() - oracle(weight)[:, 164].to(BF16).float()
    assert not torch.equal(exact.to(BF16), rounded.to(BF16))
    assert torch.equal(product(x[:63], [weight], native), exact.to(BF16).expand(63, -1))
    assert torch.equal(product(x, [weight], native), rounded.to(BF16).expand(64, -1))
    with fixed_sums():
        assert torch.equal(product(x, [weight], native), exact.to(BF16).expand(64, -1))


def assert_exact(
    x: torch.Tensor, weight: QuantisedWeight, native: Impl, lost: float = 2.0**-20, more: torch.Tensor | float = 0.0
) -> None:
    """Check a product [rows, n] within what losing that part of the largest input of each group changes.

    more: a further error to allow, of each entry.
    """
    numbers, groups = oracle(weight).double(), x.shape[1] // 32
    farthest = torch.einsum(
        "rg,ng->rn",
        x.view(-1, groups, 32).abs().amax(dim=-1).double(),
        numbers.view(-1, groups, 32).abs().sum(dim=-1),
    )
    expected, found = x.double() @ numbers.T, product(x, [weight], native).double()
    rounding = expected.abs() * torch.finfo(x.dtype).eps + torch.finfo(x.dtype).tiny
    assert ((found - expected).abs() <= lost * farthest + rounding + more).all()


@pytest.mark.parametrize("int8_inputs", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["q4_k", "q8_0"])
def test_what_is_not_finite_stays_so(kind: Kind, bad: float, int8_inputs: bool, impl: Impl) -> None:
    weight = random_weight(kind, 40, 256)
    for rows, dtype in product_of((2, 9, 70), (torch.float32, BF16)):
        x = randn(rows, 256, dtype=dtype)
        x[1, 77] = bad
        found = product(x, [weight], impl, int8_inputs=int8_inputs)
        assert found.isfinite().all(dim=1).tolist() == [row != 1 for row in range(rows)]
        assert not found[1].isfinite().any()


def test_a_row_is_the_same_beside_others(native: Impl) -> None:
    """A row's product has the same bits whatever rows are beside it: neither batch nor worker changes a token.

    Without fixed sums, few rows of exact inputs are multiplied in other ways than many.
    """
    cases: list[tuple[Kind, int]] = [("q4_0", 640), ("q4_1", 640), ("q8_0", 32 * 7), ("q5_1", 96), ("q6_k", 512)]
    for kind, width in cases:
        weight = random_weight(kind, 96, width)
        for dtype in (torch.float32, BF16):
            x = randn(150, width, dtype=dtype)
            for int8 in (False, True):
                with nullcontext() if int8 else fixed_sums():
                    alone = torch.cat([product(row, [weight], native, int8_inputs=int8) for row in x.split(1)])
                    for num in (2, 3, 7, 13, 15, 150):
                        got = product(x[:num], [weight], native, int8_inputs=int8)
                        assert torch.equal(got, alone[:num]), (kind, dtype, num, int8)


def test_strided_rows_and_none(impl: Impl) -> None:
    weight = random_weight("q4_0", 40, 64)
    x = randn(12, 64, dtype=BF16)
    fused = torch.cat([x, x], dim=1)
    assert torch.equal(product(fused[:, 64:], [weight], impl), product(x, [weight], impl))
    assert product(x[:0], [weight], impl).shape == (0, 40)


def test_what_does_not_fit_is_refused(native: Impl) -> None:
    weight = random_weight("q4_0", 40, 64)
    packed = ops.pack_quantised([weight], impl=native)
    with pytest.raises(RuntimeError, match="not packed for 32 inputs"):
        ops.linear(torch.zeros(1, 32, dtype=BF16), packed, impl=native)
    with pytest.raises(RuntimeError, match="18 for every 32 of 96 inputs"):
        ops.pack_quantised([QuantisedWeight("q4_0", weight.rows, 96)], impl=native)
    with pytest.raises(ValueError, match="blocks of 256 numbers: rows of 64"):
        quantised.row_bytes("q4_k", 64)


def test_the_comparison_notices_one_block(native: Impl) -> None:
    weight = random_weight("q6_k", 40, 512)
    x = randn(12, 512, dtype=BF16)
    rows = weight.rows.clone()
    rows[17, 210:] = weight.rows[18, 210:]
    with pytest.raises(AssertionError):
        assert_close(product(x, [QuantisedWeight("q6_k", rows, 512)], native), x.float() @ oracle(weight).T)

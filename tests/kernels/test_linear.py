"""The packed linear layer against fp32."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import assert_close, poisoned_memory

from lora_kernels import cpu, ops

BF16 = torch.bfloat16


def weight_and_input(n: int, k: int, m: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n + k + m)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    return weight.to(dtype), torch.randn(m, k, generator=generator).to(dtype)


@pytest.mark.parametrize("m", [1, 2, 3, 13, 14, 15, 16, 29, 64, 257])
def test_rows(m, impl):
    """Every remainder of the register tile, and more rows than a block has."""
    for n, k in ((96, 64), (33, 130), (200, 2)):
        weight, x = weight_and_input(n, k, m, BF16)
        with poisoned_memory():
            actual = ops.linear(x, ops.pack_linear(weight, impl=impl), impl=impl)
        assert_close(actual, x.float() @ weight.float().T)


def test_many_rows_of_many_features(native):
    """So many that the input is cut in blocks of rows."""
    weight, x = weight_and_input(64, 4096, 700, BF16)
    assert_close(ops.linear(x, ops.pack_linear(weight, impl=native), impl=native), x.float() @ weight.float().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("k", [33, 64])
def test_dtypes_and_bias(dtype, k, impl):
    weight, x = weight_and_input(50, k, 9, dtype)
    bias = torch.linspace(-1, 1, 50).to(dtype)
    actual = ops.linear(x, ops.pack_linear(weight, impl=impl), bias, impl=impl)
    assert_close(actual, x.float() @ weight.float().T + bias.float())


def test_leading_dimensions_and_strided_rows(impl):
    weight, x = weight_and_input(40, 64, 12, BF16)
    packed = ops.pack_linear(weight, impl=impl)
    expected = ops.linear(x, packed, impl=impl)
    assert torch.equal(ops.linear(x.view(1, 12, 64), packed, impl=impl), expected.view(1, 12, 40))
    fused = torch.cat([x, x], dim=1)
    assert torch.equal(ops.linear(fused[:, 64:], packed, impl=impl), expected)


def test_no_rows(impl):
    weight, _ = weight_and_input(40, 64, 1, BF16)
    assert ops.linear(torch.empty(0, 64, dtype=BF16), ops.pack_linear(weight, impl=impl), impl=impl).shape == (0, 40)


def test_bf16_weights_are_packed(native):
    packed = ops.pack_linear(weight_and_input(40, 64, 1, BF16)[0], impl=native)
    assert packed.layout == "vnni"
    with pytest.raises(RuntimeError, match="x has 32 features; the weight takes 64"):
        ops.linear(torch.zeros(1, 32, dtype=BF16), packed, impl=native)


def test_the_comparison_notices_one_weight_row(native):
    weight, x = weight_and_input(40, 64, 12, BF16)
    broken = weight.clone()
    broken[17] = weight[18]
    with pytest.raises(AssertionError):
        assert_close(ops.linear(x, ops.pack_linear(broken, impl=native), impl=native), x.float() @ weight.float().T)


def test_operators_compile_without_graph_breaks(native):
    weight, x = weight_and_input(48, 64, 5, BF16)
    packed, norm_weight = ops.pack_linear(weight, impl=native), torch.ones(64, dtype=BF16)

    def layer(x: torch.Tensor) -> torch.Tensor:
        gate, up = ops.linear(ops.rms_norm(x, norm_weight, 1e-5, impl=native), packed, impl=native).chunk(2, dim=-1)
        return ops.gated_act(gate, up, impl=native)

    expected = layer(x)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)


def test_registered_operators_are_consistent():
    """torch's own check: schema, fake kernels, and what each operator says it mutates."""
    if not cpu.load():
        return
    native = torch.ops.lorafleet
    weight, x = weight_and_input(48, 64, 5, BF16)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(native.pack_linear.default, (weight,), test_utils=checks)
    packed = native.pack_linear(weight)
    torch.library.opcheck(native.linear.default, (x, packed, None, 48), test_utils=checks)
    residual = torch.ones_like(x)
    torch.library.opcheck(native.rms_norm.default, (x, x[0].clone(), 1e-5, residual, False), test_utils=checks)
    torch.library.opcheck(native.gated_act.default, (x, x.clone(), "silu"), test_utils=checks)
    q, k, cos = torch.randn(5, 2, 8), torch.randn(5, 1, 8), torch.rand(5, 8)
    torch.library.opcheck(native.rotary_.default, (q, k, cos, cos.clone()), test_utils=checks)

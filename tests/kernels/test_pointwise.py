"""RMS norm, rotary embedding, gated activation, masks and argmax against torch, and Hugging Face's own modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.kernel_cases import assert_close, randn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from lora_kernels import ops
from lora_kernels.ops import Activation, Impl

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 64), (5, 33), (70, 576)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm_is_hugging_faces(shape: tuple[int, int], plus_one: bool, dtype: torch.dtype, impl: Impl) -> None:
    x = randn(*shape, dtype=dtype) * 3
    module = (GemmaRMSNorm if plus_one else LlamaRMSNorm)(shape[1], eps=1e-2).to(dtype)
    module.weight.data = randn(shape[1], dtype=dtype, seed=1)
    actual = ops.rms_norm(x, module.weight.data, 1e-2, plus_one=plus_one, impl=impl)
    assert_close(actual, module(x).detach())
    assert not torch.allclose(actual, ops.rms_norm(x, module.weight.data, 1e-2, plus_one=not plus_one, impl=impl))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_adds_the_residual_first(shape: tuple[int, int], dtype: torch.dtype, impl: Impl) -> None:
    x, residual, weight = (randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1), randn(shape[1], dtype=dtype))
    total = x + residual
    kept = x.clone()
    actual = ops.rms_norm(x, weight, 1e-5, residual=residual, impl=impl)
    assert torch.equal(residual, total)
    assert torch.equal(x, kept)
    assert torch.equal(actual, ops.rms_norm(total, weight, 1e-5, impl=impl))


def test_rms_norm_of_strided_rows(impl: Impl) -> None:
    fused = randn(9, 100, dtype=torch.bfloat16)
    weight = randn(40, dtype=torch.bfloat16)
    assert torch.equal(
        ops.rms_norm(fused[:, 60:], weight, 1e-5, impl=impl),
        ops.rms_norm(fused[:, 60:].contiguous(), weight, 1e-5, impl=impl),
    )


def test_rms_norm_of_transposed_rows(impl: Impl) -> None:
    x, weight = randn(24, 5).T, randn(24, seed=1)
    expected = ops.rms_norm(x.contiguous(), weight, 1e-6, impl=impl)
    assert_close(ops.rms_norm(x, weight, 1e-6, impl=impl), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_are_gated_where_they_lie(dtype: torch.dtype, impl: Impl) -> None:
    both = randn(7, 3, 40, dtype=dtype, seed=1) * 4  # each head's values, followed by its gate
    x, gate = both[..., :20], both[..., 20:]
    expected, gates = x.float() * torch.sigmoid(gate.float()), gate.clone()
    ops.gate_heads_(x, gate, impl=impl)
    assert_close(x, expected, dtype)
    assert torch.equal(gate, gates)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (20, 20), (64, 16)])
def test_rotary_is_hugging_faces(head_dim: int, rotary_dim: int, dtype: torch.dtype, impl: Impl) -> None:
    tokens, q_heads, k_heads = 37, 6, 2
    fused = randn(tokens, (q_heads + k_heads) * head_dim, dtype=dtype)
    angles = torch.arange(tokens)[:, None] * 0.7 ** torch.arange(rotary_dim // 2)
    angles = torch.cat([angles, angles], dim=-1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    q, k = fused.split([q_heads * head_dim, k_heads * head_dim], dim=1)
    q, k = q.view(tokens, q_heads, head_dim), k.view(tokens, k_heads, head_dim)
    before_q, before_k = q.clone(), k.clone()

    heads_first = [part[None, :, :, :rotary_dim].float().transpose(1, 2) for part in (before_q, before_k)]
    turned = apply_rotary_pos_emb(heads_first[0], heads_first[1], cos[None].float(), sin[None].float())
    ops.rotary_(q, k, cos, sin, impl=impl)
    for actual, before, expected in zip((q, k), (before_q, before_k), turned, strict=True):
        assert_close(actual[..., :rotary_dim], expected[0].transpose(0, 1), dtype)
        assert torch.equal(actual[..., rotary_dim:], before[..., rotary_dim:])
        assert not torch.equal(actual, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_act(shape: tuple[int, int], dtype: torch.dtype, impl: Impl) -> None:
    fused = randn(shape[0], 2 * shape[1], dtype=dtype) * 4
    gate, up = fused.chunk(2, dim=1)
    expected: dict[Activation, torch.Tensor] = {
        "silu": F.silu(gate.float()),
        "gelu": F.gelu(gate.float()),
        "gelu_tanh": F.gelu(gate.float(), approximate="tanh"),
    }
    for act, activated in expected.items():
        assert_close(ops.gated_act(gate, up, act, impl=impl), activated * up.float())
    with pytest.raises(AssertionError):
        assert_close(ops.gated_act(up, gate, "silu", impl=impl), expected["silu"] * up.float())


def test_activations_are_right_far_out(native: Impl) -> None:
    """At zero, and where exp overflows or underflows."""
    gate = torch.tensor([[0.0, -0.0, 1e-30, -200.0, 200.0, 89.0, -89.0, -104.0, 1e38, -1e38]])
    up = torch.ones_like(gate)
    functions: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "gelu": F.gelu}
    for act, function in functions.items():
        torch.testing.assert_close(ops.gated_act(gate, up, act, impl=native), function(gate), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 31, 96, 5000])
def test_mask_logits_forbids_what_has_no_bit(vocab: int, dtype: torch.dtype, impl: Impl) -> None:
    may = torch.rand(3, -(-vocab // 32) * 32, generator=torch.Generator().manual_seed(vocab)) < 0.5
    words = (may.view(3, -1, 32).long() << torch.arange(32)).sum(-1).to(torch.int32)
    wide = randn(5, vocab + 7, dtype=dtype)
    before, logits = wide.clone(), wide[:, 3 : 3 + vocab]
    ops.mask_logits_(logits, torch.tensor([4, 0, 2]), words, impl=impl)
    expected = before.clone()
    for row, allowed in zip((4, 0, 2), may, strict=True):
        for token in range(vocab):
            if not allowed[token]:
                expected[row, 3 + token] = -torch.inf
    assert torch.equal(wide, expected)
    assert not torch.equal(wide, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 33, 5000])
def test_argmax_is_the_first_of_the_largest(vocab: int, dtype: torch.dtype, impl: Impl) -> None:
    x = randn(8, vocab, dtype=dtype)  # bf16 has few values, so that many are equal
    x[1] = -x[1].abs() - 1  # no value above zero
    x[2] = -torch.inf
    x[2, vocab // 2] = -5
    x[3] = x[3, 0]
    x[4] = -torch.inf
    x[5, vocab // 3] = torch.inf
    x[6, -1], x[7, 0] = torch.nan, -torch.tensor(torch.nan, dtype=dtype)
    ids, finite = ops.argmax(x, impl=impl)
    assert ids[:6].tolist() == [int((row == row.max()).nonzero()[0]) for row in x[:6]]
    assert ((ids >= 0) & (ids < vocab)).all()
    assert finite.tolist() == [True] * 4 + [False] * 4

"""Gated delta rules and causal convolutions against transformers, in runs of many sequences' states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.kernel_cases import assert_close, poisoned_memory, randn
from torch import Tensor
from transformers.models.kimi_linear.modeling_kimi_linear import (
    chunk_kimi_delta_attention,
    recurrent_kimi_delta_attention,
)
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    causal_conv1d_fn,
    causal_conv1d_update,
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from lora_kernels import ops
from lora_kernels.ops import GatedDelta, GatedScan, Impl

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 6, 16, 24), (4, 4, 128, 128), (1, 3, 33, 7)]
"""Key heads, value heads, key dimension, value dimension."""

RUNS = torch.tensor([[0, 1, 2, 2, -1], [1, 2, 0, 3, -1], [2, 72, 5, 1, -1], [72, 75, 1, 1, 4], [75, 76, 5, 0, -1]])
"""A token in its slot, a token to another slot, a prompt, its second part with a saved state, a prompt of a token."""

NUM_SLOTS, NUM_TOKENS, ZERO = 6, 76, 5


def delta_inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, *, per_channel: bool = False) -> dict[str, Any]:
    key_heads, heads, key_dim, width = shape
    decays = (NUM_TOKENS, heads, key_dim) if per_channel else (NUM_TOKENS, heads)
    return {
        "q": randn(NUM_TOKENS, key_heads, key_dim, dtype=dtype),
        "k": randn(NUM_TOKENS, key_heads, key_dim, dtype=dtype, seed=1),
        "v": randn(NUM_TOKENS, heads, width, dtype=dtype, seed=2),
        "g": -torch.exp(randn(*decays, seed=3)), "beta": torch.sigmoid(randn(NUM_TOKENS, heads, seed=4)),
    }  # fmt: skip


def states_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    states = randn(NUM_SLOTS, *shape, dtype=dtype, seed=5)
    states[ZERO] = 0
    return states


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_delta_rule_is_transformers(
    shape: tuple[int, int, int, int], per_channel: bool, dtype: torch.dtype, impl: Impl
) -> None:
    if per_channel:  # Kimi's function has as many key heads as value heads
        shape = (shape[1], *shape[1:])
    many, one = (
        (chunk_kimi_delta_attention, recurrent_kimi_delta_attention)
        if per_channel
        else (torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule)
    )
    given, begin = delta_inputs(shape, dtype, per_channel=per_channel), states_of(*shape[1:])
    states, expected = begin.clone(), begin.clone()
    with poisoned_memory():
        out = ops.delta_rule(**given, states=states, runs=RUNS, normalize=True, impl=impl)
    for start, end, read, write, save in RUNS.tolist():
        parts = (x[None, start:end].float() for x in given.values())
        theirs, left = (many if end - start > 1 else one)(
            *parts, initial_state=expected[read][None], output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        expected[write] = left[0]
        if save >= 0:
            expected[save] = left[0]
        assert_close(out[start:end], theirs[0], dtype)
    assert_close(states, expected)
    assert not torch.allclose(out[0].float(), out[1].float())


def test_a_delta_rule_without_its_options(impl: Impl) -> None:
    given, states = delta_inputs((2, 2, 16, 16), torch.float32), states_of(2, 16, 16)
    expected, left = torch_recurrent_gated_delta_rule(
        *(x[None, :9] for x in given.values()), initial_state=states[:1], output_final_state=True
    )
    out = ops.delta_rule(**given, states=states, runs=torch.tensor([[0, 9, 0, 0, -1]]), impl=impl)
    torch.testing.assert_close(out[:9], expected[0], rtol=1e-4, atol=1e-4)  # keys of length 4 let the state grow
    torch.testing.assert_close(states[0], left[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_additive_rule_is_mamba2s_scan(shape: tuple[int, int, int, int], impl: Impl) -> None:
    given, begin = delta_inputs(shape, torch.float32), states_of(*shape[1:])
    rates = -torch.exp(randn(shape[1], seed=6))
    given["g"], states, expected = given["beta"] * rates, begin.clone(), begin.clone()
    out = ops.delta_rule(**given, states=states, runs=RUNS, additive=True, impl=impl)
    query = given["q"] * shape[2] ** -0.5
    for start, end, read, write, save in RUNS.tolist():
        x, dt, key, c = (part[None, start:end] for part in (given["v"], given["beta"], given["k"], query))
        theirs, left = mamba2_chunk_scan(
            x, dt, rates, key, c, chunk_size=16, initial_states=expected[read].mT[None], return_final_states=True
        )
        expected[write] = left[0].mT
        if save >= 0:
            expected[save] = left[0].mT
        assert_close(out[start:end], theirs[0], torch.float32)
    assert_close(states, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gated_delta_rule_is_its_operations(dtype: torch.dtype, impl: Impl) -> None:
    heads, key_dim, width, taps = 6, 16, 24, 4
    channels = 2 * 2 * key_dim + heads * width
    fused = randn(NUM_TOKENS, channels + 2 * heads, dtype=dtype)
    qkv, b, a = fused.split([channels, heads, heads], 1)
    weight, bias = randn(channels, taps, dtype=dtype, seed=1), randn(channels, dtype=dtype, seed=2)
    rates, dt_bias = -torch.exp(randn(heads, seed=3)), randn(heads, seed=4)
    convs, rules = states_of(taps, channels, dtype=dtype), states_of(heads, key_dim, width)
    layer = GatedDelta(weight, bias, convs.clone(), rates, dt_bias, rules.clone())
    with poisoned_memory():
        out = ops.gated_delta(qkv, b, a, layer, RUNS, impl=impl)
    mixed = ops.causal_conv(qkv, weight, convs, RUNS, bias=bias, silu=True, impl=impl)
    q, k, v = mixed.split([2 * key_dim, 2 * key_dim, heads * width], 1)
    parts = (q.unflatten(1, (2, key_dim)), k.unflatten(1, (2, key_dim)), v.unflatten(1, (heads, width)))
    decay = rates * torch.nn.functional.softplus(a.float() + dt_bias)
    expected = ops.delta_rule(*parts, decay, torch.sigmoid(b), rules, RUNS, normalize=True, impl=impl)
    assert_close(out, expected, dtype)
    assert torch.equal(layer.conv_states, convs)
    assert_close(layer.states, rules, torch.float32 if dtype == torch.float32 else dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [24, 72, 144])
def test_a_gated_scan_is_its_definition(group: int, dtype: torch.dtype, native: Impl) -> None:
    heads, key_dim, width, taps = 6, 16, 24, 4
    inner, channels = heads * width, heads * width + 2 * 2 * key_dim
    gate, xbc, dt = randn(NUM_TOKENS, inner + channels + heads, dtype=dtype).split([inner, channels, heads], 1)
    weight, bias = randn(channels, taps, dtype=dtype, seed=1), randn(channels, dtype=dtype, seed=2)
    vectors = (-torch.exp(randn(heads, seed=3)), randn(heads, seed=4), randn(heads, seed=6))
    norm, found = 1 + 0.1 * randn(inner, dtype=dtype, seed=7), []
    for impl in (native, "reference"):
        convs, states = states_of(taps, channels, dtype=dtype), states_of(heads, key_dim, width)
        layer = GatedScan(weight, bias, convs, *vectors, states, norm, 1e-5, group)
        with poisoned_memory():
            found.append((ops.gated_scan(gate, xbc, dt, layer, RUNS, impl=impl), convs, states))
    (out, convs, states), (expected, theirs, left) = found
    assert torch.equal(convs, theirs)
    assert_close(out, expected, dtype)
    assert_close(states, left, dtype)


def test_decays_far_out_forget_or_keep_all(impl: Impl) -> None:
    given, states = delta_inputs((1, 1, 16, 16), torch.float32), states_of(1, 16, 16)
    given["g"][:2], before = torch.tensor([[-1e4], [0.0]]), states.clone()
    given["beta"][:2] = 0.0
    runs = torch.tensor([[0, 1, 0, 0, -1], [1, 2, 1, 1, -1]])
    ops.delta_rule(**given, states=states, runs=runs, impl=impl)
    assert not states[0].any()
    assert torch.equal(states[1:], before[1:])


def test_heads_of_one_projection_are_read_where_they_lie(impl: Impl) -> None:
    given, fused = delta_inputs((2, 2, 16, 16), torch.float32), randn(NUM_TOKENS, 96, seed=9)
    parts = [part.unflatten(1, (2, 16)) for part in fused.split(32, 1)]
    apart = {**given, **dict(zip("qkv", parts, strict=True))}
    together = {name: x.contiguous() for name, x in apart.items()}
    first, second = states_of(2, 16, 16), states_of(2, 16, 16)
    out = ops.delta_rule(**apart, states=first, runs=RUNS, normalize=True, impl=impl)
    assert torch.equal(ops.delta_rule(**together, states=second, runs=RUNS, normalize=True, impl=impl), out)
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "taps"), [(40, 4), (200, 2), (7, 3)])
@pytest.mark.parametrize("options", [True, False])
def test_a_convolution_is_transformers(channels: int, taps: int, options: bool, dtype: torch.dtype, impl: Impl) -> None:
    x, weight = randn(NUM_TOKENS, channels, dtype=dtype), randn(channels, taps, dtype=dtype, seed=1)
    bias, activation = (randn(channels, dtype=dtype, seed=2), "silu") if options else (None, None)
    states = states_of(taps, channels, dtype=dtype)
    expected = states.clone()
    with poisoned_memory():
        out = ops.causal_conv(x, weight, states, RUNS, bias=bias, silu=options, impl=impl)
    wide = (weight.float(), None if bias is None else bias.float(), activation)
    for start, end, read, write, save in RUNS.tolist():
        own = expected[read].T[None].float().clone()
        part = x[start:end].T[None].float()
        if end - start == 1:
            theirs = causal_conv1d_update(part, own, *wide)
        else:
            whole = torch.cat((own, part), -1)
            theirs, own = causal_conv1d_fn(whole, *wide)[..., taps:], whole[..., -taps:]
        expected[write] = own[0].T.to(dtype)
        if save >= 0:
            expected[save] = own[0].T.to(dtype)
        assert_close(out[start:end], theirs[0].T, dtype)
    assert torch.equal(states, expected)
    assert not torch.allclose(out[0].float(), out[1].float())


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([[0, 0, 0, 0, -1]], "tokens 0 to 0 of 76"),
        ([[70, 77, 0, 0, -1]], "tokens 70 to 77 of 76"),
        ([[0, 1, NUM_SLOTS, 0, -1]], "a slot that is not there"),
        ([[0, 1, 0, -1, -1]], "a slot that is not there"),
        ([[0, 1, 0, 0, NUM_SLOTS]], "a slot that is not there"),
    ],
)
def test_runs_of_what_is_not_there_are_refused(runs: list[list[int]], message: str, native: Impl) -> None:
    given, table = delta_inputs((1, 1, 8, 8), torch.float32), torch.tensor(runs)
    with pytest.raises(RuntimeError, match=message):
        ops.delta_rule(**given, states=states_of(1, 8, 8), runs=table, impl=native)
    with pytest.raises(RuntimeError, match=message):
        ops.causal_conv(randn(NUM_TOKENS, 8), randn(8, 4), states_of(4, 8), table, impl=native)


@pytest.mark.parametrize("sizes", [(0, 8, 8), (2, 0, 8), (2, 8, 0)], ids=str)
def test_states_without_entries_are_refused(sizes: tuple[int, int, int], native: Impl) -> None:
    heads, key_dim, width = sizes
    inner, channels = heads * width, heads * width + 2 * 2 * key_dim
    convs, states, one = states_of(4, channels), states_of(*sizes), randn(heads)
    runs = torch.tensor([[0, 3, 0, 0, -1]])
    delta = GatedDelta(randn(channels, 4), None, convs, one, one, states)
    with pytest.raises(RuntimeError, match="states have no entries"):
        ops.gated_delta(randn(3, channels), randn(3, heads), randn(3, heads), delta, runs, impl=native)
    scan = GatedScan(randn(channels, 4), None, convs, one, one, one, states, randn(inner), 1e-5, max(inner, 8))
    with pytest.raises(RuntimeError, match="states have no entries"):
        ops.gated_scan(randn(3, inner), randn(3, channels), randn(3, heads), scan, runs, impl=native)

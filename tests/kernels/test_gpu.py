"""Every operation on a CUDA device: against fp32, captured in a graph, and without waiting for the device.

Written without access to a GPU: none of it has run yet. `benchmarks/gpu/kernels.py` times the same operations.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from helpers.expert_cases import expert_case
from helpers.kernel_cases import (
    DISTRIBUTIONS,
    RANKS,
    AttentionOptions,
    Distribution,
    LoraCase,
    assert_close,
    attention_case,
    lora_case,
    token_slots,
)

from gpu_worker.cuda.waits import no_waits
from lora_kernels import ops
from lora_kernels.experts import expert_batch, order_by_expert
from lora_kernels.ops import Activation

# cuBLAS requires this where uninitialized memory is filled (kernel_cases.poisoned_memory). CUDA reads it at its start.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),  # the first run compiles every variant
]

DEVICE = "cuda"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check(case: LoraCase) -> None:
    expected = case.expected()
    actual = case.run("triton")
    again = case.run("triton")
    for out, repeated, answer in zip(actual, again, expected, strict=True):
        assert_close(out, answer)
        assert torch.equal(out, repeated), "the same step must give the same bits"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("num_tokens", [1, 7, 32, 257, 1000])
def test_lora_for_every_mix(distribution: Distribution, num_tokens: int, dtype: torch.dtype) -> None:
    slots = token_slots(distribution, num_tokens, num_slots=12, seed=num_tokens)
    if (slots < 0).all():
        slots[0] = 2
    ranks = [16, 8, 64, 3, 128, 1, 16, 48, 32, 16, 8, 16]
    check(lora_case(slots, ranks, 576, (576, 192, 200), dtype, row_scales=num_tokens == 7, device=DEVICE))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("num_tokens", [4, 300])
def test_lora_for_every_rank(rank: int, num_tokens: int) -> None:
    slots = np.where(np.arange(num_tokens) % 50 == 1, 1, 0)
    check(lora_case(slots, [rank, 16], 4096, (1024,), torch.bfloat16, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_of_one_adapter_by_library_products(dtype: torch.dtype) -> None:
    """Rows of one adapter with one page are always in order, and the step is long: library products serve it."""
    check(lora_case(np.zeros(600, dtype=int), [16], 1024, (512, 512), dtype, device=DEVICE))


def test_lora_never_waits_for_the_device() -> None:
    case = lora_case(token_slots("zipf", 64, 8), [16] * 8, 1024, (1024, 256), torch.bfloat16, device=DEVICE)
    case.run("triton")
    outs = [out.clone() for out in case.outs]
    with no_waits():
        ops.lora_add_(outs, case.x, case.sites, case.table, case.batch, impl="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 128), (32, 128), (500, 6)])
def test_lora_on_experts_without_waiting(num_tokens: int, num_experts: int, dtype: torch.dtype) -> None:
    case = expert_case(
        num_tokens, [16, 3, 0, 40], num_experts=num_experts, top_k=4, k=256, n=192, dtype=dtype, device=DEVICE
    )
    case.slots[-1] = 3
    expected, found = case.expected(), case.run("triton")
    assert_close(found, expected.to(DEVICE))
    assert torch.equal(case.run("triton"), found), "the same step must give the same bits"
    slots = torch.from_numpy(case.slots).to(DEVICE)
    with no_waits():
        order = order_by_expert(case.expert_ids, slots, num_experts, len(case.first_pages))
        expert_batch(order, case.pages, case.first_pages, None)


def test_one_graph_serves_any_mix() -> None:
    """The graph is captured with an empty list of rows and replayed with other lists, an empty one among them."""
    num_tokens, ranks = 64, [16, 3, 64, 8, 128]
    mixes = [token_slots(d, num_tokens, len(ranks)) for d in ("identical", "distinct", "zipf", "some base", "none")]
    case = lora_case(mixes[0], ranks, 1024, (1024, 256), torch.bfloat16, device=DEVICE)
    case.batch = ops.recordable_lora_batch(num_tokens, DEVICE)
    outs = [out.clone() for out in case.outs]

    def step() -> None:
        for out, original in zip(outs, case.outs, strict=True):
            out.copy_(original)
        ops.lora_add_(outs, case.x, case.sites, case.table, case.batch, impl="triton")

    graph = capture(step)
    for slots in mixes:
        batch = ops.build_lora_batch(slots, DEVICE)
        expected = [out.float() for out in case.outs]
        if batch is None:
            case.batch.buffer.zero_()
        else:
            case.batch.buffer.copy_(batch.buffer)
            expected = LoraCase(case.outs, case.x, case.sites, case.table, batch).expected()
        graph.replay()
        for out, answer in zip(outs, expected, strict=True):
            assert_close(out, answer)


def capture(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Run a step on a side stream, as CUDA graphs require, then capture and return it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dims"),
    [((32, 8), (128, 128)), ((9, 3), (64, 64)), ((16, 16), (192, 128)), ((16, 8), (256, 256)), ((71, 1), (64, 64))],
)
@pytest.mark.parametrize("options", [{}, {"window": 100, "softcap": 30.0, "sinks": True}], ids=["plain", "options"])
@pytest.mark.parametrize(
    ("query_lens", "kv_lens"),
    [((1,), (5000,)), ((1,) * 20, tuple(range(1, 4000, 200))), ((300, 77), (900, 77)), ((1, 1, 200), (64, 700, 333))],
    ids=["one decode", "decodes", "chunks", "mixed"],
)
def test_attention(
    query_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    options: AttentionOptions,
    dtype: torch.dtype,
) -> None:
    case = attention_case(query_lens, kv_lens, heads, head_dims, dtype, device=DEVICE, **options)
    actual = case.run("triton")
    assert_close(actual, case.expected())
    assert torch.equal(actual, case.run("triton")), "the same step must give the same bits"


def test_attention_never_waits_for_the_device() -> None:
    case = attention_case((1,) * 8, (700,) * 8, (32, 8), (128, 128), torch.bfloat16, device=DEVICE)
    case.run("triton")
    with no_waits():
        ops.paged_attention(case.q, case.k_cache, case.v_cache, case.batch, impl="triton", **case.logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_write(dtype: torch.dtype) -> None:
    tables = np.array([[4, 1], [2, 3]], dtype=np.int32)
    batch = ops.build_attention_batch(np.array([3, 17]), np.array([18, 17]), tables, DEVICE)
    k, v = torch.randn(20, 8, 128 + 64, device=DEVICE).to(dtype).split([128, 64], dim=-1)
    k_cache, v_cache = (torch.randn(5, 8, 16, d, device=DEVICE).to(dtype) for d in (128, 64))
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    ops.kv_write_(k, v, k_cache, v_cache, batch, impl="triton")
    ops.kv_write_(k, v, expected_k, expected_v, batch, impl="reference")
    assert torch.equal(k_cache, expected_k)
    assert torch.equal(v_cache, expected_v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pointwise(dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 33, 4096, device=DEVICE).to(dtype)
    weight = torch.randn(4096, device=DEVICE).to(dtype)
    for plus_one in (False, True):
        carried, expected_carried = residual.clone(), residual.clone()
        normed = ops.rms_norm(x, weight, 1e-5, residual=carried, plus_one=plus_one, impl="triton")
        expected = ops.rms_norm(x, weight, 1e-5, residual=expected_carried, plus_one=plus_one, impl="reference")
        assert_close(normed, expected)
        assert torch.equal(carried, expected_carried)
    for act in get_args(Activation):
        assert_close(ops.gated_act(x, residual, act, impl="triton"), ops.gated_act(x, residual, act, impl="reference"))
    angles = torch.randn(33, 64, device=DEVICE).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    rotated, expected = x.clone(), x.clone()
    q, k = rotated.unflatten(1, (32, 128)).split([24, 8], dim=1)
    ops.rotary_(q, k, cos, sin, impl="triton")
    q, k = expected.unflatten(1, (32, 128)).split([24, 8], dim=1)
    ops.rotary_(q, k, cos, sin, impl="reference")
    assert_close(rotated, expected)

"""Paged attention against the fp32 reference, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from helpers.kernel_cases import AttentionCase, AttentionOptions, assert_close, attention_case, poisoned_memory

from lora_kernels.triton_ops import attention
from lora_kernels.triton_ops.launch import Launch, device_of

FP32, FP16 = torch.float32, torch.float16
DECODES = (1, 1, 1), (1, 37, 130)
CHUNKS = (40, 3, 17), (40, 80, 17)
MIXED = (1, 33, 1, 2), (65, 33, 16, 90)
STEPS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {"decodes": DECODES, "chunks": CHUNKS, "mixed": MIXED}


def check(case: AttentionCase) -> None:
    assert_close(case.run("triton"), case.expected())


def check_launches(case: AttentionCase) -> list[Launch]:
    """Check the answer and return the launches that computed it."""
    launches: list[Launch] = []
    with poisoned_memory():
        out = case.q.new_empty(*case.q.shape[:2], case.v_cache.shape[3])
        logits = attention.Logits(**case.logits)
        plan = attention.plan_attention(out, case.q, case.k_cache, case.v_cache, case.batch, logits, device_of(case.q))
        for launch in plan:
            launches.append(launch)
            launch()
    assert_close(out, case.expected())
    return launches


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("heads", "head_dims", "dtype"),
    [((4, 4), (16, 16), FP32), ((6, 2), (32, 32), FP16), ((9, 1), (24, 12), FP32)],
)
def test_matches_reference(step: str, heads: tuple[int, int], head_dims: tuple[int, int], dtype: torch.dtype) -> None:
    query_lens, kv_lens = STEPS[step]
    check(attention_case(query_lens, kv_lens, heads, head_dims, dtype))


@pytest.mark.parametrize(
    ("step", "options"),
    [
        *(("mixed", options) for options in ({"window": 1}, {"window": 20}, {"softcap": 2.0}, {"sinks": True})),
        *((step, {"window": 33, "softcap": 5.0, "sinks": True}) for step in STEPS),
    ],
    ids=str,
)
def test_matches_reference_with_options(step: str, options: AttentionOptions) -> None:
    query_lens, kv_lens = STEPS[step]
    plain = attention_case(query_lens, kv_lens, (6, 2), (32, 16), FP32)
    case = attention_case(query_lens, kv_lens, (6, 2), (32, 16), FP32, **options)
    assert not torch.allclose(case.expected(), plain.expected(), atol=1e-2), "the option must change the answer"
    check(case)


@pytest.mark.parametrize("query_len", [2, 4, 5])
def test_short_queries_are_served_as_decodes(query_len: int) -> None:
    """In a step with speculation, each sequence's tokens are one tile, and its keys are split over programs."""
    launches = check_launches(attention_case((query_len, 1, query_len), (100, 7, query_len), (8, 1), (16, 16), FP32))
    assert [launch.kernel for launch in launches] == [attention.attention_kernel, attention.reduce_kernel]


def test_splits_keys_by_the_batch_shape_alone() -> None:
    """The grid may not depend on lengths, so that a captured graph serves any length."""
    grids: set[tuple[int, int, int]] = set()
    for kv_len in (1, 16, 17, 300):
        launches = check_launches(attention_case((1,), (kv_len,), (4, 2), (16, 16), FP32))
        grids |= {launch.grid for launch in launches if launch.kernel is attention.attention_kernel}
    [grid] = grids
    assert grid[2] > 1


def test_passes_over_sequences_without_queries() -> None:
    """Such sequences pad a captured graph and must not change the answers of others."""
    case = attention_case((1, 1), (20, 35), (4, 2), (16, 16), FP32)
    expected = case.expected()
    case.batch.query_starts = torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32)
    case.batch.kv_lens = torch.tensor([20, 35, 0, 0], dtype=torch.int32)
    case.batch.block_tables = torch.cat([case.batch.block_tables, torch.zeros_like(case.batch.block_tables)])
    case.batch.num_seqs = 4
    assert_close(case.run("triton"), expected)


def test_reads_queries_of_any_stride() -> None:
    case = attention_case(MIXED[0], MIXED[1], (6, 2), (32, 32), FP32)
    fused = torch.randn(case.q.shape[0], 6 * 32 + 8)
    fused[:, 8:] = case.q.flatten(1)
    strided = fused[:, 8:].unflatten(1, (6, 32))
    expected = case.expected()
    case.q = strided
    assert not strided.is_contiguous()
    assert_close(case.run("triton"), expected)

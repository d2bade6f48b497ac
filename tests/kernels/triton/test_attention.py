"""Paged attention against the fp32 reference, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import AttentionCase, assert_close, attention_case

from lora_kernels.triton_ops import attention
from lora_kernels.triton_ops.launch import Launch

FP32, FP16 = torch.float32, torch.float16
DECODES = (1, 1, 1), (1, 37, 130)
CHUNKS = (40, 3, 17), (40, 80, 17)
MIXED = (1, 33, 1, 2), (65, 33, 16, 90)
STEPS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {"decodes": DECODES, "chunks": CHUNKS, "mixed": MIXED}


def check(case: AttentionCase) -> None:
    assert_close(case.run("triton"), case.expected())


@pytest.fixture
def launches(monkeypatch) -> list[Launch]:
    ran = []
    launch = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self: (ran.append(self), launch(self)))
    return ran


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("heads", "head_dims"), [((4, 4), (16, 16)), ((6, 2), (32, 32)), ((9, 1), (24, 12))])
@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_matches_reference(step, heads, head_dims, dtype):
    query_lens, kv_lens = STEPS[step]
    check(attention_case(query_lens, kv_lens, heads, head_dims, dtype))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 20},
        {"softcap": 2.0},
        {"sinks": True},
        {"window": 33, "softcap": 5.0, "sinks": True},
    ],
    ids=str,
)
def test_matches_reference_with_options(step, options):
    query_lens, kv_lens = STEPS[step]
    plain = attention_case(query_lens, kv_lens, (6, 2), (32, 16), FP32)
    case = attention_case(query_lens, kv_lens, (6, 2), (32, 16), FP32, **options)
    assert not torch.allclose(case.expected(), plain.expected(), atol=1e-2), "the option must change the answer"
    check(case)


@pytest.mark.parametrize("query_len", [2, 4, 5])
def test_short_queries_are_served_as_decodes(query_len, launches):
    """A step of speculation: each sequence's tokens are one tile, its keys split over programs."""
    check(attention_case((query_len, 1, query_len), (100, 7, query_len), (8, 1), (16, 16), FP32))
    assert [launch.kernel for launch in launches] == [attention.attention_kernel, attention.reduce_kernel]


def test_splits_keys_by_the_batch_shape_alone(launches):
    """So that a captured graph serves any length, the grid may not depend on it."""
    for kv_len in (1, 16, 17, 300):
        check(attention_case((1,), (kv_len,), (4, 2), (16, 16), FP32))
    assert len({launch.grid for launch in launches if launch.kernel is attention.attention_kernel}) == 1
    assert launches[0].grid[2] > 1


def test_passes_over_sequences_without_queries():
    """The padding of a captured graph: they must not disturb the others' answers."""
    case = attention_case((1, 1), (20, 35), (4, 2), (16, 16), FP32)
    expected = case.expected()
    case.batch.query_starts = torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32)
    case.batch.kv_lens = torch.tensor([20, 35, 0, 0], dtype=torch.int32)
    case.batch.block_tables = torch.cat([case.batch.block_tables, torch.zeros_like(case.batch.block_tables)])
    case.batch.num_seqs = 4
    assert_close(case.run("triton"), expected)


def test_reads_queries_of_any_stride():
    case = attention_case(MIXED[0], MIXED[1], (6, 2), (32, 32), FP32)
    fused = torch.randn(case.q.shape[0], 6 * 32 + 8)
    fused[:, 8:] = case.q.flatten(1)
    strided = fused[:, 8:].unflatten(1, (6, 32))
    expected = case.expected()
    case.q = strided
    assert not strided.is_contiguous()
    assert_close(case.run("triton"), expected)

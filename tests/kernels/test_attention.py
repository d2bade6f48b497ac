"""kv_write_ and paged_attention against fp32: decodes, chunks and both in one step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.kernel_cases import AttentionCase, AttentionOptions, assert_close, attention_case

from lora_kernels import ops
from lora_kernels.ops import BLOCK_TOKENS, Impl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEPS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "decodes": ((1, 1, 1, 1), (1, 16, 65, 130)),
    "one long decode": ((1,), (1100,)),  # long enough to be split over threads
    "chunks": ((40, 3, 17), (40, 80, 17)),
    "mixed": ((1, 33, 1, 2, 7), (65, 33, 16, 90, 600)),
}
OPTIONS: list[AttentionOptions] = [
    {},
    {"window": 1},
    {"window": 20},
    {"softcap": 2.0},
    {"sinks": True},
    {"window": 33, "softcap": 5.0, "sinks": True},
]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_and_options(step: str, options: AttentionOptions, impl: Impl) -> None:
    for dtype in DTYPES:
        case = attention_case(*STEPS[step], (6, 2), (32, 32), dtype, **options)
        assert_close(case.run(impl), case.expected())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dims"),
    [
        ((4, 4), (64, 64)),
        ((9, 3), (64, 64)),
        ((8, 1), (128, 128)),
        ((2, 2), (80, 80)),
        ((5, 1), (20, 12)),  # fills no vector register
        ((4, 2), (192, 128)),  # multi-head latent attention
        ((40, 1), (16, 24)),  # more rows per query than a task usually has
    ],
)
def test_head_shapes(heads: tuple[int, int], head_dims: tuple[int, int], dtype: torch.dtype, impl: Impl) -> None:
    case = attention_case(*STEPS["mixed"], heads, head_dims, dtype)
    assert_close(case.run(impl), case.expected())


@pytest.mark.parametrize("slope", [0.02, 0.2, 2.0, -0.2, -2.0])  # logits change by 1.3, 13 or 130 over 64 keys
def test_logits_that_rise_or_fall_from_key_to_key(slope: float, impl: Impl) -> None:
    for dtype in DTYPES:
        case = attention_case((70, 1), (400, 300), (6, 2), (32, 32), dtype)
        case.q.zero_()[..., 0] = 1.0
        case.logits["scale"] = 1.0
        case.k_cache.zero_()
        for blocks in case.batch.block_tables.tolist():
            for number, block in enumerate(blocks):
                case.k_cache[block, :, :, 0] = slope * (BLOCK_TOKENS * number + torch.arange(BLOCK_TOKENS))
        assert_close(case.run(impl), case.expected())


def test_queries_may_be_a_view_of_a_fused_projection(impl: Impl) -> None:
    case = attention_case(*STEPS["mixed"], (6, 2), (32, 32), torch.bfloat16)
    fused = torch.randn(case.q.shape[0], 10 * 32).to(torch.bfloat16)
    fused[:, : 6 * 32] = case.q.flatten(1)
    expected = case.expected()
    case.q = fused[:, : 6 * 32].view(-1, 6, 32)
    assert not case.q.is_contiguous()
    assert_close(case.run(impl), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_write_puts_each_token_in_its_slot(dtype: torch.dtype, impl: Impl) -> None:
    case = attention_case(*STEPS["mixed"], (6, 2), (32, 24), dtype)
    fused = torch.randn(case.batch.num_tokens, 2 * 32 + 2 * 24).to(dtype)
    k, v = fused[:, :64].view(-1, 2, 32), fused[:, 64:].view(-1, 2, 24)
    k_cache, v_cache = case.k_cache.clone(), case.v_cache.clone()
    ops.kv_write_(k, v, k_cache, v_cache, case.batch, impl=impl)
    for token, slot in enumerate(case.batch.slot_mapping.tolist()):
        block, offset = divmod(slot, BLOCK_TOKENS)
        assert torch.equal(k_cache[block, :, offset], k[token])
        assert torch.equal(v_cache[block, :, offset], v[token])
        k_cache[block, :, offset] = case.k_cache[block, :, offset]
        v_cache[block, :, offset] = case.v_cache[block, :, offset]
    torch.testing.assert_close(k_cache, case.k_cache, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(v_cache, case.v_cache, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("is_coded", [False, True])
def test_blocks_of_keys_and_values_in_turns_are_the_same_to_the_bit(is_coded: bool, native: Impl) -> None:
    case = attention_case(*STEPS["mixed"], (6, 2), (32, 24), torch.bfloat16)
    apart = case.coded() if is_coded else case
    caches = [apart.k_cache, apart.v_cache]
    parts = torch.cat([cache.flatten(1) for cache in caches], 1).split([cache[0].numel() for cache in caches], 1)
    k_cache, v_cache = (part.view(cache.shape) for part, cache in zip(parts, caches, strict=True))
    assert not k_cache.is_contiguous()
    together = AttentionCase(case.q, k_cache, v_cache, case.batch, case.logits)
    assert torch.equal(together.run(native), apart.run(native))
    k, v = torch.randn(case.batch.num_tokens, 2, 32).bfloat16(), torch.randn(case.batch.num_tokens, 2, 24).bfloat16()
    for one in (apart, together):
        ops.kv_write_(k, v, one.k_cache, one.v_cache, case.batch, impl=native)
    torch.testing.assert_close(together.k_cache, apart.k_cache, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(together.v_cache, apart.v_cache, equal_nan=True, rtol=0, atol=0)


def test_blocks_that_are_not_contiguous_are_refused(native: Impl) -> None:
    case = attention_case((1,), (20,), (6, 2), (32, 32), torch.bfloat16)
    case.k_cache = case.k_cache.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(RuntimeError, match="k_cache needs blocks that are contiguous"):
        case.run(native)


def test_lists_of_more_tokens_than_there_are_are_refused(native: Impl) -> None:
    case = attention_case((1, 33), (65, 33), (6, 2), (32, 32), torch.float32)
    case.q = case.q[:33]
    with pytest.raises(RuntimeError, match="sequences of 34 queries are not of 33"):
        case.run(native)


def test_a_chunked_prompt_equals_the_whole_prompt(impl: Impl) -> None:
    whole = attention_case((75,), (75,), (6, 2), (32, 32), torch.float32)
    expected = whole.run(impl)
    for end, size in ((40, 40), (60, 20), (75, 15)):
        batch = ops.build_attention_batch(
            torch.tensor([size]).numpy(), torch.tensor([end]).numpy(), whole.batch.block_tables.numpy(), "cpu"
        )
        chunk = AttentionCase(whole.q[end - size : end], whole.k_cache, whole.v_cache, batch, whole.logits)
        assert_close(chunk.run(impl), expected[end - size : end])


def test_nothing_is_left_of_an_earlier_step(native: Impl) -> None:
    """The kernels reuse their working memory: NaN that one step leaves there must not be read by the next."""
    for dtype in DTYPES:
        spoiled = attention_case((64,), (64,), (6, 2), (64, 64), dtype)
        spoiled.v_cache.fill_(torch.nan)
        assert spoiled.run(native).isnan().all()
        case = attention_case((3, 1), (3, 17), (6, 2), (32, 20), dtype)
        assert_close(case.run(native), case.expected())


def _one_key_more(case: AttentionCase) -> None:
    case.logits["window"] = 21


def _no_sinks(case: AttentionCase) -> None:
    case.logits["sinks"] = None


def _no_softcap(case: AttentionCase) -> None:
    case.logits["softcap"] = 0.0


def _no_scale(case: AttentionCase) -> None:
    case.logits["scale"] = 1.0


def _one_token_short(case: AttentionCase) -> None:
    case.batch.kv_lens -= 1


def _another_block(case: AttentionCase) -> None:
    case.batch.block_tables[:, [0, 1]] = case.batch.block_tables[:, [1, 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "mistake", [_one_key_more, _no_sinks, _no_softcap, _no_scale, _one_token_short, _another_block]
)
def test_the_comparison_notices(mistake: Callable[[AttentionCase], None], dtype: torch.dtype, native: Impl) -> None:
    """Each mistake is what a broken kernel would compute; the tolerance of each dtype must detect it."""
    options: AttentionOptions = {"window": 20, "softcap": 2.0, "sinks": True}
    case = attention_case((30, 1), (30, 31), (6, 2), (32, 32), dtype, **options)
    expected = case.expected()
    assert_close(case.run(native), expected)
    mistake(case)
    with pytest.raises(AssertionError):
        assert_close(case.run(native), expected)

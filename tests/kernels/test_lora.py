"""lora_add_ against fp32, over Punica's mixes of adapters, ranks and odd sizes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.kernel_cases import (
    DISTRIBUTIONS,
    RANKS,
    Distribution,
    LoraCase,
    assert_close,
    in_int8,
    lora_case,
    token_slots,
)

from lora_kernels import ops
from lora_kernels.ops import Impl, LoraSite

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 7, 33, 150)


def check(case: LoraCase, impl: Impl) -> None:
    for actual, expected in zip(case.run(impl), case.expected(), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("num_tokens", SIZES)
def test_every_mix_and_size(distribution: Distribution, num_tokens: int, impl: Impl) -> None:
    for i, dtype in enumerate(DTYPES):
        ranks = list(RANKS[i::3])  # each rank with one of the dtypes; ranks from 1 to 256 in one step
        case = lora_case(token_slots(distribution, num_tokens, len(ranks), 5), ranks, 96, (80, 33), dtype)
        check(case, impl)
        check(in_int8(case), impl)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rank_and_dtype(rank: int, dtype: torch.dtype, impl: Impl) -> None:
    """Groups of one row, of a few, and of more than a tile, at widths that do not fill a vector register."""
    slots = np.repeat([0, 1, 2, -1], [1, 3, 70, 2])
    for k, widths in ((70, (64,)), (33, (200, 9, 130))):
        case = lora_case(slots, [rank] * 3, k, widths, dtype, row_scales=True)
        check(case, impl)
        check(in_int8(case), impl)


def test_outputs_may_be_columns_of_one_fused_output(impl: Impl) -> None:
    case = lora_case(token_slots("zipf", 40, 3), [8, 16, 3], 64, (48, 16, 16), torch.bfloat16)
    expected = case.expected()
    fused = torch.cat(case.outs, dim=1)
    case.outs = list(fused.split([48, 16, 16], dim=1))
    before = fused.clone()
    outs = list(before.split([48, 16, 16], dim=1))
    case.outs = outs
    ops.lora_add_(outs, case.x, case.sites, case.table, case.batch, impl=impl)
    for actual, wanted in zip(before.split([48, 16, 16], dim=1), expected, strict=True):
        assert_close(actual, wanted)
    base_rows = sorted(set(range(40)) - set(case.batch.rows[: case.batch.num_rows].tolist()))
    assert torch.equal(before[base_rows], fused[base_rows])


def test_rows_without_an_adapter_are_not_touched(impl: Impl) -> None:
    slots = token_slots("some base", 61, 4)
    case = lora_case(slots, [16, 3, 48, 8], 32, (40,), torch.bfloat16)
    (out,) = case.run(impl)
    base = torch.from_numpy(slots < 0)
    assert torch.equal(out[base], case.outs[0][base])
    assert not torch.equal(out[~base], case.outs[0][~base])


def test_nothing_is_left_of_an_earlier_step(native: Impl) -> None:
    """The kernels reuse their working memory: NaN that one step leaves there must not be read by the next."""
    for dtype in DTYPES:
        spoiled = lora_case(np.repeat([0, 1], [40, 2]), [64, 64], 96, (80,), dtype)
        spoiled.x.fill_(torch.nan)
        assert spoiled.run(native)[0].isnan().all()
        check(lora_case(np.repeat([0, 1], [40, 2]), [3, 17], 96, (80,), dtype), native)


def test_a_list_of_more_rows_than_the_input_has_is_refused(native: Impl) -> None:
    """For example the list of a whole text at a layer that sees only its end: writes would go beyond the output."""
    case = lora_case(np.repeat([0, -1], [3, 6]), [4], 32, (40,), torch.bfloat16)
    outs, x = [out[:8] for out in case.outs], case.x[:8]
    with pytest.raises(RuntimeError, match="a list of 9 rows is not of an input of 8"):
        ops.lora_add_(outs, x, case.sites, case.table, case.batch, impl=native)


def _drop_last_rank_row(case: LoraCase) -> None:
    case.table.ranks -= (case.table.ranks > 0).int()


def _perturb_one_weight_row(case: LoraCase) -> None:
    site = case.sites[0]
    row = int(case.table.pages[0, site.group, 0]) * 16
    b_rows = site.b_rows.clone()
    b_rows[row] *= 2
    case.sites[0] = LoraSite(site.index, site.group, site.a_rows, b_rows)


def _swap_two_rows(case: LoraCase) -> None:
    case.batch.rows[[0, case.batch.num_rows - 1]] = case.batch.rows[[case.batch.num_rows - 1, 0]]


def _forget_the_scale(case: LoraCase) -> None:
    case.table.scales.fill_(1.0)


def _forget_row_scales(case: LoraCase) -> None:
    case.batch.row_scales = None


def _take_the_next_page(case: LoraCase) -> None:
    case.table.pages[:] = case.table.pages.roll(1, dims=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "mistake",
    [
        _drop_last_rank_row,
        _perturb_one_weight_row,
        _swap_two_rows,
        _forget_the_scale,
        _forget_row_scales,
        _take_the_next_page,
    ],
)
def test_the_comparison_notices(mistake: Callable[[LoraCase], None], dtype: torch.dtype, native: Impl) -> None:
    """Each mistake is what a broken kernel would compute; the tolerance of each dtype must detect it."""
    case = lora_case(token_slots("uniform", 50, 3), [20, 64, 33], 96, (80,), dtype, row_scales=True)
    check(case, native)
    expected = case.expected()
    mistake(case)
    with pytest.raises(AssertionError):
        assert_close(case.run(native)[0], expected[0])

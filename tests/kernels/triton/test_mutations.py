"""Kernels broken on purpose: the comparisons of this folder must detect each of these mistakes.

A copy of a kernel file is changed in one place, and the cases below run on it. The replaced text must occur exactly
once, so a mutation whose target no longer exists fails too.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers.kernel_cases import AttentionOptions, assert_close, attention_case, lora_case, poisoned_memory, token_slots

from lora_kernels.triton_ops import attention, lora
from lora_kernels.triton_ops.launch import Device

# A broken kernel may compute NaN on its way to a wrong answer.
MUTANT = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FP32 = torch.float32
DEVICE = Device(backend="cuda", num_sms=70, capability=80, upcast=True)  # with so many multiprocessors, K is split


def mutant(original: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    assert original.__file__ is not None
    source = Path(original.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
    path = folder / f"mutant_{original.__name__.rpartition('.')[2]}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look up their module there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[path.stem]
    return module


def run_lora(module: ModuleType) -> None:
    """Mixed ranks on scattered pages, several splits, one program for several tiles, and scales per row."""
    for slots, k in ((token_slots("some base", 40, 3), 600), (np.full(90, 1), 96)):
        case = lora_case(slots, [16, 40, 3], k, (24, 40), FP32, row_scales=True)
        outs = [out.clone() for out in case.outs]
        with poisoned_memory():
            for launch in module.plan_lora(outs, case.x, case.sites, case.table, case.batch, DEVICE):
                launch()
        for actual, expected in zip(outs, case.expected(), strict=True):
            assert_close(actual, expected)


def run_attention(module: ModuleType) -> None:
    """A mixed step with split decodes: with all options, where most mistakes show, and without."""
    plain: AttentionOptions = {}
    for options in (AttentionOptions(window=20, softcap=2.0, sinks=True), plain):
        case = attention_case((1, 33, 2, 1), (150, 56, 90, 20), (3, 1), (32, 16), FP32, **options)
        with poisoned_memory():
            actual = case.q.new_empty(*case.q.shape[:2], case.v_cache.shape[3])
            tensors = (actual, case.q, case.k_cache, case.v_cache)
            for launch in module.plan_attention(*tensors, case.batch, module.Logits(**case.logits), DEVICE):
                launch()
        assert_close(actual, case.expected())


def test_the_originals_pass() -> None:
    run_lora(lora)
    run_attention(attention)


@MUTANT
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mask=live_rank[:, None] & live_k", "mask=live_k"),
        ("token[:, None] * x_stride", "(token[:, None] + 1) % num_tokens * x_stride"),
        ("page.to(tl.int64) * PAGE_ROWS", "page.to(tl.int64) * 0"),
        ("(split + 1) * split_k)", "(split + 2) * split_k)"),
        ("acc * scale", "acc"),
        ("acc *= tl.load(row_scales", "acc += 0 * tl.load(row_scales"),
        ("rank_program, tl.cdiv(rank, BLOCK_R), num_rank_programs", "rank_program, 1, num_rank_programs"),
        ("tl.where(block >= blocks_before, other, site)", "0"),
        ("base.to(tl.float32) + acc", "acc"),
        (
            "tl.sum(tl.load(hidden_row + rank_rows[None, None, :]), axis=0)",
            "tl.max(tl.load(hidden_row + rank_rows[None, None, :]), axis=0)",
        ),
        ("for rank_start in range(0, rank, BLOCK_R)", "for rank_start in range(0, BLOCK_R, BLOCK_R)"),
    ],
)
def test_lora_comparison_notices(old: str, new: str, tmp_path: Path) -> None:
    module = mutant(lora, old, new, tmp_path)
    with pytest.raises(AssertionError):
        run_lora(module)


@MUTANT
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("key[None, :] <= position[:, None]", "key[None, :] <= position[:, None] + 1"),
        ("key[None, :] > position[:, None] - window", "key[None, :] >= position[:, None] - window"),
        ("- window + 1, 0)", "+ 1, 0)"),
        ("kv_end = tl.minimum(kv_end, kv_begin + part)", "kv_end = kv_end + 0 * part"),
        ("tl.sum(weights * sums, axis=0) + tl.exp2(sink - row_max)", "tl.sum(weights * sums, axis=0)"),
        ("weights = tl.exp2(maxima - row_max)", "weights = tl.exp2(maxima - maxima)"),
        ("acc * shrink[:, None]", "acc"),
        ("row_sum += 1.0", "row_sum += 0.0"),
        ("first_tile <= tile", "first_tile < tile"),
        ("head = kv_head * GROUP + row % GROUP", "head = kv_head * GROUP + row // GROUP % GROUP"),
        ("mask=in_range[:, None] & (dv_range < HEAD_DIM_V)[None, :]", "mask=(dv_range < HEAD_DIM_V)[None, :]"),
        ("2.0 * _LOG2_E / softcap", "_LOG2_E / softcap"),
        ("if end - first > DECODE_QUERIES", "if end - first > 1"),
    ],
)
def test_attention_comparison_notices(old: str, new: str, tmp_path: Path) -> None:
    module = mutant(attention, old, new, tmp_path)
    with pytest.raises(AssertionError):
        run_attention(module)

"""Batched LoRA against the fp32 reference, in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.kernel_cases import (
    DISTRIBUTIONS,
    RANKS,
    Distribution,
    LoraCase,
    assert_close,
    lora_case,
    poisoned_memory,
    token_slots,
)

from lora_kernels import ops
from lora_kernels.triton_ops import lora, tuning
from lora_kernels.triton_ops.launch import Device, Launch

FP32, FP16 = torch.float32, torch.float16


def check(case: LoraCase) -> None:
    for actual, expected in zip(case.run("triton"), case.expected(), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("num_tokens", "dtype"), [(7, FP32), (67, FP16)])
def test_matches_reference_for_every_mix(distribution: Distribution, num_tokens: int, dtype: torch.dtype) -> None:
    slots = token_slots(distribution, num_tokens, num_slots=5, seed=num_tokens)
    if (slots < 0).all():
        slots[0] = 2
    check(lora_case(slots, [16, 3, 64, 8, 1], k=48, widths=(40, 24), dtype=dtype))


@pytest.mark.parametrize("rank", RANKS)
def test_matches_reference_for_every_rank(rank: int) -> None:
    """Small and large tiles, beside an adapter of another rank."""
    for num_tokens in (3, 70):
        slots = np.where(np.arange(num_tokens) % 35 == 1, 1, 0)
        check(lora_case(slots, [rank, 5], k=32, widths=(48,), dtype=FP32))


@pytest.mark.parametrize(("k", "widths"), [(16, (16,)), (100, (33, 7, 65)), (256, (300, 16)), (200, (16,) * 5)])
def test_matches_reference_for_odd_widths(k: int, widths: tuple[int, ...]) -> None:
    """Widths smaller than a block and across blocks, and more siblings than one launch takes."""
    slots = token_slots("some base", 9, num_slots=4)
    check(lora_case(slots, [16, 8, 48, 2], k=k, widths=widths, dtype=FP16))


def test_scales_rows_by_request() -> None:
    check(lora_case(token_slots("uniform", 21, 3), [8, 16, 4], 32, (24, 40), FP32, row_scales=True))


def test_leaves_everything_else_alone() -> None:
    """Rows of the base, sites that an adapter does not change, and columns beside a slice keep their bits."""
    case = lora_case(token_slots("some base", 20, 3), [8, 16, 4], 32, (24, 40), FP32)
    fused = torch.randn(20, 24 + 8 + 40)
    before = fused.clone()
    case.outs = [fused[:, :24], fused[:, 32:]]
    expected = case.expected()
    with poisoned_memory():
        ops.lora_add_(case.outs, case.x, case.sites, case.table, case.batch, impl="triton")
    for out, answer in zip(case.outs, expected, strict=True):
        assert_close(out, answer)
    slots = torch.from_numpy(token_slots("some base", 20, 3))
    assert torch.equal(fused[slots < 0], before[slots < 0])
    assert torch.equal(fused[:, 24:32], before[:, 24:32])
    untouched = torch.isin(slots, torch.tensor([slot for slot in range(3) if case.table.ranks[slot, 1] == 0]))
    assert untouched.any()
    assert torch.equal(fused[untouched, :24], before[untouched, :24])


@pytest.mark.parametrize(("num_sms", "splits"), [(1, 1), (30, 4), (200, 16)])
def test_split_sums_agree(num_sms: int, splits: int) -> None:
    """The number of multiprocessors decides how K is split, not the answer. Of 16 parts of 17 blocks, 7 are empty."""
    case = lora_case(token_slots("distinct", 6, 6), [16, 3, 8, 40, 16, 1], 1040, (64,), FP32)
    device = Device(backend="cuda", num_sms=num_sms, capability=80, upcast=True)
    outs = [out.clone() for out in case.outs]
    with poisoned_memory():
        shrink, expand = lora.plan_lora(outs, case.x, case.sites, case.table, case.batch, device)
        assert shrink.grid[2] == expand.args["SPLITS"] == splits
        shrink()
        expand()
    for actual, expected in zip(outs, case.expected(), strict=True):
        assert_close(actual, expected)


def test_a_program_strides_over_tiles() -> None:
    case = lora_case(token_slots("distinct", 6, 6), [16, 3, 8, 40, 16, 1], 32, (32,), FP32)
    no_room = Device(backend="cuda", num_sms=0, capability=80, upcast=True)
    outs = [out.clone() for out in case.outs]
    launches = lora.plan_lora(outs, case.x, case.sites, case.table, case.batch, no_room)
    assert [launch.grid[0] for launch in launches] == [1, 1], "one program must serve all six tiles"
    for launch in launches:
        launch()
    for actual, expected in zip(outs, case.expected(), strict=True):
        assert_close(actual, expected)


def test_a_recorded_step_serves_any_mix() -> None:
    """A CUDA graph replays the launches of one step, while the work list is overwritten in place."""
    num_tokens, ranks = 18, [16, 3, 64, 8]
    mixes = [token_slots(d, num_tokens, len(ranks)) for d in ("identical", "distinct", "zipf", "some base", "none")]
    case = lora_case(mixes[0], ranks, 32, (24, 16), FP32)
    case.batch = ops.recordable_lora_batch(num_tokens, "cpu")
    originals = [out.clone() for out in case.outs]
    device = Device(backend="cuda", num_sms=4, capability=80, upcast=True)
    recorded = lora.plan_lora(case.outs, case.x, case.sites, case.table, case.batch, device)
    factors = np.linspace(0.5, 2, num_tokens, dtype=np.float32)
    for slots, scales in zip(mixes, (None, factors, None, factors, None), strict=True):
        batch = ops.build_lora_batch(slots, "cpu", scales)
        replayed = torch.zeros_like(case.batch.buffer) if batch is None else batch.buffer
        case.batch.buffer.copy_(replayed)
        for out, original in zip(case.outs, originals, strict=True):
            out.copy_(original)
        expected = originals
        if batch is not None:
            expected = LoraCase(originals, case.x, case.sites, case.table, batch).expected()
        for launch in recorded:
            launch()
        for actual, answer in zip(case.outs, expected, strict=True):
            assert_close(actual, answer)


class TestUniformStep:
    """A long step of one adapter runs as two library products per site, if the host can tell without the device."""

    @pytest.fixture
    def launches(self, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
        ran: list[Launch] = []
        launch = Launch.__call__

        def note_and_launch(planned: Launch) -> None:
            ran.append(planned)
            launch(planned)

        monkeypatch.setattr(Launch, "__call__", note_and_launch)
        return ran

    def case(self, *, in_order: bool, row_scales: bool = False) -> LoraCase:
        case = lora_case(np.full(tuning.UNIFORM_GEMM_ROWS, 1), [3, 40], 32, (24, 16), FP32, row_scales=row_scales)
        host = case.table.host
        assert host is not None
        if in_order:
            for pages in (case.table.pages, host.pages):
                rows = torch.arange(pages.shape[2], dtype=torch.int32) + 2
                pages[1] = rows
            for site in case.sites:
                site.a_rows[32:72] = torch.randn(40, 32) / 32**0.5
                site.b_rows[32:72] = torch.randn(40, site.b_rows.shape[1]) / 40**0.5
        return case

    def test_uses_products_when_pages_are_in_order(self, launches: list[Launch]) -> None:
        check(self.case(in_order=True))
        assert not launches

    def test_uses_kernels_when_pages_are_scattered(self, launches: list[Launch]) -> None:
        check(self.case(in_order=False))
        assert len(launches) == 2

    def test_uses_kernels_when_rows_have_factors(self, launches: list[Launch]) -> None:
        check(self.case(in_order=True, row_scales=True))
        assert len(launches) == 2

    def test_uses_kernels_without_the_host_copy(self, launches: list[Launch]) -> None:
        case = self.case(in_order=True)
        case.table.host = None
        check(case)
        assert len(launches) == 2

"""LoRA on experts as rows of `lora_add_`: pair by pair, on every available implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.expert_cases import ExpertCase, expert_case
from helpers.kernel_cases import assert_close

from lora_kernels.experts import order_by_expert
from lora_kernels.ops import Impl
from lora_kernels.segments import TILE_LARGE, TILE_SMALL


def check(case: ExpertCase, impl: Impl) -> None:
    expected = case.expected()
    assert expected.abs().max() > 0.1, "or a kernel that does nothing would pass"
    assert_close(case.run(impl), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 150])
def test_pairs_of_adapters_of_several_ranks(num_tokens: int, dtype: torch.dtype, impl: Impl) -> None:
    """Tokens of the base, of an adapter without rows here, and of four others; with large and small tiles."""
    case = expert_case(num_tokens, [16, 3, 0, 40, 1], dtype=dtype)
    case.slots[-1] = 3
    assert case.order().tile_rows == (TILE_LARGE if 2 * num_tokens >= 32 * 6 else TILE_SMALL)
    check(case, impl)


@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 2), (3, 1), (64, 8)])
def test_any_number_of_experts(num_experts: int, top_k: int, impl: Impl) -> None:
    check(expert_case(50, [8, 20], num_experts=num_experts, top_k=top_k, k=33, n=70, seed=3), impl)


def test_one_adapter_whose_experts_have_many_rows(impl: Impl) -> None:
    case = expert_case(400, [8], num_experts=2, top_k=1)
    case.slots[:] = 0
    check(case, impl)


def test_a_step_without_rows_adds_nothing(impl: Impl) -> None:
    case = expert_case(20, [8, 0])
    case.slots[:] = np.where(np.arange(20) % 2, 1, -1)
    assert not case.run(impl).any()


@pytest.mark.parametrize("seed", range(20))
def test_an_order_names_every_pair_and_row_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_tokens, num_experts, num_slots = int(rng.integers(1, 200)), int(rng.integers(1, 9)), int(rng.integers(1, 5))
    top_k = int(rng.integers(1, num_experts + 1))
    ids = torch.from_numpy(np.stack([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)]))
    slots = torch.from_numpy(rng.integers(-1, num_slots, num_tokens).astype(np.int32))
    order = order_by_expert(ids, slots, num_experts, num_slots)

    assert sorted(order.pairs.tolist()) == list(range(num_tokens * top_k))
    experts = ids.view(-1)[order.pairs]
    assert torch.equal(order.experts, experts)
    assert order.ends.tolist() == [int((experts <= e).sum()) for e in range(num_experts)]
    own = slots[order.tokens]
    active = [place for place in range(len(own)) if own[place] >= 0]
    assert order.rows[: int(order.num_active)].tolist() == active
    seen: list[int] = []
    for tile in range(int(order.num_tiles)):
        first, count = int(order.tile_firsts[tile]), int(order.tile_counts[tile])
        assert 0 < count <= order.tile_rows
        places = order.rows[first : first + count].long()
        assert (own[places] == order.tile_slots[tile]).all()
        assert (experts[places] == order.tile_experts[tile]).all()
        seen += places.tolist()
    assert seen == active

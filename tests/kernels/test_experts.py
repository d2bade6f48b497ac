"""Experts' products, and LoRA on them as rows of `lora_add_`: pair by pair, on every available implementation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.expert_cases import ExpertCase, expert_case
from helpers.fixed_sums import fixed_sums
from helpers.kernel_cases import assert_close, poisoned_memory, randn
from helpers.quantised_weights import random_weight
from torch import Tensor

from lora_kernels import ops
from lora_kernels.experts import order_by_expert
from lora_kernels.ops import Impl
from lora_kernels.quantised import KINDS, Kind, QuantisedWeight, round_inputs
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


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    "sizes", [(1, 0, 2, 15), (33, 17, 0, 70), (0, 0, 0, 4), (300, 1, 520, 0), (0, 0, 0, 0)], ids=str
)
@pytest.mark.parametrize(("n", "k"), [(64, 96), (32, 1056), (96, 70)])
def test_each_group_of_rows_has_its_own_weight(sizes: tuple[int, ...], n: int, k: int, impl: Impl) -> None:
    """Groups without rows, groups that fill no tile, and groups that are split; widths with and without whole tiles."""
    weights, x = randn(len(sizes), n, k, dtype=BF16) / k**0.5, randn(sum(sizes), k, dtype=BF16, seed=1)
    ends = torch.tensor(sizes).cumsum(0).int()
    with poisoned_memory():
        got = ops.grouped_linear(x, ops.pack_linear(weights.view(-1, k), impl=impl), ends, impl=impl)
    rows = zip(x.split(sizes), weights, strict=True)
    assert_close(got, torch.cat([part.float() @ own.float().T for part, own in rows]), BF16)


def gated(num_tokens: int, num: int, top_k: int, d: int, i: int) -> tuple[Tensor, ...]:
    """Return a step's x, ids and weights, and the experts' weights: gate and up, and down."""
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.stack([torch.randperm(num, generator=generator)[:top_k] for _ in range(num_tokens)])
    weights = torch.rand(num_tokens, top_k, generator=generator).to(BF16)
    x = randn(num_tokens, d, dtype=BF16)
    return x, ids, weights, randn(num, 2 * i, d, dtype=BF16) / d**0.5, randn(num, d, i, dtype=BF16) / i**0.5


def run_gated(case: tuple[Tensor, ...], impl: Impl, act: ops.Activation = "silu") -> Tensor:
    x, ids, weights, up, down = case
    packed = [ops.pack_linear(part.reshape(-1, part.shape[2]), impl=impl) for part in (up, down)]
    with poisoned_memory():
        return ops.experts(x, ids, weights, ops.GatedExperts(len(up), packed[0], packed[1], act), impl=impl)


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("num", "top_k", "d", "i"), [(6, 2, 64, 32), (4, 4, 96, 80), (1, 1, 32, 16), (40, 8, 352, 64)])
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 150, 700])
def test_gated_experts(num_tokens: int, num: int, top_k: int, d: int, i: int, act: ops.Activation, impl: Impl) -> None:
    x, ids, weights, up, down = case = gated(num_tokens, num, top_k, d, i)
    function = torch.nn.functional.silu if act == "silu" else lambda g: torch.nn.functional.gelu(g, approximate="tanh")
    expected = torch.zeros(num_tokens, d)
    for expert in range(num):
        tokens, places = (ids == expert).nonzero(as_tuple=True)
        gates, ups = (x[tokens].float() @ up[expert].float().T).chunk(2, -1)
        expected[tokens] += weights[tokens, places, None] * ((function(gates) * ups) @ down[expert].float().T)
    assert_close(run_gated(case, impl, act), expected, BF16)


def test_a_row_has_the_same_bits_beside_any_others(native: Impl) -> None:
    with fixed_sums():
        x, ids, weights, *parts = gated(150, 6, 2, 96, 64)
        whole = run_gated((x, ids, weights, *parts), native)
        for rows in (slice(0, 1), slice(7, 20), slice(60, 150)):
            assert torch.equal(run_gated((x[rows], ids[rows], weights[rows], *parts), native), whole[rows])


def test_a_step_without_tokens(impl: Impl) -> None:
    x, ids, weights, *parts = gated(1, 6, 2, 96, 64)
    assert run_gated((x[:0], ids[:0], weights[:0], *parts), impl).shape == (0, 96)


def test_tokens_without_experts(impl: Impl) -> None:
    x, ids, weights, *parts = gated(3, 6, 2, 96, 64)
    assert_close(run_gated((x, ids[:, :0], weights[:, :0], *parts), impl), torch.zeros(3, 96), BF16)


@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_what_is_not_finite_stays_in_its_row(num_tokens: int, impl: Impl) -> None:
    """Among other rows of the same experts, and in a product's tile; bits of the others are those without it."""
    x, ids, weights, *parts = gated(num_tokens, 3, 3, 96, 64)
    clean = run_gated((x, ids, weights, *parts), impl)
    for bad in (torch.nan, torch.inf):
        broken = x.clone()
        broken[-1, 5] = bad
        found = run_gated((broken, ids, weights, *parts), impl)
        assert not found[-1].isfinite().any()
        assert torch.equal(found[:-1], clean[:-1])


@pytest.mark.parametrize("expert", [-1, 6])
def test_an_expert_that_is_not_there_is_refused(expert: int, native: Impl) -> None:
    x, ids, *others = gated(3, 6, 2, 96, 64)
    ids[1, 1] = expert
    with pytest.raises(RuntimeError, match=f"expert {expert} of 6 is not there"):
        run_gated((x, ids, *others), native)


@pytest.mark.parametrize("ends", [[3, 2, 5], [1, 2, 4], [1, 2, 6], [-1, 2, 5]], ids=str)
def test_ends_that_do_not_cover_the_rows_are_refused(ends: list[int], native: Impl) -> None:
    packed = ops.pack_linear(randn(96, 64, dtype=BF16), impl=native)
    with pytest.raises(RuntimeError, match="ends must ascend to"):
        ops.grouped_linear(randn(5, 64, dtype=BF16), packed, torch.tensor(ends).int(), impl=native)


def run_groups(
    x: Tensor, weight: QuantisedWeight, sizes: tuple[int, ...], impl: Impl, *, int8_inputs: bool = False
) -> Tensor:
    packed = replace(ops.pack_quantised([weight], impl=impl), int8_inputs=int8_inputs)
    with poisoned_memory():
        return ops.grouped_linear(x, packed, torch.tensor(sizes).cumsum(0).int(), impl=impl)


def products_of(x: Tensor, weight: QuantisedWeight, sizes: tuple[int, ...]) -> Tensor:
    """Return the products of groups of rows with the dequantized weights, in fp32."""
    weights = weight.dequantise().unflatten(0, (len(sizes), -1))
    return torch.cat([part.float() @ own.T for part, own in zip(x.split(sizes), weights, strict=True)])


@pytest.mark.parametrize("int8_inputs", [False, True], ids=["exact", "rounded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_groups(kind: Kind, dtype: torch.dtype, int8_inputs: bool, impl: Impl) -> None:
    """Groups without rows, of one, and of enough rows for every way to multiply; in small steps and in large ones."""
    sizes, n, k = ((1, 0, 2), (3, 1, 20), (0, 66, 7)), 64, 512
    weight = random_weight(kind, 3 * n, k)
    for own in sizes:
        x = randn(sum(own), k, dtype=dtype, seed=1)
        expected = products_of(round_inputs(x) if int8_inputs else x, weight, own)
        assert_close(run_groups(x, weight, own, impl, int8_inputs=int8_inputs), expected)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (129, 0, 3, 12), (300, 5, 520, 13), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_quantised_groups_of_many_rows(kind: Kind, sizes: tuple[int, ...], impl: Impl) -> None:
    """Groups that are split; a last chunk of inputs that is not full."""
    weight = random_weight(kind, 4 * 32, 352)
    for int8_inputs in (False, True):
        x = randn(sum(sizes), 352, dtype=BF16)
        expected = products_of(round_inputs(x) if int8_inputs else x, weight, sizes)
        assert_close(run_groups(x, weight, sizes, impl, int8_inputs=int8_inputs), expected, BF16)


def run_blocks(
    case: tuple[Tensor, ...], impl: Impl, kinds: tuple[Kind | None, Kind | None], *, int8_inputs: bool = False
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the result of experts with weights of kinds, None for bf16; and the weights in fp32."""
    x, ids, weights, *parts = case
    packed: list[ops.PackedLinear | ops.QuantisedLinear] = []
    numbers: list[Tensor] = []
    for seed, (kind, part) in enumerate(zip(kinds, parts, strict=True)):
        if kind is None:
            packed.append(ops.pack_linear(part.reshape(-1, part.shape[2]), impl=impl))
            numbers.append(part.float())
        else:
            weight = random_weight(kind, part[..., 0].numel(), part.shape[2], seed=seed)
            packed.append(replace(ops.pack_quantised([weight], impl=impl), int8_inputs=int8_inputs))
            numbers.append(weight.dequantise().view(part.shape))
    layer = ops.GatedExperts(len(parts[0]), packed[0], packed[1], "silu")
    with poisoned_memory():
        return ops.experts(x, ids, weights, layer, impl=impl), (numbers[0], numbers[1])


@pytest.mark.parametrize("int8_inputs", [False, True], ids=["exact", "rounded"])
@pytest.mark.parametrize(
    "kinds", [("q4_0", "q4_0"), ("q8_0", "q8_0"), ("q4_k", "q6_k"), ("q8_0", None), (None, "q4_0")]
)
@pytest.mark.parametrize("num_tokens", [1, 9, 700])
def test_quantised_experts(
    num_tokens: int, kinds: tuple[Kind | None, Kind | None], int8_inputs: bool, impl: Impl
) -> None:
    x, ids, weights, *_ = case = gated(num_tokens, 6, 2, 256, 256)
    got, (up, down) = run_blocks(case, impl, kinds, int8_inputs=int8_inputs)
    expected = torch.zeros(num_tokens, 256)
    rounds = [round_inputs if int8_inputs and kind else torch.Tensor.float for kind in kinds]
    for expert in range(6):
        tokens, places = (ids == expert).nonzero(as_tuple=True)
        gates, ups = (rounds[0](x[tokens]) @ up[expert].T).to(BF16).float().chunk(2, -1)
        hidden = (torch.nn.functional.silu(gates) * ups).to(BF16)
        expected[tokens] += weights[tokens, places, None] * (rounds[1](hidden) @ down[expert].T)
    error = got.float() - expected
    assert error.norm() < 6e-3 * expected.norm()
    assert (error.norm(dim=1) < 2e-2 * expected.norm(dim=1)).all()


@pytest.mark.parametrize("int8_inputs", [False, True], ids=["exact", "rounded"])
@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "q6_k"])
def test_a_row_of_quantised_experts_has_the_same_bits_beside_any_others(
    kind: Kind, int8_inputs: bool, native: Impl
) -> None:
    with fixed_sums():
        x, ids, weights, *parts = gated(250, 3, 2, 256, 256)
        whole, _ = run_blocks((x, ids, weights, *parts), native, (kind, kind), int8_inputs=int8_inputs)
        for rows in (slice(0, 1), slice(7, 20), slice(60, 250)):
            own = x[rows], ids[rows], weights[rows], *parts
            got, _ = run_blocks(own, native, (kind, kind), int8_inputs=int8_inputs)
            assert torch.equal(got, whole[rows])


def test_quantised_groups_that_do_not_fill_panels_are_refused(native: Impl) -> None:
    packed = ops.pack_quantised([random_weight("q8_0", 2 * 48, 64)], impl=native)
    with pytest.raises(RuntimeError, match="3 panels are not of 2 weights"):
        ops.grouped_linear(randn(5, 64), packed, torch.tensor([2, 5]).int(), impl=native)
    with pytest.raises(RuntimeError, match="is not packed for 32 inputs"):
        ops.grouped_linear(randn(5, 32), packed, torch.tensor([1, 2, 5]).int(), impl=native)

"""Layers run as one native call give, bit for bit, what the operations give, also in steps that are cut into blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import cast

import numpy as np
import pytest
import torch
from helpers import examples
from helpers.fixed_sums import fixed_sums
from helpers.kernel_cases import randn
from helpers.quantised_weights import random_weight
from torch import Tensor

from lora_kernels import ops
from lora_kernels.ops import BLOCK_TOKENS, PAGE_ROWS, AdapterTable, AttentionBatch, Impl, LoraBatch, LoraSite
from lora_kernels.quantised import Kind
from lora_kernels.tables import DecoderLayer, PagedAttention, RmsNorm, SiblingLinears

BF16 = torch.bfloat16
WIDTH, HEADS, KV_HEADS, DIM, MLP, NUM_BLOCKS = 288, 4, 2, 32, 320, 40
RANKS = ((5, 20), (3, 0))
"""Of two adapters, at the sites of a layer's attention and at the others."""


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Two threads, and sums that do not depend on the rows beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with fixed_sums():
        yield
    torch.set_num_threads(before)


POOL_PAGES = 26


def linears(seed: int, inputs: int, sizes: list[int], weights: str, impl: Impl) -> SiblingLinears:
    """weights: a kind of quantised ones, with /int8 for inputs in int8; or bf16."""
    if weights == "bf16":
        packed = ops.pack_linear(randn(sum(sizes), inputs, dtype=BF16, seed=seed), impl=impl)
    else:
        kind = cast(Kind, weights.removesuffix("/int8"))
        packed = ops.pack_quantised([random_weight(kind, size, inputs) for size in sizes], impl=impl)
        packed = replace(packed, int8_inputs=weights.endswith("/int8"))
    pool_rows = POOL_PAGES * PAGE_ROWS
    sites = [
        LoraSite(len(sizes) == 1, 0, *(randn(pool_rows, n, dtype=BF16, seed=seed + n) / 8 for n in (inputs, size)))
        for size in sizes
    ]  # fmt: skip
    bias = randn(sum(sizes), dtype=BF16, seed=seed + 1) if len(sizes) == 3 else None
    return SiblingLinears(packed, bias, sizes, sites)


def decoder_layer(seed: int, weights: str, impl: Impl, *, head_norms: bool) -> DecoderLayer:
    def norm(width: int, n: int) -> RmsNorm:
        return RmsNorm(1 + 0.1 * randn(width, dtype=BF16, seed=seed + n), 1e-5, plus_one=False)

    cache = [torch.zeros(NUM_BLOCKS, KV_HEADS, BLOCK_TOKENS, DIM, dtype=BF16) for _ in range(2)]
    return DecoderLayer(
        attention_norm=norm(WIDTH, 1),
        mlp_norm=norm(WIDTH, 2),
        head_norms=(norm(DIM, 3), norm(DIM, 4)) if head_norms else None,
        qkv=linears(seed + 10, WIDTH, [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], weights, impl),
        attention=PagedAttention(HEADS, KV_HEADS, DIM, DIM, 0, DIM**-0.5, 0.0, None, *cache),
        out=linears(seed + 20, HEADS * DIM, [WIDTH], weights, impl),
        gate_up=linears(seed + 30, WIDTH, [MLP, MLP], weights, impl),
        act="silu",
        down=linears(seed + 40, MLP, [WIDTH], weights, impl),
    )


def adapters() -> AdapterTable:
    pages = torch.tensor([[[1, 0]], [[3, 2]]], dtype=torch.int32)
    return AdapterTable(torch.tensor(RANKS, dtype=torch.int32), torch.full((2, 2), 0.7), pages)


def project(x: Tensor, own: SiblingLinears, table: AdapterTable, lora: LoraBatch | None, impl: Impl) -> Tensor:
    out = ops.linear(x, own.packed, own.bias, impl=impl)
    if lora is not None:
        ops.lora_add_(out.split(own.sizes, dim=1), x, own.sites, table, lora, impl=impl)
    return out


def run_one_by_one(
    layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, batch: AttentionBatch, table: AdapterTable,
    lora: LoraBatch | None, impl: Impl,
) -> None:  # fmt: skip
    attention, first = layer.attention, layer.attention_norm
    normed = ops.rms_norm(x, first.weight, first.eps, impl=impl)
    qkv = project(normed, layer.qkv, table, lora, impl).split(layer.qkv.sizes, dim=1)
    q, k, v = (part.unflatten(1, (-1, DIM)) for part in qkv)
    if layer.head_norms is not None:
        q, k = (
            ops.rms_norm(heads.contiguous(), norm.weight, norm.eps, impl=impl)
            for heads, norm in zip((q, k), layer.head_norms, strict=True)
        )
    ops.rotary_(q, k, cos, sin, impl=impl)
    ops.kv_write_(k, v, attention.k_cache, attention.v_cache, batch, impl=impl)
    attended = ops.paged_attention(q, attention.k_cache, attention.v_cache, batch, scale=attention.scale, impl=impl)
    update = project(attended.flatten(1), layer.out, table, lora, impl)
    normed = ops.rms_norm(update, layer.mlp_norm.weight, layer.mlp_norm.eps, residual=x, impl=impl)
    gate, up = project(normed, layer.gate_up, table, lora, impl).chunk(2, dim=1)
    x += project(ops.gated_act(gate, up, layer.act, impl=impl), layer.down, table, lora, impl)


ALL_ROWS = 10**9
LONG_STEPS = examples.some(
    product(["bf16", "q4_0", "q4_1", "q8_0/int8"], [(0, True), (17, False), (ALL_ROWS, False)]),
    ("bf16", (0, True)), ("q4_0", (17, False)), ("q4_1", (ALL_ROWS, False)), ("q8_0/int8", (17, False)),
)  # fmt: skip
"""Weights; how many of the first rows have no adapter, and whether heads have norms."""


@pytest.mark.parametrize("case", LONG_STEPS, ids=str)
def test_long_steps_are_what_operations_give(case: tuple[str, tuple[int, bool]], native: Impl) -> None:
    """Two prompts and decodes, of which rows go to other threads than their neighbours."""
    weights, (base_rows, head_norms) = case
    lengths, ends = np.array([200, 3, 150, 1, 1]), np.array([200, 40, 150, 33, 17])
    first_blocks = np.cumsum(-(-ends // BLOCK_TOKENS)) - -(-ends // BLOCK_TOKENS)
    blocks = (first_blocks[:, None] + np.arange(13)) % NUM_BLOCKS
    batch = ops.build_attention_batch(lengths, ends, blocks, "cpu")
    rows = int(lengths.sum())
    slots = np.arange(rows, dtype=np.int32) // 3 % 3 - 1  # some of the base
    slots[:base_rows] = -1
    lora = ops.build_lora_batch(slots, "cpu", np.linspace(0.5, 1.5, rows, dtype=np.float32))
    table = adapters()
    cos, sin = randn(rows, DIM, dtype=BF16, seed=1), randn(rows, DIM, dtype=BF16, seed=2)
    x = randn(rows, WIDTH, dtype=BF16, seed=3)
    got = []
    for as_stack in (True, False):
        layers = [decoder_layer(100 * i, weights, native, head_norms=head_norms) for i in range(2)]
        hidden = x.clone()
        if as_stack:
            stack = ops.decoder_stack(layers, impl=native)
            assert stack is not None
            stack.run(hidden, cos, sin, batch, table, lora)
        else:
            for layer in layers:
                run_one_by_one(layer, hidden, cos, sin, batch, table, lora, native)
        got.append(
            [hidden, *(cache for layer in layers for cache in (layer.attention.k_cache, layer.attention.v_cache))]
        )
    assert all(torch.equal(one, other) for one, other in zip(*got, strict=True))
    assert got[0][0].isfinite().all()


@pytest.mark.parametrize("are_int8", [False, True], ids=["bf16", "int8 rows"])
@pytest.mark.parametrize(("num", "per_adapter"), [(12, 1), (12, 2), (8, 4)])
@pytest.mark.parametrize("is_fixed", [True, False], ids=["fixed sums", "sums as they come"])
def test_decodes_of_many_adapters_are_what_operations_give(
    num: int, per_adapter: int, native: Impl, *, is_fixed: bool, are_int8: bool
) -> None:
    """Steps whose LoRA is computed beside the products, by adapters of many ranks, some of one layer's sites alone."""
    ops.fix_sums(is_fixed)
    rows = num * per_adapter + 3  # three of the base
    ranks = torch.tensor([(1 + 3 * i % 32, (16, 0, 7)[i % 3]) for i in range(num)], dtype=torch.int32)
    pages = torch.randperm(2 * num, generator=torch.Generator().manual_seed(5)).view(num, 1, 2).int() + 2
    table = AdapterTable(ranks, torch.linspace(0.2, 0.9, 2 * num).view(num, 2), pages)
    slots = np.random.default_rng(3).permutation(np.append(np.arange(rows - 3) % num, [-1, -1, -1])).astype(np.int32)
    lora = ops.build_lora_batch(slots, "cpu", np.linspace(0.5, 1.5, rows, dtype=np.float32))
    assert lora is not None
    assert lora.num_small_tiles == num
    batch = ops.build_attention_batch(np.ones(rows, int), np.full(rows, 1), np.arange(rows)[:, None], "cpu")
    cos, sin, x = (randn(rows, width, dtype=BF16, seed=seed) for seed, width in ((1, DIM), (2, DIM), (3, WIDTH)))
    layer = decoder_layer(7, "bf16", native, head_norms=False)
    if are_int8:
        qkv, out, gate_up, down = map(with_int8_rows, (layer.qkv, layer.out, layer.gate_up, layer.down))
        layer = replace(layer, qkv=qkv, out=out, gate_up=gate_up, down=down)
    stack = ops.decoder_stack([layer], impl=native)
    assert stack is not None
    got, want, without = x.clone(), x.clone(), x.clone()
    stack.run(got, cos, sin, batch, table, lora)
    run_one_by_one(layer, want, cos, sin, batch, table, lora, native)
    run_one_by_one(layer, without, cos, sin, batch, table, None, native)
    assert torch.equal(got, want)
    changed = (want != without).any(dim=1).numpy()
    assert (changed == (slots >= 0)).all()


def with_int8_rows(own: SiblingLinears) -> SiblingLinears:
    factors = torch.rand(POOL_PAGES * PAGE_ROWS, generator=torch.Generator().manual_seed(6)) / 1e4
    sites = [
        replace(site, a_rows=codes_of(site.a_rows), b_rows=codes_of(site.b_rows), factors=factors) for site in own.sites
    ]
    return replace(own, sites=sites)


def codes_of(rows: Tensor) -> Tensor:
    return (rows.float() * 200).to(torch.int8)

"""Layers run as one native call return the same bits as separate operations, also in steps that are cut into blocks."""

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
from helpers.kernel_cases import TOLERANCES, randn
from helpers.quantised_weights import random_weight
from torch import Tensor

from lora_kernels import ops
from lora_kernels.ops import BLOCK_TOKENS, PAGE_ROWS, AdapterTable, AttentionBatch, Impl, LoraBatch, LoraSite
from lora_kernels.quantised import Kind
from lora_kernels.tables import DecoderLayer, LayerChange, PagedAttention, RmsNorm, SiblingLinears

BF16 = torch.bfloat16
WIDTH, HEADS, KV_HEADS, DIM, MLP, NUM_BLOCKS = 288, 4, 2, 32, 320, 40
RANKS = ((5, 20), (3, 0))
"""Ranks of each of two adapters: at q, k, v, gate and up, and at out and down."""


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Use two threads, and sums that do not depend on the rows beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with fixed_sums():
        yield
    torch.set_num_threads(before)


POOL_PAGES = 26


def linears(seed: int, inputs: int, sizes: list[int], weights: str, impl: Impl) -> SiblingLinears:
    """Return siblings of these output sizes. weights: "bf16", "fp32" or a kind; "/int8" after a kind rounds inputs."""
    dtype = dtype_of(weights)
    if weights in ("bf16", "fp32"):
        packed = ops.pack_linear(randn(sum(sizes), inputs, dtype=dtype, seed=seed), impl=impl)
    else:
        kind = cast(Kind, weights.removesuffix("/int8"))
        packed = ops.pack_quantised([random_weight(kind, size, inputs) for size in sizes], impl=impl)
        packed = replace(packed, int8_inputs=weights.endswith("/int8"))
    pool_rows = POOL_PAGES * PAGE_ROWS
    sites = [
        LoraSite(len(sizes) == 1, 0, *(randn(pool_rows, n, dtype=dtype, seed=seed + n) / 8 for n in (inputs, size)))
        for size in sizes
    ]  # fmt: skip
    bias = randn(sum(sizes), dtype=dtype, seed=seed + 1) if len(sizes) == 3 else None
    return SiblingLinears(packed, bias, sizes, sites)


def dtype_of(weights: str) -> torch.dtype:
    return torch.float32 if weights == "fp32" else BF16


def decoder_layer(seed: int, weights: str, impl: Impl, *, head_norms: bool, mlp: int = MLP) -> DecoderLayer:
    dtype = dtype_of(weights)

    def norm(width: int, n: int) -> RmsNorm:
        return RmsNorm(1 + 0.1 * randn(width, dtype=dtype, seed=seed + n), 1e-5, plus_one=False)

    cache = [torch.zeros(NUM_BLOCKS, KV_HEADS, BLOCK_TOKENS, DIM, dtype=dtype) for _ in range(2)]
    return DecoderLayer(
        attention_norm=norm(WIDTH, 1),
        mlp_norm=norm(WIDTH, 2),
        head_norms=(norm(DIM, 3), norm(DIM, 4)) if head_norms else (),
        qkv=linears(seed + 10, WIDTH, [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], weights, impl),
        attention=PagedAttention(HEADS, KV_HEADS, DIM, DIM, 0, DIM**-0.5, 0.0, None, cache[0], cache[1]),
        out=linears(seed + 20, HEADS * DIM, [WIDTH], weights, impl),
        gate_up=linears(seed + 30, WIDTH, [mlp, mlp], weights, impl),
        act="silu",
        down=linears(seed + 40, mlp, [WIDTH], weights, impl),
    )


def adapters() -> AdapterTable:
    pages = torch.tensor([[[1, 0]], [[3, 2]]], dtype=torch.int32)
    return AdapterTable(torch.tensor(RANKS, dtype=torch.int32), torch.full((2, 2), 0.7), pages)


Plan = list[tuple[list[LayerChange], Tensor]]
"""Per adapter: the changes that it makes, and the rows that it changes."""


def project(
    x: Tensor, own: SiblingLinears, table: AdapterTable, lora: LoraBatch | None, impl: Impl, plan: Plan | None = None
) -> Tensor:
    out = ops.linear(x, own.packed, own.bias, impl=impl)
    outs = out.split(own.sizes, dim=1)
    for i, site in enumerate(own.sites if plan else []):
        inputs = changed(x, plan or [], site.index, of_inputs=True)
        if not torch.equal(inputs, x):
            outs[i].copy_(ops.linear(inputs, own.packed, own.bias, impl=impl).split(own.sizes, dim=1)[i])
    if lora is not None:
        ops.lora_add_(outs, x, own.sites, table, lora, impl=impl)
    for i, site in enumerate(own.sites if plan else []):
        outs[i].copy_(changed(outs[i], plan or [], site.index, of_inputs=False))
    return out


def changed(x: Tensor, plan: Plan, site: int, *, of_inputs: bool) -> Tensor:
    x = x.clone()
    for changes, rows in plan:
        for change in changes:
            if (change.site, change.of_inputs) == (site, of_inputs):
                x[rows] = what_becomes_of(x[rows].float(), change).to(x.dtype)
    return x


def what_becomes_of(x: Tensor, change: LayerChange) -> Tensor:
    first, second = change.first, change.second
    if change.kind == "add":
        return x + first
    if change.kind == "around":
        return x * first if second is None else (x - second) * first + second
    if change.kind == "blocks":
        pieces = x.view(len(x), len(first), -1)
        return torch.einsum("nbi,bij->nbj", pieces, first).reshape(x.shape)
    if second is None:
        return x * first
    one, other = x.view(len(x), -1, 2, change.group // 2).unbind(2)
    return x * first + torch.stack([-other, one], 2).view(x.shape) * second


def attention_of(layer: DecoderLayer) -> PagedAttention:
    assert isinstance(layer.attention, PagedAttention)
    return layer.attention


def run_one_by_one(
    layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, batch: AttentionBatch, table: AdapterTable,
    lora: LoraBatch | None, impl: Impl, plan: Plan | None = None,
) -> None:  # fmt: skip
    attention, first = attention_of(layer), layer.attention_norm
    normed = ops.rms_norm(x, first.weight, first.eps, impl=impl)
    qkv = project(normed, layer.qkv, table, lora, impl, plan).split(layer.qkv.sizes, dim=1)
    q, k, v = (part.unflatten(1, (-1, DIM)) for part in qkv)
    if layer.head_norms:
        q, k = (
            ops.rms_norm(heads.contiguous(), norm.weight, norm.eps, impl=impl)
            for heads, norm in zip((q, k), layer.head_norms, strict=True)
        )
    ops.rotary_(q, k, cos, sin, impl=impl)
    ops.kv_write_(k, v, attention.k_cache, attention.v_cache, batch, impl=impl)
    attended = ops.paged_attention(q, attention.k_cache, attention.v_cache, batch, scale=attention.scale, impl=impl)
    update = project(attended.flatten(1), layer.out, table, lora, impl, plan)
    normed = ops.rms_norm(update, layer.mlp_norm.weight, layer.mlp_norm.eps, residual=x, impl=impl)
    gate, up = project(normed, layer.gate_up, table, lora, impl, plan).chunk(2, dim=1)
    x += project(ops.gated_act(gate, up, layer.act, impl=impl), layer.down, table, lora, impl, plan)


ALL_ROWS = 10**9
LONG_STEPS = examples.some(
    product(["bf16", "q4_0", "q4_1", "q8_0/int8"], [(0, True), (17, False), (ALL_ROWS, False)]),
    ("bf16", (0, True)), ("q4_0", (17, False)), ("q4_1", (ALL_ROWS, False)), ("q8_0/int8", (17, False)),
)  # fmt: skip
"""Weights; the number of leading rows without an adapter; whether heads have norms."""


@pytest.mark.parametrize("case", LONG_STEPS, ids=str)
def test_long_steps_are_what_operations_give(case: tuple[str, tuple[int, bool]], native: Impl) -> None:
    """Two prompts and several decodes, whose rows are spread over threads."""
    weights, (base_rows, head_norms) = case
    lengths, ends = np.array([200, 3, 150, 1, 1]), np.array([200, 40, 150, 33, 17])
    first_blocks = np.cumsum(-(-ends // BLOCK_TOKENS)) - -(-ends // BLOCK_TOKENS)
    blocks = (first_blocks[:, None] + np.arange(13)) % NUM_BLOCKS
    batch = ops.build_attention_batch(lengths, ends, blocks, "cpu")
    rows = int(lengths.sum())
    slots = np.arange(rows, dtype=np.int32) // 3 % 3 - 1  # -1 is the base
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
            [
                hidden,
                *(cache for layer in layers for cache in (attention_of(layer).k_cache, attention_of(layer).v_cache)),
            ]
        )
    assert all(torch.equal(one, other) for one, other in zip(*got, strict=True))
    assert got[0][0].isfinite().all()


@pytest.mark.parametrize("are_int8", [False, True], ids=["bf16", "int8 rows"])
@pytest.mark.parametrize(("num", "per_adapter"), [(12, 1), (12, 2), (8, 4)])
@pytest.mark.parametrize("is_fixed", [True, False], ids=["fixed sums", "sums as they come"])
def test_decodes_of_many_adapters_are_what_operations_give(
    num: int, per_adapter: int, native: Impl, *, is_fixed: bool, are_int8: bool
) -> None:
    """LoRA computed along with the products, for different ranks; some adapters have no rows at out and down."""
    ops.fix_sums(is_fixed)
    rows = num * per_adapter + 3  # three rows of the base
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


# ---------------------------------------------------------------- changes other than LoRA

Q, K, V, OUT, GATE, UP, DOWN = range(7)
UNEVEN_MLP = 336
"""MLP size for which the second of two sibling layers begins inside a panel of packed weights."""


def numbered(layer: DecoderLayer) -> DecoderLayer:
    """Give every linear layer its own site, numbered from Q to DOWN."""
    number = iter(range(7))
    parts = [
        replace(own, sites=[replace(site, index=next(number)) for site in own.sites])
        for own in (layer.qkv, layer.out, layer.gate_up, layer.down)
    ]
    return replace(layer, qkv=parts[0], out=parts[1], gate_up=parts[2], down=parts[3])


def factors(num: int, seed: int) -> Tensor:
    return 1 + 0.3 * randn(num, seed=seed)


def rotations(num: int, size: int, seed: int) -> Tensor:
    skew = 0.2 * randn(num, size, size, seed=seed)
    return torch.linalg.matrix_exp(skew - skew.mT)


def changes_of_four(mlp: int) -> list[list[LayerChange]]:
    """Return the changes of four adapters: factors, pair rotations, block rotations, and factors around a bias."""
    queries, keys = HEADS * DIM, KV_HEADS * DIM
    return [
        [LayerChange(K, False, "scale", factors(keys, 1)), LayerChange(V, False, "scale", factors(keys, 2)),
         LayerChange(DOWN, True, "scale", factors(mlp, 3))],
        [LayerChange(Q, False, "scale", factors(queries, 4), 0.3 * randn(queries, seed=5), 32),
         LayerChange(OUT, False, "scale", factors(WIDTH, 6), 0.3 * randn(WIDTH, seed=7), 2)],
        [LayerChange(Q, True, "blocks", rotations(9, 32, 8)), LayerChange(V, True, "blocks", rotations(32, 9, 9)),
         LayerChange(UP, True, "scale", factors(WIDTH, 10)), LayerChange(DOWN, True, "blocks", rotations(1, mlp, 11)),
         LayerChange(DOWN, False, "scale", factors(WIDTH, 12))],
        [LayerChange(Q, False, "add", randn(queries, seed=13)),
         LayerChange(Q, False, "around", factors(queries, 14), randn(queries, seed=15)),
         LayerChange(GATE, False, "around", factors(mlp, 16))],
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [14, 300])
@pytest.mark.parametrize("weights", ["bf16", "fp32", "q4_0"])
def test_changes_of_layers_are_what_torch_makes_of_them(weights: str, rows: int, native: Impl) -> None:
    """Decodes, and prompts whose rows several threads share, of five adapters and the base; some have LoRA too."""
    ops.fix_sums(False)
    mlp = MLP if weights == "q4_0" else UNEVEN_MLP
    dtype = dtype_of(weights)
    if rows == 14:
        batch = ops.build_attention_batch(np.ones(rows, int), np.full(rows, 1), np.arange(rows)[:, None], "cpu")
    else:
        blocks = np.arange(2 * 10).reshape(2, 10)
        batch = ops.build_attention_batch(np.array([150, 150]), np.array([150, 150]), blocks, "cpu")
    owner = np.random.default_rng(2).integers(-1, 5, rows)
    plan: Plan = [(own, torch.from_numpy(np.flatnonzero(owner == i))) for i, own in enumerate(changes_of_four(mlp))]
    assert all(len(places) for _, places in plan)
    table = AdapterTable(torch.full((2, 7), 5, dtype=torch.int32), torch.full((2, 7), 0.2), adapters().pages)
    slots = np.where(owner == 4, 1, np.where(owner == 3, 0, -1)).astype(np.int32)
    lora = ops.build_lora_batch(slots, "cpu", None)
    cos, sin, x = (randn(rows, width, dtype=dtype, seed=seed) for seed, width in ((1, DIM), (2, DIM), (3, WIDTH)))
    layers = [numbered(decoder_layer(7, weights, native, head_norms=True, mlp=mlp)) for _ in range(3)]
    stack = ops.decoder_stack([layers[0]], impl=native)
    assert stack is not None
    made = [stack.prepare(own) for own, _ in plan]
    assert all(made)
    got, want, without = x.clone(), x.clone(), x.clone()
    parts = [(one, places) for one, (_, places) in zip(made, plan, strict=True) if one is not None]
    stack.run(got, cos, sin, batch, table, lora, ops.changed_rows(parts))
    run_one_by_one(layers[1], want, cos, sin, batch, table, lora, native, plan)
    run_one_by_one(layers[2], without, cos, sin, batch, table, lora, native)
    rtol, atol = TOLERANCES[dtype]
    spread = float(want.float().std())
    torch.testing.assert_close(got.float(), want.float(), rtol=4 * rtol, atol=4 * atol * spread)
    differs = ((without - want).abs().amax(1) > 0.05 * spread).numpy()
    if rows == 14:  # in a prompt, attention carries a change to later rows
        assert (differs == ((owner >= 0) & (owner < 4))).all()


def test_changes_are_refused_that_fit_nothing(native: Impl) -> None:
    ops.fix_sums(False)
    layer = numbered(decoder_layer(7, "bf16", native, head_norms=False))
    stack = ops.decoder_stack([layer], impl=native)
    assert stack is not None
    for bad, why in (
        (LayerChange(Q, False, "scale", factors(128, 1), randn(128), 3), "groups of 3"),
        (LayerChange(Q, False, "scale", factors(128, 1), randn(64), 32), "64 second numbers"),
        (LayerChange(Q, True, "blocks", randn(9, 32, 31)), "square"),
        (LayerChange(-1, True, "add", randn(9)), "no site -1"),
    ):
        with pytest.raises(RuntimeError, match=why):
            stack.prepare([bad])
    batch = ops.build_attention_batch(np.ones(2, int), np.ones(2, int), np.arange(2)[:, None], "cpu")
    cos, sin, x = (randn(2, width, dtype=BF16, seed=seed) for seed, width in ((1, DIM), (2, DIM), (3, WIDTH)))
    wide, narrow = (
        stack.prepare([LayerChange(K, False, "add", randn(65))]),
        stack.prepare([LayerChange(K, False, "add", randn(64))]),
    )
    assert wide is not None
    assert narrow is not None
    for own, places, why in (
        (wide, [0], "65 numbers does not fit 64"),
        (narrow, [0, 2], "row 2 of 2"),
        (narrow, [1, 0], "ascending"),
        (narrow, [-1], "row -1"),
    ):
        with pytest.raises(RuntimeError, match=why):
            stack.run(x.clone(), cos, sin, batch, None, None, ops.changed_rows([(own, torch.tensor(places))]))
    ops.fix_sums(True)
    assert stack.prepare([LayerChange(K, False, "add", randn(64))]) is None, "torch adds in another order"

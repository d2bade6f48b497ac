"""The native kernels as torch operators: torch's own checks, torch.compile, and clear refusals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.kernel_cases import assert_close, attention_case, lora_case
from helpers.quantised_weights import random_weight
from torch import Tensor

from lora_kernels import ops
from lora_kernels.ops import Impl

BF16 = torch.bfloat16
ROW, WORDS = torch.tensor([1]), torch.zeros(1, 2, dtype=torch.int32)


def test_schemas_and_fake_kernels_are_true(native: Impl) -> None:
    """An operator mutates what its schema says, and its fake result has the real one's shape."""
    del native
    checks = ("test_schema", "test_faketensor")
    lorafleet = torch.ops.lorafleet
    x, weight, residual = torch.randn(5, 64).to(BF16), torch.randn(48, 64).to(BF16), torch.ones(5, 64, dtype=BF16)
    packed = torch.empty(2, 32, 32, 2, dtype=BF16)
    torch.library.opcheck(lorafleet.pack_linear_.default, (packed, [weight]), test_utils=checks)
    lorafleet.pack_linear_(packed, [weight])
    torch.library.opcheck(lorafleet.linear.default, (x, packed, None, 48), test_utils=checks)
    ends, ids = torch.tensor([2, 5], dtype=torch.int32), torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]])
    torch.library.opcheck(lorafleet.grouped_linear.default, (x, packed, ends, -1, False), test_utils=checks)
    up, down = torch.zeros(4, 32, 32, 2, dtype=BF16), torch.zeros(4, 16, 32, 2, dtype=BF16)
    routed = (x, ids, torch.rand(5, 2), up, down, [-1, -1], False, "silu", 2)
    torch.library.opcheck(lorafleet.experts.default, routed, test_utils=checks)
    blocks = random_weight("q4_k", 48, 256).rows
    torch.library.opcheck(lorafleet.pack_quantised.default, (blocks, "q4_k", 256), test_utils=checks)
    panels, form = lorafleet.pack_quantised(blocks, "q4_k", 256)
    for int8_inputs in (False, True):
        quantised = (torch.randn(5, 256).to(BF16), [panels, panels], [form, form], [48, 48], None, int8_inputs)
        torch.library.opcheck(lorafleet.quant_linear.default, quantised, test_utils=checks)
        grouped = (torch.randn(5, 256).to(BF16), panels, ends, form, int8_inputs)
        torch.library.opcheck(lorafleet.grouped_linear.default, grouped, test_utils=checks)
    torch.library.opcheck(lorafleet.rms_norm.default, (x, x[0].clone(), 1e-5, residual, False), test_utils=checks)
    torch.library.opcheck(lorafleet.gated_act.default, (x, x.clone(), "silu"), test_utils=checks)
    rows, words = torch.tensor([3, 1]), torch.tensor([[5, -1], [0, 7]], dtype=torch.int32)
    torch.library.opcheck(lorafleet.mask_logits_.default, (x, rows, words), test_utils=checks)
    torch.library.opcheck(lorafleet.argmax.default, (x,), test_utils=checks)
    dt, a, b, state = torch.rand(5, 64), -torch.rand(4, 64), torch.rand(5, 4), torch.rand(4, 64)
    scan = (x, dt, a, b, b.clone(), state, None, None, None, True)
    torch.library.opcheck(lorafleet.selective_scan.default, scan, test_utils=checks)
    heads, runs = torch.randn(5, 2, 8), torch.tensor([[0, 1, 1, 0, -1], [1, 5, 2, 2, 0]])
    delta = (heads, heads, heads, -torch.rand(5, 2), torch.rand(5, 2), torch.randn(3, 2, 8, 8), runs, True, False)
    torch.library.opcheck(lorafleet.delta_rule.default, delta, test_utils=checks)
    conv = (dt, torch.randn(64, 4), torch.randn(3, 4, 64), runs, None, True)
    torch.library.opcheck(lorafleet.causal_conv.default, conv, test_utils=checks)
    gates, vector, channels = torch.randn(2, 5, 2), torch.rand(2, 2), torch.randn(5, 48)
    mixer = (torch.randn(48, 4), None, torch.randn(3, 4, 48), -vector[0], vector[1], torch.randn(3, 2, 8, 8), runs)
    torch.library.opcheck(lorafleet.gated_delta.default, (channels, *gates, *mixer), test_utils=checks)
    own = (*mixer[:3], -vector[0], vector[1], vector[0], torch.randn(3, 2, 8, 8), torch.rand(16), 1e-5, 8, runs)
    scan = (torch.randn(5, 16), torch.randn(5, 48), gates[0], *own)
    torch.library.opcheck(lorafleet.gated_scan.default, scan, test_utils=checks)
    torch.library.opcheck(lorafleet.gate_heads_.default, (heads, torch.randn(5, 2, 8)), test_utils=checks)
    pools, pieces = [torch.zeros(9, 3), torch.zeros(7)], torch.tensor([[0, 2, 4, 12], [1, 5, 2, 0]])
    buffer = torch.arange(64, dtype=torch.uint8)
    torch.library.opcheck(lorafleet.copy_rows_.default, (pools, buffer, pieces), test_utils=checks)
    q, k, cos = torch.randn(5, 2, 8), torch.randn(5, 1, 8), torch.rand(5, 8)
    torch.library.opcheck(lorafleet.rotary_.default, (q, k, cos, cos.clone()), test_utils=checks)

    case = attention_case((1, 20), (33, 20), (4, 2), (16, 8), torch.float32)
    caches = [cache.nan_to_num() for cache in (case.k_cache, case.v_cache)]
    lists = (case.batch.block_tables, case.batch.query_starts, case.batch.kv_lens)
    attention = lorafleet.paged_attention.default
    torch.library.opcheck(attention, (case.q, *caches, *lists, 0.25, 0, 0.0, None), test_utils=checks)
    k, v = torch.randn(21, 2, 16), torch.randn(21, 2, 8)
    torch.library.opcheck(lorafleet.kv_write_.default, (k, v, *caches, case.batch.slot_mapping), test_utils=checks)

    lora = lora_case(np.array([0, 1, -1, 1]), [16, 16], 32, (24,), torch.float32)
    sites, table, batch = lora.sites, lora.table, lora.batch
    arguments = (
        *(
            lora.outs,
            lora.x,
            [site.a_rows.nan_to_num() for site in sites],
            [site.b_rows.nan_to_num() for site in sites],
            [],
        ),
        *([site.index for site in sites], [site.group for site in sites], table.ranks, table.scales, table.pages),
        *(batch.rows, batch.small_tiles, batch.large_tiles, batch.counts, batch.row_scales),
    )
    torch.library.opcheck(lorafleet.lora_add_.default, arguments, test_utils=checks)


def test_a_layer_compiles_as_one_graph(native: Impl) -> None:
    lora = lora_case(np.array([0, 1, -1, 1]), [16, 3], 32, (24, 24), torch.float32)
    attention = attention_case((1, 3), (20, 3), (3, 1), (8, 8), torch.float32)
    weight = ops.pack_linear(torch.randn(48, 32), impl=native)
    norm_weight = torch.rand(32)

    def layer(x: torch.Tensor) -> torch.Tensor:
        hidden = ops.rms_norm(x, norm_weight, 1e-5, impl=native)
        gate, up = ops.linear(hidden, weight, impl=native).split([24, 24], dim=-1)
        ops.lora_add_([gate, up], hidden, lora.sites, lora.table, lora.batch, impl=native)
        q = ops.gated_act(gate, up, impl=native).view(4, 3, 8)
        return ops.paged_attention(q, attention.k_cache, attention.v_cache, attention.batch, scale=1.0, impl=native)

    expected = layer(lora.x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(lora.x), expected, rtol=0, atol=0)


def copy_piece(*piece: int) -> None:
    """Copy one piece of a buffer of 64 bytes into five rows of 12 bytes."""
    ops.copy_rows_([torch.zeros(5, 3)], torch.zeros(64, dtype=torch.uint8), torch.tensor([piece]), impl="cpu")


def test_rows_are_copied_where_the_pieces_say(native: Impl) -> None:
    buffer = torch.randint(0, 256, (1_000,), dtype=torch.uint8)
    pieces = torch.tensor([[0, 3, 2, 64], [1, 0, 5, 128], [2, 6, 1, 256], [0, 0, 0, 1_000], [2, 1, 3, 320]])

    def copied(impl: Impl) -> list[Tensor]:
        pools = [torch.zeros(5, 3), torch.zeros(5), torch.zeros(8, 6, dtype=BF16)]
        ops.copy_rows_(pools, buffer, pieces, impl=impl)
        return pools

    for pool, expected in zip(copied(native), copied("reference"), strict=True):
        assert torch.equal(pool.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(copied(native)[1].view(torch.uint8), buffer[128:148])  # compared as bytes: some are NaN


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.gated_act(torch.ones(2, 4), torch.ones(2, 5), impl="cpu"), "gate and up must have one shape"),
        (lambda: ops.gated_act(torch.ones(4, 2).T, torch.ones(2, 4), impl="cpu"), "rows whose entries are contiguous"),
        (lambda: ops.rms_norm(torch.ones(2, 4), torch.ones(5), 1e-5, impl="cpu"), "weight needs 4 entries"),
        (lambda: ops.rms_norm(torch.ones(2, 4), torch.ones(4, dtype=BF16), 1e-5, impl="cpu"), "weight is BFloat16"),
        (lambda: ops.gate_heads_(torch.ones(2, 3, 4), torch.ones(2, 3, 5), impl="cpu"), r"must be \[T, H, D\]"),
        (lambda: ops.mask_logits_(torch.ones(2, 33), ROW, WORDS[:, :1], impl="cpu"), r"words must be \[rows, 2\]"),
        (lambda: ops.mask_logits_(torch.ones(2, 33), ROW + 1, WORDS, impl="cpu"), "row 2 is not there"),
        (lambda: ops.argmax(torch.ones(2, 0), impl="cpu"), "V > 0"),
        (lambda: copy_piece(1, 0, 1, 0), "pool 1 is not there"),
        (lambda: copy_piece(-1, 0, 1, 0), "pool -1 is not there"),
        (lambda: copy_piece(0, 4, 2, 0), "rows 4 to 6 of 5 are not there"),
        (lambda: copy_piece(0, -1, 2, 0), "rows -1 to 1 of 5 are not there"),
        (lambda: copy_piece(0, 0, 2, 41), "the buffer of 64 bytes has no 24 at 41"),
        (lambda: copy_piece(0, 0, 2, -4), "the buffer of 64 bytes has no 24 at -4"),
        (lambda: ops.rms_norm(torch.ones(2, 4).double(), torch.ones(4).double(), 1e-5, impl="cpu"), "dtype is Double"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], object], message: str, native: Impl) -> None:
    del native
    with pytest.raises(RuntimeError, match=message):
        call()


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="impl is 'fastest'"):
        ops.gated_act(torch.ones(1, 1), torch.ones(1, 1), impl="fastest")  # pyright: ignore[reportArgumentType]


def test_the_default_on_a_cpu_is_native(native: Impl) -> None:
    x = torch.randn(3, 8)
    assert torch.equal(ops.gated_act(x, x), ops.gated_act(x, x, impl=native))
    assert_close(ops.gated_act(x, x), ops.gated_act(x, x, impl="reference"))

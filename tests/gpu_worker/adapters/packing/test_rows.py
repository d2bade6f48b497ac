"""Rows packed without torch equal those that torch packs, for all dtypes; other adapters are left to torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapter_files import BASE, safetensors
from helpers.adapter_loading import rows_of
from helpers.kind_files import KIND_BASE, kind_config, kind_tensors
from safetensors.torch import save
from torch import Tensor

from gpu_worker.adapters.packing.packer import Packer
from gpu_worker.adapters.packing.rows import MAX_EXPERT_RANK, NUM_OUTLINES, PIECE_BYTES, PackedRows, RowPacker
from gpu_worker.layers.adaptable_modules import AdaptableModules
from gpu_worker.layers.attention import StepContext
from gpu_worker.layers.expert_modules import ExpertShape, ExpertSite, GroupedExperts
from gpu_worker.layers.lora import SiteInfo
from peft_adapters.format import read_adapter
from peft_adapters.kinds.registry import NAMES as KIND_NAMES
from peft_adapters.safetensors_header import MAX_KEPT_HEADER_BYTES, read_header
from protocol.wire.errors import AdapterRefused
from protocol.wire.messages import ServedModel, SiteShape

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["q", "up"], "rank_pattern": {"up": 17},
}  # fmt: skip


def packers(dtype: torch.dtype, head: torch.dtype = torch.float32) -> tuple[Packer, RowPacker]:
    """Return both packers for one model. head: dtype of its last linear layer, which has no rows in these tests."""
    sites = [
        SiteInfo("layers.0.q", 0, 0, 5, 7, "linear", dtype),
        SiteInfo("layers.0.k", 1, 0, 5, 2, "linear", dtype),
        SiteInfo("layers.0.up", 2, 1, 4, 9, "conv1d", dtype),
        SiteInfo("layers.1.up", 3, 1, 4, 9, "linear", head),
    ]
    served = ServedModel(
        model="m", name="m", fingerprint="", model_type="", vocab_size=10, max_model_len=10,
        sites=[SiteShape(site.name, site.in_features, site.out_features, site.kind) for site in sites],
    )  # fmt: skip
    packer = Packer(sites, served, AdaptableModules(StepContext()))
    return packer, RowPacker(packer.row_sites, served)


def tensors(dtype: torch.dtype, scale: float = 1.0) -> dict[str, Tensor]:
    """Return an adapter's tensors, with values of all magnitudes, among them ties between two bf16 numbers."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for site, rank, k, n in (("0.q", 3, 5, 7), ("0.up", 17, 4, 9), ("1.up", 17, 4, 9)):
        for half, shape in (("A", (rank, k)), ("B", (n, rank))):
            values = torch.randn(shape, generator=generator) * torch.logspace(-7, 2, shape[1]) * scale
            values[0, 0], values[0, 1], values[0, 2] = 1.00390625, 1.01171875, -0.0
            found[f"base_model.model.layers.{site}.lora_{half}.weight"] = values.to(dtype)
    return found


def expert_packers(dtype: torch.dtype) -> tuple[Packer, RowPacker]:
    """Return both packers for a model with one linear layer and 4 experts of 8 inputs and inner size 6."""
    prefix = "model.layers.0.mlp"
    shapes = {f"{prefix}.experts.gate_up_proj": (12, 8), f"{prefix}.experts.down_proj": (8, 6)}
    sites = [ExpertSite(name, torch.empty(0), None, ExpertShape(4, k, n, dtype)) for name, (n, k) in shapes.items()]
    adaptable = AdaptableModules(StepContext())
    adaptable.experts = {f"{prefix}.experts": GroupedExperts(None, sites, 4)}
    linear = SiteInfo("model.layers.0.q_proj", 0, 0, 8, 5, "linear", dtype)
    served = ServedModel(
        model="m", name="m", fingerprint="", model_type="qwen3_moe", vocab_size=10, max_model_len=10,
        sites=[
            SiteShape(linear.name, 8, 5),
            *(SiteShape(name, k, n, "parameter", num_experts=4) for name, (n, k) in shapes.items()),
        ],
    )  # fmt: skip
    packer = Packer([linear], served, adaptable)
    return packer, RowPacker(packer.row_sites, served)


def expert_adapter(*, layers: bool, rank: int = 3) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of an adapter: fused experts as PEFT saves them, or per expert if `layers`."""
    generator, prefix = torch.Generator().manual_seed(0), "base_model.model.model.layers.0"
    shapes: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {"q_proj": ((rank, 8), (5, rank))}
    if layers:
        for expert in range(4):
            for name, (k, n) in {"gate_proj": (8, 6), "up_proj": (8, 6), "down_proj": (6, 8)}.items():
                shapes[f"mlp.experts.{expert}.{name}"] = ((rank, k), (n, rank))
        config = {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
    else:
        shapes["mlp.experts.base_layer"] = ((4 * rank, 8), (12, 4 * rank))
        shapes["mlp.experts"] = ((4 * rank, 6), (8, 4 * rank))
        config = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    found = {
        f"{prefix}.{name}.lora_{half}.weight": torch.randn(shape, generator=generator)
        for name, pair in shapes.items()
        for half, shape in zip("AB", pair, strict=True)
    }
    return {"peft_type": "LORA", "r": rank, "lora_alpha": 5, **config}, found


def pack_rows(packer: RowPacker, weights: dict[str, Tensor], config: dict[str, Any] = CONFIG) -> PackedRows | None:
    return packer.pack(config, save(weights), lambda num_bytes: bytearray(b"\xff") * num_bytes)  # memory full of NaN


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_other_kinds_are_those_of_torch(dtype: torch.dtype, int8: bool) -> None:
    """Kinds whose rows follow from their tensors alone; a kind that needs weights or more is left to torch."""
    served = KIND_BASE
    sites = [SiteInfo(s.name, i, 0, s.in_features, s.out_features, "linear", dtype) for i, s in enumerate(BASE.sites)]
    packer = Packer(sites, served, AdaptableModules(StepContext()), int8=int8)
    for kind in KIND_NAMES:
        config = kind_config(kind)
        weights = safetensors(kind_tensors(config))
        rows = RowPacker(packer.row_sites, served).pack(config, weights, lambda n: bytearray(b"\xff") * n)
        spec = read_adapter(config, read_header(weights), served)
        if not spec.sites or any(part.needs_weight for part in spec.sites):
            assert rows is None
            continue
        assert rows is not None
        found, expected = packer.wrap("d", rows), packer.pack("d", config, weights)
        assert torch.equal(found.rows.buffer, expected.rows.buffer), kind
        assert (found.ranks == expected.ranks).all()
        assert (found.ranks > 0).all()
        assert (found.scales == expected.scales).all()
        broken = {name: value.copy() for name, value in kind_tensors(config).items()}
        worst = next(value for value in broken.values() if value.dtype == np.float32)
        worst.flat[0] = np.inf
        with pytest.raises(AdapterRefused, match="not finite"):
            RowPacker(packer.row_sites, served).pack(config, safetensors(broken), bytearray)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("served", DTYPES, ids=str)
@pytest.mark.parametrize("head", DTYPES, ids=str)
def test_rows_are_those_of_torch(stored: torch.dtype, served: torch.dtype, head: torch.dtype) -> None:
    packer, row_packer = packers(served, head)
    weights = tensors(stored)
    expected = packer.pack("d", CONFIG, save(weights))
    rows = pack_rows(row_packer, weights)
    assert rows is not None
    got = packer.wrap("d", rows)
    assert got.ranks.tolist() == expected.ranks.tolist() == [3, 0, 17, 17]
    assert got.scales.tolist() == expected.scales.tolist()
    assert got.num_pages == expected.num_pages
    assert not got.extras
    assert not expected.extras
    assert got.invocation == expected.invocation
    sites = packer.row_sites
    for (index, *own), (expected_index, *references) in zip(rows_of(got, sites), rows_of(expected, sites), strict=True):
        assert index == expected_index
        for tensor, reference in zip(own, references, strict=True):
            assert tensor.dtype == reference.dtype
            assert torch.equal(tensor, reference)
            assert torch.equal(tensor.signbit(), reference.signbit())


def test_a_packer_that_has_seen_others_says_what_a_new_one_says() -> None:
    """Every config, in random order and each twice, for adapters with one header: configs differ in one field each."""
    changes: list[dict[str, Any]] = [
        {}, {"lora_alpha": 7.3}, {"lora_alpha": -2}, {"lora_alpha": 0}, {"lora_alpha": None}, {"lora_alpha": "5"},
        {"lora_alpha": True}, {"lora_alpha": 1e39}, {"use_rslora": True}, {"use_rslora": True, "lora_alpha": 7.3},
        {"alpha_pattern": {"up": 5}}, {"alpha_pattern": {"up": 5}, "lora_alpha": 9}, {"alpha_pattern": {"up": 9}},
        {"rank_pattern": {}}, {"target_modules": ["q"]}, {"r": 4}, {"inference_mode": True},
        {"peft_type": "ADALORA"}, {"use_dora": True}, {"exclude_modules": ["0.q"]}, {"alora_invocation_tokens": [1, 2]},
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    known = packers(torch.float32)[1]
    seen: set[tuple[float, ...]] = set()
    for i in rng.permutation(2 * len(changes)) % len(changes):
        config, weights = CONFIG | changes[i], tensors(torch.float32, scale=float(rng.random()))
        got, expected = pack_rows(known, weights, config), pack_rows(packers(torch.float32)[1], weights, config)
        assert (got is None) == (expected is None), changes[i]
        if got is not None and expected is not None:
            assert got.scales.tolist() == expected.scales.tolist(), changes[i]
            assert got.ranks.tolist() == expected.ranks.tolist()
            assert (bytes(got.buffer), got.invocation) == (bytes(expected.buffer), expected.invocation)
            seen.add(tuple(got.scales.tolist()))
    assert len(seen) > 6
    assert len(known._outlines) <= NUM_OUTLINES


def test_outlines_are_few_and_of_small_headers() -> None:
    packer, weights = packers(torch.float32)[1], tensors(torch.float32)
    for num in range(NUM_OUTLINES + 3):
        assert pack_rows(packer, weights, CONFIG | {"alora_invocation_tokens": [num % 9, num // 9]}) is not None
    assert len(packer._outlines) == NUM_OUTLINES
    packer = packers(torch.float32)[1]
    raw = bytearray(save(weights, metadata={"padding": "x" * MAX_KEPT_HEADER_BYTES}))
    assert packer.pack(CONFIG, memoryview(raw), bytearray) is not None
    assert not packer._outlines


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("served", DTYPES, ids=str)
def test_rows_of_experts_are_those_of_torch(served: torch.dtype, layers: bool) -> None:
    packer, row_packer = expert_packers(served)
    config, weights = expert_adapter(layers=layers)
    expected, rows = packer.pack("d", config, save(weights)), pack_rows(row_packer, weights, config)
    assert rows is not None
    got = packer.wrap("d", rows)
    assert (got.num_pages, got.ranks.tolist()) == (expected.num_pages, expected.ranks.tolist())
    assert got.num_pages[-3:-1] == (1, 1)
    assert len(rows_of(got, packer.row_sites)) == len(rows_of(expected, packer.row_sites)) == 1
    assert len(got.experts) == len(expected.experts) == 2
    for part, reference in zip(got.experts, expected.experts, strict=True):
        assert (part.site, np.float32(part.scale)) == (reference.site, np.float32(reference.scale))
        for tensor, other in ((part.a, reference.a), (part.b, reference.b)):
            assert tensor.dtype == other.dtype == served
            assert torch.equal(tensor, other)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_int8_rows_are_those_of_torch_within_half_a_step(stored: torch.dtype) -> None:
    packer, _ = packers(torch.bfloat16)
    packer = replace(packer, int8=True)
    row_packer, weights = RowPacker(packer.row_sites, packer.served), tensors(stored)
    weights["base_model.model.layers.0.q.lora_B.weight"].zero_()
    expected, rows = packer.pack("d", CONFIG, save(weights)), pack_rows(row_packer, weights)
    assert rows is not None
    got = packer.wrap("d", rows)
    assert got.num_pages == expected.num_pages
    sites = packer.row_sites
    own = rows_of(got, sites)
    assert [index for index, *_ in own] == [0, 2, 3]
    for (index, *parts), (expected_index, *references) in zip(own, rows_of(expected, sites), strict=True):
        assert index == expected_index
        assert all(torch.equal(part, reference) for part, reference in zip(parts, references, strict=True))
        assert len(parts[2]) == len(parts[0])
    exact = weights["base_model.model.layers.0.up.lora_A.weight"].float()
    step = exact.abs().amax(1, keepdim=True) / 127
    assert (own[1][1] * step - exact).abs().le(0.5001 * step).all()
    weights["base_model.model.layers.1.up.lora_B.weight"][2, 1] = torch.inf
    with pytest.raises(AdapterRefused, match=r"not finite in float32: base_model\.model\.layers\.1\.up\.lora_B"):
        pack_rows(row_packer, weights)


def test_tensors_of_several_pieces_are_those_of_torch() -> None:
    width = 100_000
    site = SiteInfo("layers.0.q", 0, 0, width, width, "linear", torch.bfloat16)
    served = ServedModel(
        model="m", name="m", fingerprint="", model_type="", vocab_size=10, max_model_len=10,
        sites=[SiteShape(site.name, width, width)],
    )  # fmt: skip
    packer, prefix = Packer([site], served, AdaptableModules(StepContext())), f"base_model.model.{site.name}"
    weights = {f"{prefix}.lora_A.weight": torch.randn(7, width), f"{prefix}.lora_B.weight": torch.randn(width, 7)}
    assert min(tensor.nbytes for tensor in weights.values()) > 2 * PIECE_BYTES
    config = {"peft_type": "LORA", "r": 7, "lora_alpha": 5, "target_modules": ["q"]}
    rows = pack_rows(RowPacker(packer.row_sites, served), weights, config)
    assert rows is not None
    ((_, a, b, _),) = rows_of(packer.wrap("d", rows), packer.row_sites)
    ((_, expected_a, expected_b, _),) = rows_of(packer.pack("d", config, save(weights)), packer.row_sites)
    assert torch.equal(a, expected_a)
    assert torch.equal(b, expected_b)


def test_what_experts_cannot_have_is_left_alone_or_refused() -> None:
    _, row_packer = expert_packers(torch.float32)
    for layers in (False, True):
        config, weights = expert_adapter(layers=layers, rank=MAX_EXPERT_RANK + 1)
        assert pack_rows(row_packer, weights, config) is None
        config, weights = expert_adapter(layers=layers)
        weights[next(name for name in weights if "experts" in name)][1, 2] = torch.nan
        with pytest.raises(AdapterRefused, match=r"not finite in float32: .*experts"):
            pack_rows(row_packer, weights, config)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("served", DTYPES, ids=str)
def test_what_is_not_finite_is_refused_by_name(stored: torch.dtype, served: torch.dtype) -> None:
    _, row_packer = packers(served)
    name = "base_model.model.layers.0.q.lora_B.weight"
    quiet, nan_that_rounds_to_zero = float("nan"), np.uint32(0x7FFFFFFF).view(np.float32)
    for bad in (quiet, nan_that_rounds_to_zero, float("inf"), -float("inf")):
        weights = tensors(stored)
        weights[name][2, 1] = torch.tensor(bad)
        with pytest.raises(AdapterRefused, match=rf"not finite in {str(served)[6:]}: {name}$"):
            pack_rows(row_packer, weights)


@pytest.mark.parametrize(("served", "largest"), [(torch.float16, 65_520.0), (torch.bfloat16, 3.4e38)])
def test_what_becomes_infinite_by_rounding_is_too(served: torch.dtype, largest: float) -> None:
    _, row_packer = packers(served)
    weights = tensors(torch.float32)
    weights["base_model.model.layers.0.q.lora_A.weight"][1, 1] = largest
    with pytest.raises(AdapterRefused, match=r"q\.lora_A"):
        pack_rows(row_packer, weights)


def test_what_is_not_plain_is_left_alone() -> None:
    _, row_packer = packers(torch.float32)
    weights = tensors(torch.float32)
    assert pack_rows(row_packer, weights) is not None
    dora = {f"{name}.lora_magnitude_vector": torch.ones(n) for name, n in (("layers.0.q", 7), ("layers.0.up", 9))}
    dora = {f"base_model.model.{name}": tensor for name, tensor in (dora | {
        "layers.1.up.lora_magnitude_vector": torch.ones(9)}).items()}  # fmt: skip
    assert pack_rows(row_packer, weights | dora, CONFIG | {"use_dora": True}) is None
    incomplete = {name: tensor for name, tensor in weights.items() if "0.q.lora_A" not in name}
    assert pack_rows(row_packer, incomplete) is None
    assert row_packer.pack(CONFIG, b"no safetensors file", bytearray) is None

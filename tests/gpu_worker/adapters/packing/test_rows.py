"""Rows packed without torch are those that torch packs, for every pair of dtypes; what is not plain is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from gpu_worker.adapters.packing.packer import Packer
from gpu_worker.adapters.packing.rows import RowPacker, Rows
from gpu_worker.model.adaptable_modules import AdaptableModules
from gpu_worker.model.attention import StepContext
from gpu_worker.model.lora import SiteInfo
from protocol.wire.messages import ServedModel, SiteShape

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["q", "up"], "rank_pattern": {"up": 17},
}  # fmt: skip


def packers(dtype: torch.dtype, head: torch.dtype = torch.float32) -> tuple[Packer, RowPacker]:
    """Return both packers for a model whose last linear layer has a dtype of its own, and no rows in the tests."""
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
    """Return an adapter's tensors: numbers of all sizes, halves between two bf16 numbers among them."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for site, rank, k, n in (("0.q", 3, 5, 7), ("0.up", 17, 4, 9), ("1.up", 17, 4, 9)):
        for half, shape in (("A", (rank, k)), ("B", (n, rank))):
            values = torch.randn(shape, generator=generator) * torch.logspace(-7, 2, shape[1]) * scale
            values[0, 0], values[0, 1], values[0, 2] = 1.00390625, 1.01171875, -0.0
            found[f"base_model.model.layers.{site}.lora_{half}.weight"] = values.to(dtype)
    return found


def pack_rows(packer: RowPacker, weights: dict[str, Tensor], config: dict[str, Any] = CONFIG) -> Rows | None:
    return packer.pack(config, save(weights), bytearray)


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
    assert (got.extras, got.invocation) == (expected.extras, expected.invocation)
    assert len(got.rows) == len(expected.rows)
    for (index, a, b), (expected_index, expected_a, expected_b) in zip(got.rows, expected.rows, strict=True):
        assert index == expected_index
        for tensor, reference in ((a, expected_a), (b, expected_b)):
            assert tensor.dtype == reference.dtype
            assert torch.equal(tensor, reference)
            assert torch.equal(tensor.signbit(), reference.signbit())


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("served", DTYPES, ids=str)
def test_what_is_not_finite_is_left_for_others_to_refuse(stored: torch.dtype, served: torch.dtype) -> None:
    _, row_packer = packers(served)
    name = "base_model.model.layers.0.q.lora_B.weight"
    quiet, nan_that_rounds_to_zero = float("nan"), np.uint32(0x7FFFFFFF).view(np.float32)
    for bad in (quiet, nan_that_rounds_to_zero, float("inf"), -float("inf")):
        weights = tensors(stored)
        weights[name][2, 1] = torch.tensor(bad)
        assert pack_rows(row_packer, weights) is None


@pytest.mark.parametrize(("served", "largest"), [(torch.float16, 65_520.0), (torch.bfloat16, 3.4e38)])
def test_what_becomes_infinite_by_rounding_is_too(served: torch.dtype, largest: float) -> None:
    _, row_packer = packers(served)
    weights = tensors(torch.float32)
    weights["base_model.model.layers.0.q.lora_A.weight"][1, 1] = largest
    assert pack_rows(row_packer, weights) is None


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

"""Packing adapters with torch: adapters with unusable values are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save

from gpu_worker.adapters.packing.packer import HostAdapter, Packer
from gpu_worker.layers.adaptable_modules import AdaptableModules
from gpu_worker.layers.attention import StepContext
from gpu_worker.layers.lora import SiteInfo
from protocol.wire.errors import AdapterRefused
from protocol.wire.messages import ServedModel, SiteShape


def test_numbers_that_are_not_finite_in_the_pools_dtype_are_refused() -> None:
    sites = [SiteInfo("layers.0.q", 0, 0, 4, 6, "linear", torch.float16)]
    served = ServedModel(
        model="m", name="m", fingerprint="", model_type="", vocab_size=10, max_model_len=10,
        sites=[SiteShape("layers.0.q", 4, 6)],
    )  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}

    def pack(largest: float) -> HostAdapter:
        a, b = torch.ones(2, 4), torch.full((6, 2), largest)
        names = ("base_model.model.layers.0.q.lora_A.weight", "base_model.model.layers.0.q.lora_B.weight")
        packer = Packer(sites, served, AdaptableModules(StepContext()))
        return packer.pack("d", config, save(dict(zip(names, (a, b), strict=True))))

    assert pack(60_000.0).num_pages == (1, 0, 0, 0)
    for bad in (70_000.0, float("nan"), -float("inf")):
        with pytest.raises(AdapterRefused, match=r"not finite in .*lora_B"):
            pack(bad)

"""An adapter without effect is one whose every product is exactly zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.adapter_files import BASE, lora_config, lora_tensors, safetensors

from peft_adapters.effect import CHUNK_BYTES, has_effect
from peft_adapters.format import parse_header, read_adapter


def effect(tensors: dict[str, np.ndarray[Any, Any]], **fields: Any) -> bool:
    raw = safetensors(tensors)
    infos = parse_header(raw, len(raw))
    return has_effect(read_adapter(lora_config(**fields), infos, BASE), infos, memoryview(raw))


def zeroed(*parts: str, value: float = 0.0) -> dict[str, np.ndarray[Any, Any]]:
    return {
        name: np.full_like(tensor, value) if any(part in name for part in parts) else tensor
        for name, tensor in lora_tensors().items()
    }


def test_a_usual_adapter_has_an_effect() -> None:
    assert effect(lora_tensors())
    assert effect(zeroed("layers.0", "q_proj"))  # one layer is enough


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_half_that_is_zero_has_none(part: str, zero: float) -> None:
    assert not effect(zeroed(part, value=zero))


def test_halves_of_different_layers_that_are_zero_have_none() -> None:
    assert not effect(zeroed("layers.0.self_attn.q_proj.lora_A", "layers.0.self_attn.v_proj.lora_B", "layers.1"))


def test_a_factor_of_zero_has_none() -> None:
    assert not effect(lora_tensors(), lora_alpha=0)
    assert effect(lora_tensors(), lora_alpha=0, alpha_pattern={"v_proj": 1})


def test_the_smallest_number_counts() -> None:
    tensors = zeroed("lora_B")
    tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"][-1, -1] = 1e-45
    assert effect(tensors)


def test_numbers_are_looked_at_to_the_end() -> None:
    rank = 2 * CHUNK_BYTES // 64
    tensors = {name: np.zeros((rank, 16) if "lora_A" in name else (16, rank)) for name in lora_tensors()}
    assert not effect(tensors, r=rank)
    for name, tensor in tensors.items():
        if "layers.1.self_attn.v_proj" in name:
            tensor[-1, -1] = 1.0
    assert effect(tensors, r=rank)


def test_what_replaces_parameters_may_have_one() -> None:
    tensors = zeroed("lora_B")
    tensors |= {f"base_model.model.{site.name}.lora_magnitude_vector": np.ones(16) for site in BASE.sites}
    assert effect(tensors, use_dora=True)

"""An adapter has no effect if each of its products is exactly zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.adapter_files import BASE, lora_config, lora_tensors, parsed, read_file
from helpers.adapter_files import effect as effect_of
from msgspec import structs

from peft_adapters.effect import CHUNK_BYTES, check_idle
from peft_adapters.format import AdapterSpec, read_adapter
from protocol.wire.errors import AdapterRefused
from protocol.wire.messages import SiteShape


def effect(tensors: dict[str, np.ndarray[Any, Any]], **fields: Any) -> bool:
    return effect_of(lora_config(**fields), tensors)


def zeroed(*parts: str, value: float = 0.0) -> dict[str, np.ndarray[Any, Any]]:
    return {
        name: np.full_like(tensor, value) if any(part in name for part in parts) else tensor
        for name, tensor in lora_tensors().items()
    }


def test_a_usual_adapter_has_an_effect() -> None:
    assert effect(lora_tensors())
    assert effect(zeroed("layers.0", "q_proj"))  # one layer with an effect is enough


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


# ---------------------------------------------------------------- layers that never run

IDLE = SiteShape("model.layers.0.mamba.dt_proj", 4, 16)
WITH_IDLE = structs.replace(BASE, idle=[IDLE])


def idle(value: float, targets: Any = "all-linear", shape: tuple[int, int] = (16, 4), **fields: Any) -> AdapterSpec:
    """Check an adapter with LoRA on a layer that never runs. value: of all entries of its B."""
    tensors = lora_tensors(sites=[*BASE.sites, IDLE])
    tensors[f"base_model.model.{IDLE.name}.lora_B.weight"] = np.full(shape, value)
    raw, infos = parsed(tensors)
    spec = read_adapter(lora_config(target_modules=targets, **fields), infos, WITH_IDLE)
    check_idle(spec, infos, memoryview(raw))
    return spec


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "dt_proj"], ".*_proj"])
def test_lora_on_a_layer_that_never_runs_may_be_there_and_must_be_zero(targets: Any) -> None:
    spec = idle(0.0, targets)
    assert [part.site for part in spec.idle] == [IDLE.name]
    assert IDLE.name not in {part.site for part in spec.sites}
    with pytest.raises(AdapterRefused, match=f"must be zero here.*{IDLE.name}"):
        idle(1e-30, targets)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"targets": ["q_proj", "v_proj"]}, "does not have or cannot adapt"),  # the list omits it
        ({"shape": (16, 5)}, r"lora_B has shape \[16, 5\]"),
        ({"shape": (1 << 12, 4)}, r"lora_B has shape \[4096, 4\]"),
        ({"use_dora": True}, "tensors missing for targeted layers"),
    ],
)
def test_what_else_a_layer_that_never_runs_has_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdapterRefused, match=reason):
        idle(0.0, **changes)


def test_lora_on_nothing_that_runs_is_refused() -> None:
    name = f"base_model.model.{IDLE.name}.lora"
    tensors = {f"{name}_A.weight": np.ones((4, 4)), f"{name}_B.weight": np.zeros((16, 4))}
    with pytest.raises(AdapterRefused, match="target_modules matches no layer"):
        read_file(lora_config(target_modules=["dt_proj"]), tensors, WITH_IDLE)

"""Adapters of MLX-LM and llama.cpp, once converted, give the logits of the PEFT adapter from which they were made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers import examples
from helpers.other_formats import peft_pairs, write_gguf, write_mlx
from oracle.adapters.peft_kinds import LLAMA, Base, Kind, base_for, check_exact, load, make_adapter

from adapter_store.formats import convert, plan_conversion
from gpu_worker.model.prepare import prepare_model
from gpu_worker.served import served_model
from protocol.runtime.settings import Settings
from protocol.wire.messages import ServedModel

QWEN3: Base = ("qwen3", {"head_dim": 16})
PHI3: Base = ("phi3", {})
GEMMA3: Base = ("gemma3_text", {"head_dim": 16, "sliding_window": 12, "tie_word_embeddings": True})
LFM2: Base = ("lfm2", {"layer_types": ["conv", "full_attention"]})
WIDE: Base = ("llama", {"head_dim": 32})  # head size times number of heads is not the width
SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

MLX: dict[str, tuple[Kind, str]] = {
    "lora": (Kind(LLAMA, {"target_modules": SPLIT}), "lora"),
    "dora": (Kind(LLAMA, {"use_dora": True}), "dora"),
    "head": (Kind(LLAMA, {"target_modules": ["q_proj", "lm_head"]}), "lora"),
    "some layers": (Kind(QWEN3, {"layers_to_transform": [1], "layers_pattern": "layers"}), "lora"),
    "fused": (Kind(PHI3, {"target_modules": ["qkv_proj", "down_proj"]}), "lora"),
}
GGUF: dict[str, tuple[Kind, str, tuple[int, int]]] = {
    "llama": (Kind(LLAMA, {"target_modules": [*SPLIT, "lm_head"]}), "llama", (4, 2)),
    "llama, other heads": (Kind(WIDE, {"target_modules": SPLIT}), "llama", (4, 2)),
    "qwen3": (Kind(QWEN3, {"target_modules": SPLIT}), "qwen3", (0, 0)),
    "gemma3": (Kind(GEMMA3, {"target_modules": SPLIT}), "gemma3", (0, 0)),
    "granite": (Kind(("granite", {}), {"target_modules": SPLIT}), "granite", (4, 2)),
    "starcoder2": (Kind(("starcoder2", {}), {"target_modules": [*SPLIT[:4], "c_fc", "c_proj"]}), "starcoder2", (0, 0)),
    "lfm2": (Kind(LFM2, {"target_modules": ["q_proj", "out_proj", "w1", "w2", "w3", "in_proj"]}), "lfm2", (0, 0)),
    "phi3": (Kind(PHI3, {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}), "phi3", (0, 0)),
}


def served(base: Base) -> ServedModel:
    model = prepare_model(base_for(Kind(base)), frozenset(), None)
    return served_model(model, 512, Settings(model="oracle"))


def hold(kind: Kind, peft: Path, source: Path, target: Path, base: ServedModel | None) -> None:
    """Convert an adapter; compare its logits with those of the PEFT adapter from which it was made."""
    weights = "adapters.safetensors" if base is None else "lora.gguf"
    plan = plan_conversion(source, weights, (source / weights).stat().st_size, base)
    assert plan is not None
    target.mkdir()
    convert(source, weights, plan, target)
    check_exact(kind, target, load(kind, peft))


@pytest.mark.parametrize("name", MLX)
def test_adapters_of_mlx_are_those_of_peft(name: str, tmp_path: Path) -> None:
    kind, written = MLX[name]
    make_adapter(kind, tmp_path / "peft")
    write_mlx(tmp_path / "peft", tmp_path / "mlx", scale=2.0, kind=written)
    hold(kind, tmp_path / "peft", tmp_path / "mlx", tmp_path / "out", None)


@pytest.mark.parametrize("name", examples.some(GGUF, "llama", "qwen3", "lfm2"))
def test_adapters_of_llama_cpp_are_those_of_peft(name: str, tmp_path: Path) -> None:
    kind, architecture, heads = GGUF[name]
    make_adapter(kind, tmp_path / "peft")
    write_gguf(peft_pairs(tmp_path / "peft"), tmp_path / "cpp" / "lora.gguf", architecture, 8.0, heads)
    hold(kind, tmp_path / "peft", tmp_path / "cpp", tmp_path / "out", served(kind.base))


def test_the_base_without_weights_is_described_as_a_worker_finds_it(tmp_path: Path) -> None:
    from gpu_worker.describe import sites_of

    kinds: list[Base] = [
        LLAMA, QWEN3, PHI3, GEMMA3, ("gpt2", {"n_inner": 96}), ("mixtral", {"num_local_experts": 4}), ("gemma2", {}),
    ]  # fmt: skip

    def plain(sites: Any) -> set[Any]:
        return {msgspec.structs.astuple(site) for site in sites}

    for base in kinds:
        assert plain(sites_of(base_for(Kind(base)))) == plain(served(base).sites), base[0]

"""Adapters of MLX-LM are planned as PEFT adapters, or refused with every reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapter_files import BASE, parsed, refusal
from safetensors.numpy import load

from peft_adapters.format import parse_header, read_adapter
from peft_adapters.formats.mlx import convert_mlx
from protocol.wire.errors import AdapterRefused

Q = "model.layers.1.self_attn.q_proj"
A, B = np.arange(32.0).reshape(16, 2), np.arange(32.0).reshape(2, 16)
GOOD = {f"{Q}.lora_a": A, f"{Q}.lora_b": B}


def config(**fields: Any) -> dict[str, Any]:
    parameters = {"rank": 2, "scale": 20.0, "dropout": 0.0} | fields.pop("parameters", {})
    return {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": parameters, **fields}


def test_a_and_b_are_transposed_and_the_scale_is_kept() -> None:
    raw, infos = parsed(GOOD)
    plan = convert_mlx(config(), infos)
    out = b"".join(bytes(piece) for piece in plan.weights(memoryview(raw)))
    tensors = parse_header(out, len(out))
    assert tensors == plan.infos()
    spec = read_adapter(plan.config, tensors, BASE)
    assert [(part.site, part.rank, part.scale) for part in spec.sites] == [(Q, 2, 20.0)]
    info = tensors[spec.sites[0].a]
    assert np.array_equal(np.frombuffer(out, "<f4", 32, info.begin).reshape(info.shape), A.T)


def test_layers_of_other_ranks_keep_one_scale() -> None:
    other = Q.replace("q_proj", "v_proj")
    _, infos = parsed(GOOD | {f"{other}.lora_a": np.ones((16, 3)), f"{other}.lora_b": np.ones((3, 16))})
    plan = convert_mlx(config(), infos)
    spec = read_adapter(plan.config, plan.infos(), BASE)
    assert {part.rank: part.scale for part in spec.sites} == {2: 20.0, 3: 20.0}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_mlx_lm_computed_is_what_is_read(kind: str) -> None:
    """The layers of mlx-lm 0.32.2 wrote the folders, on a CPU; layers.npz contains inputs x and their outputs."""
    folder = Path(__file__).parent / "mlx_lm" / kind
    raw = (folder / "adapters.safetensors").read_bytes()
    plan = convert_mlx(json.loads((folder / "adapter_config.json").read_text()), parse_header(raw, len(raw)))
    out = b"".join(bytes(piece) for piece in plan.weights(memoryview(raw)))
    spec, tensors, layers = read_adapter(plan.config, plan.infos(), BASE), load(out), np.load(folder / "layers.npz")
    assert [part.site for part in spec.sites] == [site.name for site in BASE.sites]
    for part in spec.sites:
        _, _, layer, _, name = part.site.split(".")
        base = layers[f"w.{layer}.{name}"]
        weight = base + part.scale * tensors[part.b] @ tensors[part.a]
        if kind == "dora":
            weight *= (tensors[part.magnitude] / np.linalg.norm(weight, axis=1))[:, None]
        assert np.allclose(layers["x"] @ weight.T, layers[f"y.{layer}.{name}"], atol=1e-4)
        assert not np.allclose(layers["x"] @ base.T, layers[f"y.{layer}.{name}"], atol=1e-2)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "full": (config(fine_tune_type="full"), GOOD, "fine_tune_type"),
    "no parameters": ({"fine_tune_type": "lora"}, GOOD, "no lora_parameters"),
    "parameters that are a list": ({"lora_parameters": [8]}, GOOD, "no lora_parameters"),
    "no scale": ({"lora_parameters": {"rank": 2}}, GOOD, "scale None"),
    "a scale of infinity": (config(parameters={"scale": float("inf")}), GOOD, "not a finite number"),
    "a scale that is text": (config(parameters={"scale": "20"}), GOOD, "not a finite number"),
    "alpha": (config(parameters={"alpha": 16}), GOOD, "read differently"),
    "no tensors": (config(), {}, "has no lora_a"),
    "PEFT's names": (config(), {f"{Q}.lora_A.weight": A.T, f"{Q}.lora_B.weight": B.T}, "not a matrix"),
    "only a": (config(), {f"{Q}.lora_a": A}, "without the other half"),
    "only b": (config(), {f"{Q}.lora_b": B}, "without the other half"),
    "ranks that do not fit": (config(), GOOD | {f"{Q}.lora_b": np.ones((3, 16))}, "do not fit together"),
    "a vector": (config(), GOOD | {f"{Q}.lora_b": np.ones(32)}, "not a matrix"),
    "an empty matrix": (config(), GOOD | {f"{Q}.lora_b": np.ones((0, 16))}, "not a matrix"),
    "whole weights beside it": (config(), GOOD | {"model.norm.weight": np.ones(16)}, "not a matrix"),
    "an embedding": (
        config(), {"model.embed_tokens.lora_a": np.ones((64, 2)), "model.embed_tokens.lora_b": B}, "on embeddings",
    ),
    "DoRA without magnitudes": (config(fine_tune_type="dora"), GOOD, "a magnitude"),
    "magnitudes without DoRA": (config(), GOOD | {f"{Q}.m": np.ones(16)}, "fine_tune_type is lora"),
    "a magnitude of another layer": (
        config(fine_tune_type="dora"), GOOD | {"model.layers.0.self_attn.q_proj.m": np.ones(16)}, "a magnitude",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_lora_of_mlx_is_refused(name: str) -> None:
    fields, tensors, reason = REFUSED[name]
    assert reason in refusal(convert_mlx, fields, parsed(tensors)[1])


def test_what_the_base_does_not_have_is_refused() -> None:
    _, infos = parsed({name.replace("layers.1", "layers.7"): tensor for name, tensor in GOOD.items()})
    plan = convert_mlx(config(), infos)
    with pytest.raises(AdapterRefused, match="no layer of the base model"):
        read_adapter(plan.config, plan.infos(), BASE)

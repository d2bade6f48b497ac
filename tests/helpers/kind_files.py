"""Adapters of every kind besides LoRA for the small base of `adapter_files`, written without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from helpers.adapter_files import BASE, HIDDEN
from peft_adapters.kinds.kind import Layer
from peft_adapters.kinds.registry import kind_of
from protocol.wire import messages as m

KIND_BASE = structs.replace(
    BASE,
    sites=[
        *BASE.sites,
        m.SiteShape("model.norm", HIDDEN, HIDDEN, "norm"),
        m.SiteShape("model.embed_tokens", BASE.vocab_size, HIDDEN, "embedding"),
    ],
)

SMALL: dict[str, dict[str, Any]] = {
    "LOHA": {"r": 2}, "LOKR": {"r": 2}, "MISS": {"r": 4}, "DELORA": {"r": 2}, "HRA": {"r": 2}, "DEFT": {"r": 2},
    "GRALORA": {"r": 4, "hybrid_r": 1}, "VERA": {"r": 4}, "PVERA": {"r": 4},
    "VBLORA": {"r": 2, "num_vectors": 8, "vector_length": 4, "topk": 2, "save_only_topk_weights": True},
    "TINYLORA": {"r": 2, "u": 3}, "UNILORA": {"r": 2, "theta_d_length": 8, "save_indices": True},
    "BEFT": {}, "IA3": {"feedforward_modules": ["v_proj"]}, "OFT": {"oft_block_size": 4}, "BOFT": {},
    "ROAD": {"group_size": 4}, "SHIRA": {"r": 1}, "LN_TUNING": {"target_modules": ["norm"]},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 5]},
}  # fmt: skip
"""Kind -> fields of an adapter that fits the base."""


def kind_config(name: str, **fields: Any) -> dict[str, Any]:
    return {"peft_type": name, "target_modules": ["q_proj", "v_proj"], **SMALL[name], **fields}


def kind_tensors(
    config: Mapping[str, Any], base: m.ServedModel = KIND_BASE, seed: int = 0
) -> dict[str, NDArray[Any]]:  # fmt: skip
    """Return random tensors for a config that targets q_proj and v_proj, the norm or the embedding of a base."""
    kind = kind_of(config["peft_type"])
    assert kind is not None
    generator = np.random.default_rng(seed)
    prefix = "base_model.model"
    if kind.changes == "norms":
        return {f"{prefix}.model.norm.ln_tuning_layers.weight": generator.normal(size=HIDDEN).astype(np.float32)}
    if kind.changes == "tokens":
        shape = (len(config["token_indices"]), HIDDEN)
        return {f"{prefix}.model.embed_tokens.trainable_tokens_delta": generator.normal(size=shape).astype(np.float32)}
    options = {key: config.get(key, field.default) for key, field in kind.fields.items()}
    sites = [site for site in base.sites if site.name.endswith(("q_proj", "v_proj"))]
    widest = max(site.in_features for site in sites), max(site.out_features for site in sites)
    found: dict[str, NDArray[Any]] = {}
    for number, site in enumerate(sites):
        place = (number, len(sites))
        form = kind.form(Layer(site.name, options, site.in_features, site.out_features, widest, place=place))
        for tensor, shape in form.shapes.items():
            is_shared = tensor in kind.shared or (kind.numbered and tensor.startswith(f"{kind.numbered}."))
            name = f"base_model.{tensor}" if is_shared else f"{prefix}.{site.name}.{tensor}"
            if tensor in form.integers:
                found[name] = generator.integers(0, 2, size=shape, dtype=np.uint8)
            else:
                found[name] = generator.normal(size=shape).astype(np.float32)
    return found

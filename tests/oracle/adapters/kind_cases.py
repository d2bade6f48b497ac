"""Adapters of every kind besides LoRA that PEFT saves and we serve, in every form that their configs have."""

from __future__ import annotations

from typing import Any

from oracle.adapters.peft_kinds import BIASED, GPT2, LLAMA, Base, Kind
from peft import (
    DeftConfig,
    DeloraConfig,
    GraloraConfig,
    HRAConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    PveraConfig,
    VBLoRAConfig,
    VeraConfig,
)

ALL: dict[str, Any] = {"target_modules": "all-linear"}
QWEN3: Base = ("qwen3", {"head_dim": 16})
CONV1D: dict[str, Any] = {"target_modules": ["c_attn", "c_proj"]}
BANK: dict[str, Any] = {"num_vectors": 24, "vector_length": 16, "topk": 3, "r": 3}

CASES: dict[str, Kind] = {
    "loha": Kind(LLAMA, {"r": 3, "alpha": 5, **ALL}, config=LoHaConfig),
    "loha, patterns": Kind(
        LLAMA, {"r": 2, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"down_proj": 3}}, config=LoHaConfig
    ),
    "lokr": Kind(LLAMA, {"r": 2, "alpha": 4, **ALL}, config=LoKrConfig),
    "lokr, whole": Kind(LLAMA, {"r": 16}, config=LoKrConfig),
    "lokr, both decomposed": Kind(LLAMA, {"r": 2, "decompose_both": True}, config=LoKrConfig),
    "lokr, factor": Kind(LLAMA, {"r": 2, "decompose_factor": 4, "decompose_both": True}, config=LoKrConfig),
    "vera": Kind(LLAMA, {"r": 16, **ALL}, config=VeraConfig),
    "vera, conv1d": Kind(GPT2, {"r": 16, "fan_in_fan_out": True, **CONV1D}, config=VeraConfig),
    "pvera": Kind(LLAMA, {"r": 16}, config=PveraConfig),
    "vblora": Kind(LLAMA, {**BANK, **ALL}, config=VBLoRAConfig),
    "vblora, best weights": Kind(LLAMA, {**BANK, "save_only_topk_weights": True}, config=VBLoRAConfig),
    "miss": Kind(LLAMA, {"r": 5, **ALL}, config=MissConfig),
    "miss, mini": Kind(LLAMA, {"r": 4, "init_weights": "mini", "mini_r": 8}, config=MissConfig),
    "delora": Kind(LLAMA, {"r": 4, "rank_pattern": {"q_proj": 3}, **ALL}, config=DeloraConfig),
    "gralora": Kind(LLAMA, {"r": 8, "gralora_k": 4, **ALL}, config=GraloraConfig),
    "gralora, hybrid": Kind(LLAMA, {"r": 4, "gralora_k": 2, "hybrid_r": 3}, config=GraloraConfig),
    "hra": Kind(LLAMA, {"r": 4, **ALL}, config=HRAConfig),
    "hra, orthogonal": Kind(LLAMA, {"r": 4, "apply_GS": True}, config=HRAConfig),
    "deft": Kind(LLAMA, {"r": 4, "alpha": 6, **ALL}, config=DeftConfig),
    "deft, qr": Kind(LLAMA, {"r": 4, "decomposition_method": "qr"}, config=DeftConfig),
    "deft, para": Kind(LLAMA, {"r": 2, "para": True, "decomposition_method": "qr"}, config=DeftConfig),
    "a head": Kind(LLAMA, {"r": 2, "target_modules": ["q_proj", "lm_head"]}, config=LoHaConfig),
    "some layers": Kind(LLAMA, {"layers_to_transform": [1]}, config=LoHaConfig),
    "bias all": Kind(BIASED, {"r": 4, "bias": "all"}, config=MissConfig),
    "bias of its own": Kind(BIASED, {"r": 4, "bias": "vera_only"}, config=VeraConfig),
    "modules_to_save": Kind(LLAMA, {"r": 2, "modules_to_save": ["lm_head", "norm"]}, config=LoKrConfig),
}  # fmt: skip

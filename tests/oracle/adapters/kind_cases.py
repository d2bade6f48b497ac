"""Adapters of every served PEFT kind besides LoRA, in every form that their configs allow."""

from __future__ import annotations

from typing import Any

from oracle.adapters.peft_kinds import BIASED, GPT2, LLAMA, MIXTRAL, TIED, Base, Kind
from peft import (
    BeftConfig,
    BOFTConfig,
    DeftConfig,
    DeloraConfig,
    GraloraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    OFTConfig,
    PveraConfig,
    RoadConfig,
    ShiraConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)

ALL: dict[str, Any] = {"target_modules": "all-linear"}
BASES: dict[str, Base] = {
    "qwen3": ("qwen3", {"head_dim": 16}), "mixtral": MIXTRAL, "falcon_h1": ("falcon_h1", {"tiny": True})
}  # fmt: skip
HEAD: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"]}
LISTED: dict[str, Any] = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
}  # fmt: skip
CONV1D: dict[str, Any] = {"target_modules": ["c_attn", "c_proj"]}
BANK: dict[str, Any] = {"num_vectors": 24, "vector_length": 8, "topk": 3, "r": 3}

TOKENS: dict[str, Any] = {"token_indices": [3, 150, 17]}

CASES: dict[str, Kind] = {
    "loha": Kind(LLAMA, {"r": 3, "alpha": 5, **ALL}, config=LoHaConfig),
    "lokr": Kind(LLAMA, {"r": 2, "alpha": 4, **ALL}, config=LoKrConfig),
    "vera": Kind(LLAMA, {"r": 16, **ALL}, config=VeraConfig),
    "pvera": Kind(LLAMA, {"r": 16}, config=PveraConfig),
    "vblora": Kind(LLAMA, {**BANK, **ALL}, config=VBLoRAConfig),
    "miss": Kind(LLAMA, {"r": 5, **ALL}, config=MissConfig),
    "delora": Kind(LLAMA, {"r": 4, "rank_pattern": {"q_proj": 3}, **ALL}, config=DeloraConfig),
    "gralora": Kind(LLAMA, {"r": 8, "gralora_k": 4, **ALL}, config=GraloraConfig),
    "hra": Kind(LLAMA, {"r": 4, **ALL}, config=HRAConfig),
    "deft": Kind(LLAMA, {"r": 4, "alpha": 6, **ALL}, config=DeftConfig),
    "tinylora": Kind(LLAMA, {"r": 2, "u": 8, **ALL}, config=TinyLoraConfig),
    "unilora": Kind(LLAMA, {**ALL, "r": 3, "theta_d_length": 500, "save_indices": True}, config=UniLoraConfig),
    "ia3": Kind(LLAMA, {**LISTED, "feedforward_modules": ["down_proj"]}, config=IA3Config),
    "beft": Kind(BIASED, {}, config=BeftConfig),
    "road": Kind(LLAMA, {**ALL, "group_size": 8}, config=RoadConfig),
    "oft": Kind(LLAMA, {**ALL, "oft_block_size": 16}, config=OFTConfig),
    "boft": Kind(LLAMA, {**ALL, "boft_block_size": 8}, config=BOFTConfig),
    "shira": Kind(LLAMA, {**ALL, "r": 3}, config=ShiraConfig),
    "ln_tuning": Kind(LLAMA, {"target_modules": ["norm", "input_layernorm"]}, config=LNTuningConfig),
    "trainable_tokens": Kind(LLAMA, {**TOKENS, "target_modules": None}, config=TrainableTokensConfig),
}  # fmt: skip
"""One case per kind."""

FORMS: dict[str, Kind] = {
    "loha, patterns": Kind(
        LLAMA, {"r": 2, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"down_proj": 3}}, config=LoHaConfig
    ),
    "lokr, whole": Kind(LLAMA, {"r": 16}, config=LoKrConfig),
    "lokr, both decomposed": Kind(LLAMA, {"r": 2, "decompose_both": True}, config=LoKrConfig),
    "lokr, factor": Kind(LLAMA, {"r": 2, "decompose_factor": 4, "decompose_both": True}, config=LoKrConfig),
    "vera, conv1d": Kind(GPT2, {"r": 16, "fan_in_fan_out": True, **CONV1D}, config=VeraConfig),
    "vblora, best weights": Kind(LLAMA, {**BANK, "save_only_topk_weights": True}, config=VBLoRAConfig),
    "tinylora, one vector": Kind(LLAMA, {"r": 3, "u": 5, "weight_tying": 1.0, **ALL}, config=TinyLoraConfig),
    "tinylora, some vectors": Kind(
        LLAMA, {"r": 2, "u": 5, "weight_tying": 0.7, **LISTED, "layers_to_transform": [1]}, config=TinyLoraConfig
    ),
    "tinylora, conv1d": Kind(GPT2, {"r": 2, "u": 5, "fan_in_fan_out": True, **CONV1D}, config=TinyLoraConfig),
    "miss, mini": Kind(LLAMA, {"r": 4, "init_weights": "mini", "mini_r": 8}, config=MissConfig),
    "gralora, hybrid": Kind(LLAMA, {"r": 4, "gralora_k": 2, "hybrid_r": 3}, config=GraloraConfig),
    "hra, orthogonal": Kind(LLAMA, {"r": 4, "apply_GS": True}, config=HRAConfig),
    "deft, qr": Kind(LLAMA, {"r": 4, "decomposition_method": "qr"}, config=DeftConfig),
    "deft, para": Kind(LLAMA, {"r": 2, "para": True, "decomposition_method": "qr"}, config=DeftConfig),
    "ia3, siblings": Kind(LLAMA, {**LISTED, "feedforward_modules": ["gate_proj", "q_proj"]}, config=IA3Config),
    "ia3, biases": Kind(BIASED, {"feedforward_modules": r".*\.down_proj"}, config=IA3Config),
    "ia3, conv1d": Kind(
        GPT2, {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}, config=IA3Config
    ),
    "beft without biases": Kind(LLAMA, ALL, config=BeftConfig),
    "road_2": Kind(BIASED, {"group_size": 8, "variant": "road_2"}, config=RoadConfig),
    "road_4": Kind(LLAMA, {"group_size": 32, "variant": "road_4"}, config=RoadConfig),
    "oft, exact": Kind(BIASED, {"r": 5, "oft_block_size": 0, "use_cayley_neumann": False}, config=OFTConfig),
    "oft, constrained": Kind(LLAMA, {"oft_block_size": 7, "coft": True, "eps": 0.5}, config=OFTConfig),
    "oft, shared": Kind(
        LLAMA, {"oft_block_size": 8, "block_share": True, "num_cayley_neumann_terms": 2}, config=OFTConfig
    ),
    "boft, by their number": Kind(LLAMA, {"boft_block_size": 0, "boft_block_num": 2}, config=BOFTConfig),
    "ln_tuning with biases": Kind(GPT2, {"target_modules": ["ln_1", "ln_f"]}, config=LNTuningConfig),
    "trainable_tokens, tied": Kind(TIED, {**TOKENS, "target_modules": None}, config=TrainableTokensConfig),
    "trainable_tokens of a head": Kind(LLAMA, {**TOKENS, "target_modules": ["lm_head"]}, config=TrainableTokensConfig),
    "operations and a head": Kind(
        LLAMA, {"feedforward_modules": ["down_proj"], "modules_to_save": ["lm_head"]}, config=IA3Config
    ),
    "a head": Kind(LLAMA, {"r": 2, **HEAD}, config=LoHaConfig),
    "oft of a head": Kind(LLAMA, {"oft_block_size": 16, **HEAD}, config=OFTConfig),
    "hra of a tied head": Kind(TIED, {"r": 4, **HEAD}, config=HRAConfig),
    "deft of a head": Kind(LLAMA, {"r": 4, **HEAD}, config=DeftConfig),
    "some layers": Kind(LLAMA, {"layers_to_transform": [1]}, config=LoHaConfig),
    "bias all": Kind(BIASED, {"r": 4, "bias": "all"}, config=MissConfig),
    "bias of its own": Kind(BIASED, {"r": 4, "bias": "vera_only"}, config=VeraConfig),
    "modules_to_save": Kind(LLAMA, {"r": 2, "modules_to_save": ["lm_head", "norm"]}, config=LoKrConfig),
}  # fmt: skip
"""The kinds' other forms, and what an adapter of them may contain besides."""

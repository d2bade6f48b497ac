"""A tiny random model of any causal-LM type of transformers; its config is derived from the config class."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from oracle.peft_oracle import TINY_VOCAB, vary_norms
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MAX_LAYERS = 6

_SIZES: dict[tuple[str, ...], Any] = {
    ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"): TINY_VOCAB,
    ("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"): 64,
    ("intermediate_size", "n_inner", "ffn_dim", "dff", "ffn_hidden_size", "dense_intermediate_size"): 96,
    ("intermediate_size_mlp", "prefix_dense_intermediate_size"): 96,
    ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"): 2,
    ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads"): 4,
    ("num_key_value_heads", "kv_n_heads"): 2,
    ("head_dim", "v_head_dim", "qk_nope_head_dim"): 16,
    ("qk_rope_head_dim", "rotary_dim"): 8,
    ("q_lora_rank", "kv_lora_rank"): 24,
    ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"): 512,
    ("sliding_window", "attention_window_size"): 12,
    ("attention_chunk_size",): 64,
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"): 4,
    ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"): 2,
    ("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"): 32,
    ("shared_intermediate_size", "shared_experts_intermediate_size"): 32,
    ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "zero_expert_num"): 1,
    ("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"): 1,
    ("hidden_size_per_layer_input", "router_hidden_size", "gated_norm_rank", "laurel_rank"): 8,
    ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads"): 8,
    ("mamba_d_state", "state_size", "ssm_state_size", "mamba_head_dim", "mamba_chunk_size", "chunk_size"): 16,
    ("mamba_d_ssm",): 128,
    ("n_groups", "linear_num_key_heads"): 2,
    ("linear_num_value_heads",): 4,
    ("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"): 16,
    ("initializer_range", "init_std"): 0.2,
    ("pad_token_id",): 0,
    ("bos_token_id", "cls_token_id"): 1,
    ("eos_token_id", "sep_token_id"): 2,
    ("is_decoder",): True,  # BERT and similar types
}
"""Names that config classes use for the same field -> its value in a tiny model."""

TINY = {name: value for names, value in _SIZES.items() for name in names}

_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_MIXED4 = {"layer_types": 2 * _MIXED["layer_types"], "num_hidden_layers": 4}
_HYBRID3 = {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3}
_INDEXED = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
    "indexer_compress_ratio": 4, "ple_layer_ids": [], "hc_lowrank": 8,
}  # fmt: skip
_WINDOWS = {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}
_SHARED_KV = {"num_kv_shared_layers": 2, **_MIXED4}

OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        **_MIXED,
        "rope_parameters": {name: {"rope_type": "default", "rope_theta": 1e4} for name in _MIXED["layer_types"]},
    },
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1, **_MIXED4},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "longcat_flash": {"head_dim": 8},
    "gemma3n_text": _SHARED_KV,
    "gemma4_text": _SHARED_KV,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 12},
    "granite": {"residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"initializer_range": 0.1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0},
    "jetmoe": {"kv_channels": 16},
    "laguna": _MIXED,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "mellum": _MIXED,
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "mllama": {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    "moshi": {"sliding_window": 64},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "moe"]},
    "qwen2": _WINDOWS,
    "qwen2_moe": _WINDOWS,
    "qwen3": _WINDOWS,
    "reformer": {"axial_pos_embds": False},
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "rembert": {"initializer_range": 0.1},
    "smollm3": {"no_rope_layer_interval": 2},
    "xlstm": {"hidden_size": 128},  # a size that transformers' cache does not round
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "initializer_range": 0.05,
        "n_mamba_heads": 2,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
    },
    "zamba2": {"initializer_range": 0.05, **_HYBRID3},
    "zaya": {"num_experts_per_tok": 1},
}
"""Fields that cannot be derived, by model type."""


def causal_types() -> list[str]:
    """Return every model type of transformers that has a causal LM."""
    return sorted(set(CONFIG_MAPPING.keys()) & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys())  # without importing the models


def tiny_config(model_type: str, **fields: Any) -> PreTrainedConfig:
    """Return the config of a tiny model of `model_type` that has every kind of layer of the type's default."""
    return _shrink(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}) | fields)


def _shrink(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    try:
        default = config_class()
    except StrictDataclassClassValidationError:
        default = config_class(**overrides)
    names = {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in TINY.items() if name in names} | _layer_kinds(default, names)
    if "kv_lora_rank" in names:  # latent attention: each head has its own keys
        values["num_key_value_heads"] = values["num_attention_heads"]
    parts = cast(dict[str, type[PreTrainedConfig]], config_class.sub_configs)  # a property of the class
    for name in parts:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            values[name] = _shrink(type(part), overrides.get(name, {})).to_dict()
    own = {name: value for name, value in overrides.items() if name not in parts}
    return config_class(**values | own)


def _layer_kinds(default: PreTrainedConfig, names: set[str]) -> dict[str, Any]:
    """Return one layer of each kind of the default config, or two if it has only one kind."""
    lists = [name for name in ("layer_types", "mlp_layer_types") if name in names and getattr(default, name, None)]
    if not lists:
        return {}
    kinds = list(dict.fromkeys(zip(*(getattr(default, name) for name in lists), strict=True)))[:MAX_LAYERS]
    kinds *= 2 if len(kinds) == 1 else 1
    per_list = zip(*kinds, strict=True)
    return {"num_hidden_layers": len(kinds)} | {name: list(part) for name, part in zip(lists, per_list, strict=True)}


def tiny_model(model_type: str, **fields: Any) -> PreTrainedModel:
    """Return a random fp32 model of `model_type`, the same on each call. fields: override its config's."""
    return decoder_of(tiny_config(model_type, **fields))


def decoder_of(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a random fp32 model, the same on each call, in which no parameter has its usual initial value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        vary_norms(model)
    return model

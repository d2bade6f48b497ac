"""Other model families, tiny and random: packed steps through our attention give the tokens that `generate` gives."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from oracle.peft_oracle import TINY_VOCAB, Lora, Oracle, ask, greedy_request, prompts, vary_norms
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gpu_worker.attention import PagedLayer
from gpu_worker.model import prepare_model
from gpu_worker.shortcuts import find_norm
from protocol.errors import BadRequest

TINY = {
    "vocab_size": TINY_VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
WINDOW = {"sliding_window": 12}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4}

MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "llama": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, ("q_proj", "down_proj")),
    "mistral": (WINDOW, ("k_proj", "up_proj")),
    "qwen2": ({}, ("q_proj", "v_proj")),  # biases
    "qwen3": ({"head_dim": 32}, ("o_proj", "gate_proj")),  # norms of queries and keys, heads wider than the model
    "phi3": ({}, ("qkv_proj", "gate_up_proj")),  # fused projections
    "gemma2": ({"head_dim": 16, **WINDOW}, ("q_proj", "down_proj")),  # softcaps, four norms, every other layer a window
    "gemma3_text": ({"head_dim": 16, **WINDOW}, ("q_proj", "down_proj")),
    "gpt_oss": ({"head_dim": 16, **WINDOW, **EXPERTS}, ("q_proj", "v_proj")),  # attention sinks
    "mixtral": (EXPERTS, ("q_proj", "o_proj")),
    "qwen3_moe": (EXPERTS, ("q_proj", "k_proj")),
    "gpt2": ({"n_inner": 96}, ("c_attn", "c_fc")),  # Conv1D, learned positions
    "gpt_neox": ({}, ("query_key_value", "dense_h_to_4h")),  # partial rotary, parallel residual
    "opt": ({"ffn_dim": 96, "word_embed_proj_dim": 64}, ("q_proj", "fc1")),
    "olmo2": ({}, ("v_proj", "up_proj")),  # norms after the blocks
    "cohere2": (WINDOW, ("q_proj", "gate_proj")),  # interleaved rotary, layers without positions
    "glm4": ({"head_dim": 16}, ("q_proj", "gate_up_proj")),
    "granite": ({"residual_multiplier": 0.5, "attention_multiplier": 0.3}, ("q_proj", "v_proj")),
    "starcoder2": ({"norm_epsilon": 1e-5}, ("c_fc", "c_proj")),
}
WHOLE_LAYERS = {"llama", "mistral", "qwen2", "qwen3", "phi3"}
"""Types whose every layer must run by shortcut: a silent loss of speed is a fault too."""


def make_model(model_type: str, fields: dict[str, Any]) -> PreTrainedModel:
    config_class = type(AutoConfig.for_model(model_type))
    config = config_class(**TINY | fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        vary_norms(model)
    return model


@pytest.mark.parametrize("model_type", MODELS)
def test_tokens_equal_generate(model_type: str, caplog: pytest.LogCaptureFixture) -> None:
    fields, targets = MODELS[model_type]
    options = {"fan_in_fan_out": True} if model_type == "gpt2" else {}
    oracle = Oracle(make_model(model_type, fields), {"tuned": Lora(5, targets, options)}, scale=0.4)
    with caplog.at_level(logging.INFO, "gpu_worker.model"):
        engine = oracle.engine(max_step_tokens=16, max_num_seqs=8)
    asked_prompts = prompts(3, TINY_VOCAB, (5, 33, 20))
    requests = [
        greedy_request(f"{name}/{i}", name, prompt, 8)
        for i, prompt in enumerate(asked_prompts)
        for name in oracle.names
    ]
    asked = ask(engine, requests)
    for name in oracle.names:
        got = [asked.ids[f"{name}/{i}"] for i in range(3)]
        assert got == [oracle.greedy(name, prompt, 8) for prompt in asked_prompts]
        assert not name or got != [asked.ids[f"/{i}"] for i in range(3)]
    if model_type in WHOLE_LAYERS:
        assert f"2 of 2 layers of {model_type} run by shortcuts" in caplog.text


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bert", "both directions"),
        ("bloom", "AttentionInterface"),
        ("qwen3_next", "linear_attention"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(model_type: str, reason: str) -> None:
    fields = {"is_decoder": False} if model_type == "bert" else {}
    with pytest.raises(BadRequest, match=reason) as refusal:
        prepare_model(make_model(model_type, fields), frozenset(), None)
    assert model_type in str(refusal.value)


def test_a_norm_is_only_taken_for_what_it_computes() -> None:
    llama = make_model("llama", {}).get_submodule("model.norm")
    gemma = make_model("gemma2", {}).get_submodule("model.norm")
    plain, plus_one = find_norm(llama, "reference"), find_norm(gemma, "reference")
    assert plain is not None
    assert plus_one is not None
    assert (plain.plus_one, plus_one.plus_one) == (False, True)
    assert find_norm(torch.nn.LayerNorm(64, elementwise_affine=True, bias=False), "reference") is None
    assert find_norm(torch.nn.Embedding(3, 4), "reference") is None


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 512),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 512),
        (
            {
                "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128,
                "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
            },
            128,
        ),
    ],
    ids=["default", "dynamic", "longrope"],
)  # fmt: skip
def test_length_is_bounded_where_frequencies_would_depend_on_the_batch(rope: dict[str, Any], longest: int) -> None:
    model = prepare_model(make_model("llama", {"rope_parameters": rope}), frozenset(), None)
    assert model.max_positions == longest


def test_a_model_that_computes_something_else_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here every query sees three keys at most."""
    whole = PagedLayer.attend

    def narrowed(self: PagedLayer, *args: Any) -> torch.Tensor:
        self.call.window = 3
        return whole(self, *args)

    monkeypatch.setattr(PagedLayer, "attend", narrowed)
    oracle = Oracle(make_model("llama", {}), {}, scale=1.0)
    with pytest.raises(BadRequest, match="llama cannot be served"):
        oracle.engine()

"""Every model type is as docs/models.md says: served with PEFT's tokens and logits, or refused with its reason."""

from __future__ import annotations

import pytest
from oracle.conformance import MAX_DIFFERENCE, conform, try_type
from oracle.models_table import read_table
from oracle.pooled_oracle import conform_pooled
from oracle.tiny_models import causal_types, tiny_model

SERVED, REFUSED = read_table("served"), read_table("refused")

ALWAYS = {
    "llama", "qwen3", "phi3", "gpt2", "gemma3_text", "gpt_oss",
    "qwen2_moe",  # windows visible only in the mask
    "deepseek_v3",  # latent attention: values narrower than keys
    "gemma4_text",  # layers that share keys and values
    "diffllama",  # attention called twice per layer
    "mamba2", "granitemoehybrid",  # layers with states; more of them in test_states.py
}  # fmt: skip
"""The types of a short run; `make test-models` runs the others."""

WHOLE_LAYERS = {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "ministral", "cwm", "seed_oss"}
"""Types whose every layer must run by shortcut: losing that silently would be a performance regression."""

REQUIRED = {
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi", "phi3",
    "gpt2", "gpt_neox", "opt", "starcoder2", "cohere", "granite", "olmo2", "smollm3", "deepseek_v3", "gpt_oss",
    "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "nemotron_h", "falcon_h1", "granitemoehybrid", "lfm2", "mamba2",
    "jamba", "kimi_linear", "bamba", "zamba2", "olmo_hybrid",
    "minimax",
}  # fmt: skip


def marked(model_types: list[str]) -> list[object]:
    return [
        pytest.param(model_type, marks=[] if model_type in ALWAYS else pytest.mark.models) for model_type in model_types
    ]


@pytest.mark.parametrize("model_type", marked([*SERVED]))
def test_tokens_and_logits_are_those_of_peft(model_type: str) -> None:
    outcome = try_type(model_type)
    assert not outcome.refused
    assert outcome.difference <= MAX_DIFFERENCE
    assert outcome.effect >= 100 * MAX_DIFFERENCE
    assert outcome.notes == SERVED[model_type][-1]
    if model_type in WHOLE_LAYERS:
        assert outcome.num_shortcuts == outcome.num_calls


@pytest.mark.parametrize("model_type", marked([*REFUSED]))
def test_refused_for_the_reason_given(model_type: str) -> None:
    assert try_type(model_type).refused == REFUSED[model_type][-1]


def test_the_table_has_what_was_promised() -> None:
    assert SERVED.keys() >= REQUIRED | ALWAYS
    assert len(SERVED) >= 165


@pytest.mark.models
def test_the_tables_name_every_type_that_could_be_served() -> None:
    assert sorted([*SERVED, *REFUSED]) == causal_types()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 128,
            "short_factor": [1.5] * 8, "long_factor": [2.0] * 8,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rope_scalings(rope: dict[str, object]) -> None:
    outcome = conform(tiny_model("llama", rope_parameters={"rope_theta": 1e4, **rope}))
    assert outcome.difference <= MAX_DIFFERENCE
    assert not outcome.refused


@pytest.mark.parametrize("model_type", [pytest.param(name, marks=pytest.mark.models) for name in SERVED])
def test_embeddings_and_scores_are_those_of_transformers(model_type: str) -> None:
    """The oracles are `AutoModel` and the type's sequence classifier, where transformers has them."""
    conform_pooled(tiny_model(model_type))

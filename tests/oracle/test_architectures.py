"""What is found out about a model before it serves: its structure, its maximum length, and reasons to refuse it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle.conformance import MAX_DIFFERENCE, conform
from oracle.peft_oracle import Oracle, oracle_settings
from oracle.tiny_models import tiny_model
from torch import Tensor, nn
from transformers.masking_utils import and_masks, causal_mask_function, chunked_causal_mask_function
from transformers.masking_utils import sliding_window_causal_mask_function as window_mask
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated

from gpu_worker.build import build_engine
from gpu_worker.layers.blocks import RotaryAttention
from gpu_worker.layers.masks import AS_CALLED, MaskShape, read_shape
from gpu_worker.model.prepare import prepare_model
from gpu_worker.model.shortcuts import find_norm
from protocol.wire.errors import BadRequest
from protocol.wire.messages import OPAQUE


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("bert", {"is_decoder": False}, "both directions"),
        ("xlnet", {}, "AttentionInterface.*no cache of its own to continue from"),
        ("reformer", {}, "no cache of its own"),  # it hashes long texts at random
    ],
)
def test_what_cannot_be_served_is_refused_by_name(model_type: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRequest, match=reason) as refusal:
        prepare_model(tiny_model(model_type, **fields), frozenset(), None)
    assert model_type in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_norm_is_only_taken_for_what_it_computes() -> None:
    llama = tiny_model("llama").get_submodule("model.norm")
    gemma = tiny_model("gemma2").get_submodule("model.norm")
    plain, plus_one = find_norm(llama, "reference"), find_norm(gemma, "reference")
    assert plain is not None
    assert plus_one is not None
    assert (plain.plus_one, plus_one.plus_one) == (False, True)
    assert find_norm(torch.nn.LayerNorm(64, elementwise_affine=True, bias=False), "reference") is None
    assert find_norm(torch.nn.Embedding(3, 4), "reference") is None


@pytest.mark.parametrize(
    ("model_type", "is_known"),
    [("qwen3_5_text", True), ("olmo_hybrid", True), ("mamba2", False), ("kimi_linear", False)],
)
def test_a_gated_norm_is_taken_if_silu_of_the_gate_comes_last(model_type: str, is_known: bool) -> None:
    """Mamba2 applies the gate before the norm, and Kimi uses its sigmoid."""
    modules = tiny_model(model_type).modules()
    module = next(module for module in modules if type(module).__name__.endswith("RMSNormGated"))
    norm = find_norm(module, "reference")
    assert (norm is not None) is is_known
    if norm is not None:
        x, gate = torch.randn(2, 5, len(norm.weight))
        torch.testing.assert_close(norm.forward(x, gate), module(x, gate))


def test_a_gated_norm_takes_fp32_beside_a_gate_in_bf16() -> None:
    """Falcon H1's norm gets such input if it comes before the gate: weight and gate have the model's dtype."""
    module = FalconH1RMSNormGated(64, norm_before_gate=True).to(torch.bfloat16)
    norm = find_norm(module, None)
    assert norm is not None
    x, gate = torch.randn(2, 1, 5, 64)
    torch.testing.assert_close(norm.forward(x, gate.bfloat16()), module(x, gate.bfloat16()))


@pytest.mark.parametrize(("clip", "is_short"), [(None, True), (20.0, False)])
def test_attention_that_clips_large_numbers_keeps_its_own_forward(clip: float | None, is_short: bool) -> None:
    """Clipping cannot be seen in a trial run, whose queries, keys and values are all smaller."""
    model = prepare_model(tiny_model("olmo", clip_qkv=clip), frozenset(), None)
    attention = model.layers[0].call.module
    assert isinstance(getattr(attention.forward, "__self__", None), RotaryAttention) is is_short


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
    model = prepare_model(tiny_model("llama", rope_parameters=rope), frozenset(), None)
    assert model.max_positions == longest


def test_length_is_bounded_by_the_attention_chunk() -> None:
    assert prepare_model(tiny_model("llama4_text"), frozenset(), None).max_positions == 64


@pytest.mark.parametrize(
    ("mask", "shape"),
    [
        (causal_mask_function, MaskShape()),
        (window_mask(1000), MaskShape(window=1000)),
        (chunked_causal_mask_function(300, torch.zeros(1, dtype=torch.long)), MaskShape(chunk=300)),
        (lambda batch, head, query, key: (query >= 0) & (key >= 0), None),
        (and_masks(causal_mask_function, lambda batch, head, query, key: torch.ones(11).bool()[query]), AS_CALLED),
    ],
    ids=["causal", "window", "chunk", "both ways", "of these tokens"],
)
def test_a_mask_is_asked_where_it_hides_keys(mask: Any, shape: MaskShape | None) -> None:
    assert read_shape(mask, 11, "cpu") == shape


def test_shared_keys_and_values_take_memory_once() -> None:
    layers = prepare_model(tiny_model("gemma4_text"), frozenset(), None).layers
    assert [layer.owner for layer in layers] == [None, None, layers[0], layers[1]]
    assert [layer.block_bytes(torch.float32) > 0 for layer in layers] == [True, True, False, False]


class Routed(nn.Module):
    """Routes five tokens to its first expert, and only part of further tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.experts[0](x[:, :5]), self.experts[1](x[:, 5:])], 1)


def test_an_expert_of_an_unbatched_text_takes_lora_on_the_rows_it_sees() -> None:
    """The rows of an unbatched pass belong to one text, and so to one adapter."""
    llama = tiny_model("llama")
    llama.get_submodule("model.layers.0").mlp = Routed(64)
    model = prepare_model(llama, frozenset(), None)
    assert model.passes is not None, "its texts run unbatched"
    assert {f"model.layers.0.mlp.experts.{number}" for number in range(2)} < {site.name for site in model.sites}


class ByToken(nn.Linear):
    """Scales each token, which it finds by the first two dimensions, as compressed-tensors does."""

    def forward(self, input: Tensor) -> Tensor:
        size = input.abs()
        largest = size.amax(tuple(range(2, input.ndim)), keepdim=True) if input.ndim > 2 else size
        return super().forward(input / (1 + largest))


def test_a_linear_layer_of_another_kind_is_called_as_the_model_calls_it() -> None:
    """The layer can be adapted, but no other code may use its weight."""
    llama = tiny_model("llama")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        llama.get_submodule(name).__class__ = ByToken
    kinds = {site.name: site.kind for site in prepare_model(copy.deepcopy(llama), frozenset(), None).sites}
    assert kinds["model.layers.0.self_attn.q_proj"] == kinds["model.layers.1.mlp.down_proj"] == OPAQUE
    assert kinds["model.layers.1.self_attn.q_proj"] == "linear"
    outcome = conform(llama)
    assert not outcome.refused
    assert outcome.difference <= MAX_DIFFERENCE


def test_a_model_that_computes_something_else_is_not_served() -> None:
    """In this model every query sees at most three keys."""
    oracle = Oracle(tiny_model("llama", rope_parameters=None), {}, scale=1.0)
    model = prepare_model(copy.deepcopy(oracle.untouched), frozenset(), "reference")
    build_engine(model, oracle_settings(), oracle.fetch)
    for layer in model.layers:
        layer.call.window = 3
    with pytest.raises(BadRequest, match="llama cannot be served"):
        build_engine(model, oracle_settings(), oracle.fetch)

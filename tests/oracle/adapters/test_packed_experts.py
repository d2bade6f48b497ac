"""Experts whose weights are packed for native products: bf16 on a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.fixed_sums import fixed_sums
from oracle.adapters.peft_kinds import (
    EXPERT_PARAMETERS,
    EXPERTS,
    Base,
    Kind,
    asked_prompts,
    engine_logits,
    load,
    make_adapter,
    make_base,
    model_logits,
    peft_logits,
    read_files,
)
from oracle.peft_oracle import greedy_request, oracle_settings, packed_engine
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

from gpu_worker.adapters.packing.rows import MAX_EXPERT_RANK
from gpu_worker.engine.engine import Engine
from gpu_worker.layers.apply_extras import AdaptableModule, ExpertsCall, TokenLayout, alike
from gpu_worker.layers.expert_modules import GroupedExperts, find_grouped_experts
from gpu_worker.model.prepare import prepare_model
from lora_kernels import cpu

BF16 = torch.bfloat16
ALL = {**EXPERTS, "num_experts_per_tok": 4}  # so that rounding cannot send a token to other experts
BASES: dict[str, Base] = {
    "mixtral": ("mixtral", ALL),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16, "decoder_sparse_step": 1, **ALL}),
    "gpt_oss": ("gpt_oss", {"head_dim": 16, "sliding_window": 12, **ALL}),
}

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="no native kernels run here")


def half_base(base: Base) -> PreTrainedModel:
    model = make_base(base)
    nn.Module.to(model, BF16)
    return model


def start_engine(base: Base, folder: Path) -> Engine:
    model = prepare_model(half_base(base), frozenset(), None)
    return packed_engine(model, oracle_settings(), lambda _: read_files(folder))


def rounded(model: nn.Module) -> nn.Module:
    """Return a model in fp32 whose weights have bf16 values."""
    return model.to(BF16).float()


def error(found: Tensor, expected: Tensor) -> float:
    """Return the root mean square of a difference."""
    return (found.float() - expected).square().mean().sqrt().item()


@pytest.mark.parametrize("rank", [8, MAX_EXPERT_RANK + 1], ids=["rows of the pool", "modules run again"])
@pytest.mark.parametrize("name", BASES)
def test_logits_equal_pefts(name: str, rank: int, tmp_path: Path) -> None:
    """Their error is that of PEFT in bf16, as transformers computes it, which the adapter's effect exceeds by far."""
    kind = Kind(BASES[name], {**EXPERT_PARAMETERS, "r": rank})
    make_adapter(kind, tmp_path)
    engine = start_engine(kind.base, tmp_path)
    experts = list(engine.model.adaptable.experts.values())
    assert experts
    assert all(one.is_packed for one in experts)
    assert all((one.gated is None) == (name == "gpt_oss") for one in experts), "whose gate is one of its own"
    exact, half = rounded(load(kind, tmp_path)), load(kind, tmp_path).to(BF16)
    base, plain = rounded(make_base(kind.base)), half_base(kind.base)
    errors = np.zeros((2, 2))  # ours and transformers', with the adapter and without it
    effect = 0.0
    for prompt in asked_prompts(kind):
        got = engine_logits(engine, [greedy_request(who, who, prompt, 5) for who in ("tuned", "")])
        ids, logits = got["tuned"]
        expected = peft_logits(exact, prompt, ids)
        effect += error(model_logits(base, prompt, ids), expected)
        errors[0] += error(logits, expected), error(peft_logits(half, prompt, ids), expected)
        ids, logits = got[""]
        expected = model_logits(base, prompt, ids)
        errors[1] += error(logits, expected), error(model_logits(plain, prompt, ids), expected)
    assert (errors[:, 0] <= 1.5 * errors[:, 1]).all(), errors
    assert effect >= 30 * errors[0, 0]


def test_another_adapter_in_a_step_changes_no_bit_with_fixed_sums(tmp_path: Path) -> None:
    kind = Kind(BASES["qwen3_moe"], EXPERT_PARAMETERS)
    make_adapter(kind, tmp_path)
    with fixed_sums():
        engine = start_engine(kind.base, tmp_path)
        assert any(one.gated for one in engine.model.adaptable.experts.values())
        plain = [greedy_request(str(i), "", prompt, 5) for i, prompt in enumerate(asked_prompts(kind))]
        tuned = greedy_request("tuned", "tuned", plain[0].prompt, 12)
        alone, beside = engine_logits(engine, plain), engine_logits(engine, [tuned, *plain])
    for request in plain:
        assert beside[request.rid][0] == alone[request.rid][0]
        assert torch.equal(beside[request.rid][1], alone[request.rid][1])


def module_of(model_type: str) -> nn.Module:
    """Return a module of 16 experts in bf16."""
    module = half_base((model_type, {**BASES[model_type][1], "num_experts": 16, "num_local_experts": 16}))
    return next(part for name, part in module.named_modules() if name.endswith(".experts"))


def packed(module: nn.Module) -> tuple[AdaptableModule, GroupedExperts]:
    """Return a module of experts after its weights were packed and freed."""
    owner = AdaptableModule("experts", module, TokenLayout((0, 0, 0), (0,), 2))
    [experts] = find_grouped_experts({"experts": owner}, None).values()
    return owner, experts


@pytest.mark.parametrize("model_type", BASES)
def test_packed_weights_are_had_back_bit_for_bit(model_type: str) -> None:
    module, at = module_of(model_type), torch.tensor([3, 0, 15])
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    owner, experts = packed(module)
    assert len(owner.packed) == len(experts.sites) == 2
    for name, parameter in module.named_parameters():
        assert parameter.shape == before[name].shape
        assert parameter.is_meta == (name in owner.packed)
        assert torch.equal(owner.parameter(name), before[name])
        assert torch.equal(owner.parameter(name, at), before[name][at])


@pytest.mark.parametrize("model_type", BASES)
def test_a_packed_module_runs_with_the_experts_that_rows_need(model_type: str) -> None:
    module = module_of(model_type)
    hidden, ids = torch.randn(3, 64).to(BF16), torch.tensor([[2, 9], [9, 4], [2, 15]])
    weights = torch.rand(3, 2).to(BF16)
    with torch.inference_mode():
        expected = module(hidden, ids, weights)
        owner, _ = packed(module)
        call = ExpertsCall.of(owner, [hidden, ids, weights], {})
        assert call is not None
        assert torch.equal(call.run([], 1.0), expected)
        assert alike(module(hidden, ids, weights), expected)


@pytest.mark.parametrize("model_type", BASES)
def test_inputs_of_another_dtype(model_type: str) -> None:
    """Experts convert fp32 inputs to their weights' dtype, and their results back."""
    module, ids = module_of(model_type), torch.tensor([[2, 9], [9, 4], [2, 15]])
    hidden, weights = torch.randn(3, 64), torch.rand(3, 2)
    with torch.inference_mode():
        expected = module(hidden, ids, weights)
        packed(module)
        found = module(hidden, ids, weights)
    assert found.dtype == expected.dtype == torch.float32
    assert alike(found.to(BF16), expected.to(BF16))


@pytest.mark.parametrize("limit", [10.0, float("inf")])
def test_a_gate_that_clips_is_the_modules_own(limit: float) -> None:
    """The native gate clips nothing, which numbers of usual size do not show."""
    fields = {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 4, "swiglu_limit": limit}
    config = AutoConfig.for_model("deepseek_v4", **fields)
    config._experts_implementation = "grouped_mm"
    module = DeepseekV4Experts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    module = module.to(BF16).requires_grad_(False)
    hidden, ids = torch.randn(6, 64).to(BF16) * 40, torch.tensor([[0, 1], [1, 2], [2, 3]] * 2)
    weights = torch.rand(6, 2).to(BF16)
    expected = module(hidden, ids, weights)
    _, experts = packed(module)
    assert (experts.gated is None) == (limit == 10.0)
    assert alike(module(hidden, ids, weights), expected)


def test_weights_stay_where_no_native_product_takes_them() -> None:
    """In fp32, and in bf16 if an expert's outputs do not fill whole panels."""
    narrow = {**BASES["mixtral"][1], "hidden_size": 40, "head_dim": 16, "intermediate_size": 24}
    for module in (
        module_of("mixtral").float(),
        half_base(("mixtral", narrow)).get_submodule("model.layers.0.mlp.experts"),
    ):
        owner, experts = packed(module)
        assert not experts.is_packed
        assert not owner.packed
        assert not any(parameter.is_meta for parameter in module.parameters())

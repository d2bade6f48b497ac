"""`quantization` of mixtures: experts in blocks give transformers' and PEFT's results on the dequantized weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers.fixed_sums import fixed_sums
from oracle.adapters.peft_kinds import (
    EXPERT_PARAMETERS,
    EXPERTS,
    MAX_DIFFERENCE,
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
from oracle.peft_oracle import ask, greedy_request, oracle_settings, prompts
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from gpu_worker.adapters.packing.rows import MAX_EXPERT_RANK
from gpu_worker.build import build_engine
from gpu_worker.engine.engine import Engine
from gpu_worker.layers.expert_modules import GroupedExperts, compute_with_blocks
from gpu_worker.loading.checkpoint import read_config, read_model
from gpu_worker.model.model import fingerprint_of
from gpu_worker.model.prepare import prepare_model
from gpu_worker.planning.request import EngineRequest
from gpu_worker.quantised.modules import round_inputs_of
from gpu_worker.quantised.quantise import quantised_folder
from lora_kernels import cpu
from lora_kernels.quantised import quantise, round_inputs
from protocol.wire.errors import BadRequest
from protocol.wire.messages import Sampling

CPU, BF16 = torch.device("cpu"), torch.bfloat16
Quantization = Literal["int8", "int4"]
QWEN: Base = ("qwen3_moe", {"head_dim": 16, "decoder_sparse_step": 1, **EXPERTS})
BASES: dict[str, Base] = {"qwen3_moe": QWEN, "mixtral": ("mixtral", {**EXPERTS, "num_local_experts": 6})}
KINDS = {
    "attention": {},
    "rows of the pool": {**EXPERT_PARAMETERS, "target_modules": ["q_proj", "o_proj"]},
    "modules run again": {**EXPERT_PARAMETERS, "r": MAX_EXPERT_RANK + 1, "target_modules": ["q_proj"]},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.load()  # the cache also holds the native kernels, which must not be built for each test
    monkeypatch.setenv("LORAFLEET_CACHE_DIR", str(tmp_path / "cache"))


def quantised(base: Base, quantization: Quantization, folder: Path) -> Path:
    make_base(base).save_pretrained(folder)
    return quantised_folder(folder, read_config(folder), quantization, 1)


def dequantised(base: Base, quantization: Quantization) -> PreTrainedModel:
    """Return a base with the numbers that its weights have in blocks."""
    model = make_base(base)
    head: Any = model.get_output_embeddings()
    for module in model.modules():
        kind = "q8_0" if quantization == "int8" or module is head else "q4_0"
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear) or parameter.ndim == 3:
                rows = parameter.detach().reshape(-1, parameter.shape[-1])
                numbers = quantise(rows, kind).dequantise().view(parameter.shape)
                module.register_parameter(name, nn.Parameter(numbers, requires_grad=False))
    return model


def engine_on(folder: Path, adapters: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Engine:
    model = prepare_model(read_model(folder, CPU, dtype), frozenset(), None)
    return build_engine(model, oracle_settings(**settings), lambda name: read_files(adapters / name))[0]


def experts_of(engine: Engine) -> list[GroupedExperts]:
    return [*engine.model.adaptable.experts.values()]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("name", BASES)
def test_logits_are_those_of_the_dequantised_weights(name: str, quantization: Quantization, tmp_path: Path) -> None:
    """For the base, and with adapters of attention and of experts in one batch."""
    base, adapters = BASES[name], tmp_path / "adapters"
    kinds = {own: Kind(base, options) for own, options in KINDS.items()}
    for own, kind in kinds.items():
        make_adapter(kind, adapters / own)
    made = quantised(base, quantization, tmp_path / "base")
    with safe_open(tmp_path / "base" / "model.safetensors", framework="pt") as file:
        assert any(".experts.3." in key for key in [*file.keys()]), "experts one by one, as on the Hub"
    engine = engine_on(made, adapters)
    assert len(experts_of(engine)) == 2
    for experts in experts_of(engine):
        assert all(site.blocks is not None for site in experts.sites)
        assert all(parameter.is_meta for parameter in experts.module.parameters(recurse=False))
        assert experts.gated is not None
    plain = dequantised(base, quantization)
    pefts = {own: load(kind, adapters / own, copy.deepcopy(plain)) for own, kind in kinds.items()}
    for prompt in asked_prompts(Kind(base)):
        got = engine_logits(engine, [greedy_request(own, own, prompt, 5) for own in ("", *kinds)])
        ids, logits = got[""]
        assert (logits - model_logits(plain, prompt, ids)).abs().max() < MAX_DIFFERENCE
        assert (logits - model_logits(make_base(base), prompt, ids)).abs().max() > 10 * MAX_DIFFERENCE, "of blocks"
        for own, peft in pefts.items():
            ids, logits = got[own]
            expected = peft_logits(peft, prompt, ids)
            assert (logits - expected).abs().max() < MAX_DIFFERENCE, own
            assert (expected - model_logits(plain, prompt, ids)).abs().max() > 100 * MAX_DIFFERENCE, own


def test_bf16(tmp_path: Path) -> None:
    """The error is that of transformers in bf16 on the same numbers. All experts are chosen, whatever is rounded."""
    base = "qwen3_moe", {**QWEN[1], "num_experts_per_tok": 4}
    kind = Kind(base, KINDS["rows of the pool"])
    make_adapter(kind, tmp_path / "tuned")
    engine = engine_on(quantised(base, "int4", tmp_path / "base"), tmp_path, BF16)
    assert all(experts.gated is not None for experts in experts_of(engine))
    exact = load(kind, tmp_path / "tuned", dequantised(base, "int4"))
    half = load(kind, tmp_path / "tuned", dequantised(base, "int4")).to(BF16)
    plain = dequantised(base, "int4")
    errors = torch.zeros(3)
    for prompt in asked_prompts(kind):
        ids, logits = engine_logits(engine, [greedy_request("tuned", "tuned", prompt, 5)])["tuned"]
        expected = peft_logits(exact, prompt, ids)
        found = logits, peft_logits(half, prompt, ids), model_logits(plain, prompt, ids)
        errors += torch.stack([(one.float() - expected).square().mean().sqrt() for one in found])
    assert errors[0] <= 1.5 * errors[1]
    assert errors[2] >= 20 * errors[0]


def round_experts(module: Any) -> None:
    """Make a module of transformers round the inputs of both products of its experts."""

    def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert, (up, down) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
            tokens, places = (ids == expert).nonzero(as_tuple=True)
            gates, ups = (round_inputs(hidden[tokens]) @ up.T).chunk(2, -1)
            out[tokens] += (round_inputs(module.act_fn(gates) * ups) @ down.T) * weights[tokens, places, None]
        return out

    module.forward = forward


def test_rounded_inputs(tmp_path: Path) -> None:
    """All experts are chosen, so that only the rounding of a few inputs can differ: by a code at most."""
    base = "qwen3_moe", {**QWEN[1], "num_experts_per_tok": 4}
    module = read_model(quantised(base, "int8", tmp_path / "base"), CPU, torch.float32)
    round_inputs_of(module)
    compute_with_blocks(module)
    oracle = dequantised(base, "int8")
    for part in oracle.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_pre_hook(lambda _, args: (round_inputs(args[0]), *args[1:]))
    prompt = torch.from_numpy(prompts(1, 160, (24,))[0])[None]
    with torch.inference_mode():
        found, exact_inside = module(prompt).logits, oracle(prompt).logits
        for part in oracle.modules():
            if hasattr(part, "gate_up_proj"):
                round_experts(part)
        expected = oracle(prompt).logits
    assert (found - expected).norm() < 0.3 * (exact_inside - expected).norm()


def test_with_fixed_sums_a_text_has_the_same_bits_in_any_batch(tmp_path: Path) -> None:
    make_adapter(Kind(QWEN, KINDS["rows of the pool"]), tmp_path / "tuned")
    made = quantised(QWEN, "int4", tmp_path / "base")
    wish = Sampling(temperature=0.0, ignore_eos=True, num_logprobs=5)
    requests = [
        EngineRequest(f"{name}/{i}", 1, name, text, wish, 8)
        for i, text in enumerate(prompts(4, 160, (3, 17, 32, 70)))
        for name in ("", "tuned")
    ]
    with fixed_sums():
        found: list[dict[str, bytes]] = []
        for own in ({}, {"max_step_tokens": 24, "max_num_seqs": 5}, {"max_num_seqs": 1, "max_step_tokens": 400}):
            engine = engine_on(made, tmp_path, BF16, deterministic=True, prefix_cache=False, **own)
            found.append(ask(engine, requests).logprobs)
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == len(requests)


def test_later_starts_map_the_packed_experts(tmp_path: Path) -> None:
    made = quantised(QWEN, "int8", tmp_path / "base")
    prints: list[str] = []
    times: list[int] = []
    for _ in range(2):
        prints.append(fingerprint_of(read_model(made, CPU, torch.float32)))
        times.append(next(made.glob("panels-*.bin")).stat().st_mtime_ns)
    assert times[0] == times[1], "packed once"
    assert b"experts.gate_up_proj" in next(made.glob("panels-*.json")).read_bytes()
    other = read_model(quantised(QWEN, "int4", tmp_path / "base"), CPU, torch.float32)
    assert prints[0] == prints[1] != fingerprint_of(other), "it says how the experts are quantized"


@pytest.mark.parametrize(
    ("base", "blocks"),
    [
        (("qwen3_moe", {**QWEN[1], "moe_intermediate_size": 40}), ["gate_up_proj"]),
        (("gpt_oss", {"head_dim": 16, "sliding_window": 12, **EXPERTS}), []),
    ],
    ids=["narrow", "transposed"],
)
def test_experts_that_fill_no_blocks_stay_numbers(base: Base, blocks: list[str], tmp_path: Path) -> None:
    """An input width of no whole blocks, an output width of no whole panels, a transposed layout."""
    made = quantised(base, "int8", tmp_path / "base")
    module = next(one for name, one in read_model(made, CPU, torch.float32).named_modules() if name.endswith("experts"))
    found = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    assert found == [name for name in blocks if 2 * base[1]["moe_intermediate_size"] % 32 == 0]
    model = prepare_model(read_model(made, CPU, torch.float32), frozenset(), None)
    assert model.passes is None


def test_fused_experts_in_the_files_are_quantised_the_same(tmp_path: Path) -> None:
    made = quantised(QWEN, "int4", tmp_path / "base")
    fused = tmp_path / "fused"
    make_base(QWEN).save_pretrained(fused, save_original_format=False)
    assert any(key.endswith("experts.down_proj") for key in load_file(fused / "model.safetensors"))
    again = quantised_folder(fused, read_config(fused), "int4", 2)
    assert again != made
    assert (again / "weights.bin").read_bytes() == (made / "weights.bin").read_bytes()


def test_experts_that_are_missing_are_refused_by_name(tmp_path: Path) -> None:
    make_base(QWEN).save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.1.mlp.experts"
    cases = {
        f"{lost}.3.up_proj.weight": f"experts of {lost}.gate_up_proj lack some of their tensors",
        f"{lost}.3.down_proj.weight": "the weights have 3 experts; the model has experts",
    }
    for left_out, message in cases.items():
        left = {name: tensor for name, tensor in whole.items() if name != left_out}
        save_file(left, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(BadRequest, match=message):
            quantised_folder(tmp_path, read_config(tmp_path), "int4", 1)

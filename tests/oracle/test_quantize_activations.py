"""`quantize_activations`: tokens are those of transformers whose linear layers get inputs rounded in the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers.fixed_sums import fixed_sums
from oracle.peft_oracle import Oracle, ask, greedy_request, oracle_settings, prompts
from oracle.test_quantization import KEPT, LORAS, NUM_TOKENS, base, dequantised
from transformers import LlamaForCausalLM

from gpu_worker.build import ROUNDING_SETS, build_engine, load_engine, refuse_unless_on_cpu
from gpu_worker.engine.engine import Engine
from gpu_worker.loading.checkpoint import read_config, read_model
from gpu_worker.model.kept_answers import answers_of
from gpu_worker.model.prepare import prepare_model
from gpu_worker.planning.request import EngineRequest
from gpu_worker.quantised.modules import has_rounded_inputs, round_inputs_of
from gpu_worker.quantised.quantise import quantised_folder
from lora_kernels import cpu
from lora_kernels.quantised import round_inputs
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest
from protocol.wire.messages import Sampling

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.load()  # the cache also holds the native kernels, which must not be built for each test
    monkeypatch.setenv("LORAFLEET_CACHE_DIR", str(tmp_path / "cache"))


def with_rounded_inputs(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Round the inputs of the layers that are quantized; PEFT's additions to them still see unrounded inputs."""

    def hook(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (round_inputs(args[0]), *args[1:])

    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.in_features % 32 == 0:
            module.register_forward_pre_hook(hook)
    return model


def engine_on(folder: Path, oracle: Oracle, **settings: Any) -> Engine:
    module = read_model(folder, CPU, torch.float32)
    round_inputs_of(module)
    return build_engine(prepare_model(module, frozenset(), None), oracle_settings(**settings), oracle.fetch)[0]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_tokens_are_those_of_rounded_inputs(quantization: Literal["int8", "int4"], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    exact = dequantised(base(folder, tie_word_embeddings=True), quantization)
    oracle = Oracle(with_rounded_inputs(exact), LORAS, scale=0.4)
    made = quantised_folder(folder, read_config(folder), quantization, KEPT)
    asked = [(name, prompt) for prompt in prompts(3, 160) for name in oracle.names]
    requests = [greedy_request(str(i), name, prompt, NUM_TOKENS) for i, (name, prompt) in enumerate(asked)]
    expected = [oracle.greedy(name, prompt, NUM_TOKENS) for name, prompt in asked]
    for settings in (dict[str, int](), {"max_step_tokens": 16, "max_num_seqs": 8}):
        got = ask(engine_on(made, oracle, **settings), requests)
        assert [got.ids[str(i)] for i in range(len(asked))] == expected
    assert len({tuple(ids) for ids in expected[:3]}) == 3, "adapters change the answer"


def test_with_fixed_sums_a_text_has_the_same_bits_in_any_batch(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    oracle = Oracle(base(folder), LORAS, scale=0.4)
    made = quantised_folder(folder, read_config(folder), "int4", KEPT)
    wish = Sampling(temperature=0.0, ignore_eos=True, num_logprobs=5)
    requests = [
        EngineRequest(f"{name}/{i}", 1, name, text, wish, NUM_TOKENS)
        for i, text in enumerate(prompts(4, 160, (3, 17, 32, 70)))
        for name in oracle.names
    ]
    with fixed_sums():
        found: list[dict[str, bytes]] = []
        for own in ({}, {"max_step_tokens": 24, "max_num_seqs": 5}, {"max_num_seqs": 1, "max_step_tokens": 400}):
            engine = engine_on(made, oracle, deterministic=True, prefix_cache=False, **own)
            found.append(ask(engine, requests).logprobs)
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == len(requests)


def test_rounding_is_seen(tmp_path: Path) -> None:
    """Otherwise the test above would pass with exact inputs."""
    folder = tmp_path / "base"
    model, other = dequantised(base(folder), "int8"), with_rounded_inputs(dequantised(base(folder), "int8"))
    made = quantised_folder(folder, read_config(folder), "int8", KEPT)
    ours = read_model(made, CPU, torch.float32)
    ids = torch.from_numpy(prompts(1, 160)[0]).long()[None]
    with torch.inference_mode():
        exact, rounded = model(ids).logits, other(ids).logits
        assert torch.allclose(ours(ids).logits, exact, atol=1e-4)
        round_inputs_of(ours)
        assert torch.allclose(ours(ids).logits, rounded, atol=2e-3)
    assert (rounded - exact).abs().max() > 1e-2


def test_answers_that_are_kept_are_of_one_setting(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    base(folder)
    made = quantised_folder(folder, read_config(folder), "int4", KEPT)
    module = read_model(made, CPU, torch.float32)
    assert not has_rounded_inputs(module)
    before = answers_of(module, made, None)
    round_inputs_of(module)
    assert has_rounded_inputs(module)
    assert answers_of(module, made, None) != before


def test_what_it_is_not_served_for_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    base(folder)
    settings = Settings(model=str(folder), device="cpu", quantize_activations=True)
    with pytest.raises(BadRequest, match="quantize_activations is on, but no linear layer of this model is in GGUF's"):
        load_engine(settings, lambda _: pytest.fail("no adapter is asked for"))
    with pytest.raises(BadRequest, match="quantize_activations is on, which is served for causal LMs only"):
        load_engine(settings.model_copy(update={"task": "score"}), lambda _: pytest.fail("no adapter is asked for"))
    refuse_unless_on_cpu(settings, CPU)
    with pytest.raises(BadRequest, match=r"quantize_activations is on.* a CPU only; the device is cuda"):
        refuse_unless_on_cpu(settings, torch.device("cuda"))


def test_unless_set_inputs_are_rounded_where_that_is_faster(tmp_path: Path) -> None:
    """The default follows the instruction set; a setting, and `deterministic`, go before it."""
    exact, rounded = tmp_path / "exact", tmp_path / "quantised"
    base(exact)
    base(rounded)
    if (lowest := next((isa for isa in reversed(cpu.isas()) if isa in ROUNDING_SETS), "")) == "":
        pytest.skip("inputs are rounded with none of this processor's instruction sets")

    def is_rounded(folder: Path, **given: Any) -> tuple[bool, str]:
        quantization = "int4" if folder == rounded else "none"
        settings = Settings(model=str(folder), device="cpu", quantization=quantization, **given)
        before = cpu.isa()
        try:
            thread, served = load_engine(settings, lambda _: pytest.fail("no adapter is asked for"))
        finally:
            cpu.set_isa(before)
        assert isinstance(thread.engine, Engine)
        return thread.engine.model.rounds_inputs, served.dtype_reason

    found, reason = is_rounded(rounded, kernels=lowest)
    assert found
    assert reason.endswith("; quantised layers multiply inputs in int8")
    assert not is_rounded(exact, kernels=lowest)[0], "no layer is quantised"
    assert not is_rounded(rounded, kernels=lowest, quantize_activations=False)[0]
    assert not is_rounded(rounded, kernels=lowest, deterministic=True)[0]
    assert is_rounded(rounded, kernels=lowest, deterministic=True, quantize_activations=True)[0]
    if "bf16" in cpu.isa():
        found, reason = is_rounded(rounded)
        assert not found
        assert "int8" not in reason

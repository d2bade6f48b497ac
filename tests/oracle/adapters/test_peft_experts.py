"""Adapters saved when experts were linear layers equal PEFT's, which reads them as LoRA on fused parameters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle.adapters.peft_kinds import (
    EXPERT_PARAMETERS,
    EXPERTS,
    GPT_OSS,
    MAX_DIFFERENCE,
    MIXTRAL,
    Base,
    Kind,
    asked_prompts,
    check_exact,
    difference,
    engine_logits,
    load,
    make_adapter,
    make_base,
    make_engine,
    model_logits,
    peft_logits,
)
from oracle.peft_oracle import FAMILY_OF_TYPE, ask, greedy_request
from peft.utils.transformers_weight_conversion import (
    _MOE_FUSED_TARGETS,
    _MOE_TARGET_MODULE_MAPPING,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING

from gpu_worker.layers import adaptable_modules
from peft_adapters.experts import FAMILIES
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE

QWEN3_MOE: Base = ("qwen3_moe", {"head_dim": 16, "decoder_sparse_step": 1, **EXPERTS})
RANK = 3
WHERE = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}


def old_tensors(base: Base, targets: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield random tensors as transformers 4 and PEFT saved them for these targets."""
    model, generator = make_base(base), torch.Generator().manual_seed(2)
    names = FAMILIES[base[0]]
    fused = {**dict.fromkeys(names.fused, "gate_up_proj"), names.down: "down_proj"}

    def pair(module: str, rows: int, width: int) -> Iterator[tuple[str, Tensor]]:
        for half, shape in (("A", (RANK, width)), ("B", (rows, RANK))):
            name = f"base_model.model.{module}.lora_{half}.weight"
            yield name, 0.3 * torch.randn(shape, generator=generator)

    for i, layer in enumerate(model.get_submodule("model.layers").children()):
        prefix = f"model.layers.{i}"
        for target in targets:
            if target == "q_proj":
                yield from pair(f"{prefix}.self_attn.q_proj", *layer.get_parameter("self_attn.q_proj.weight").shape)
            elif target == names.router:
                yield from pair(f"{prefix}.{WHERE[base[0]]}.gate", *layer.get_parameter("mlp.gate.weight").shape)
            else:
                num, rows, width = layer.get_parameter(f"mlp.experts.{fused[target]}").shape
                for expert in range(num):
                    module = f"{prefix}.{WHERE[base[0]]}.experts.{expert}.{target}"
                    yield from pair(module, rows // (2 if target in names.fused else 1), width)


def write(base: Base, targets: list[str], folder: Path, without: str = "?", **fields: Any) -> None:
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 6, "target_modules": targets, **fields
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    found = {name: tensor for name, tensor in old_tensors(base, targets) if without not in name}
    save_file(found, folder / WEIGHTS_FILE)


CASES: dict[str, tuple[Base, list[str], dict[str, Any]]] = {
    "mixtral": (MIXTRAL, ["q_proj", "gate", "w1", "w2", "w3"], {}),
    "mixtral, rslora": (MIXTRAL, ["w1", "w2", "w3"], {"use_rslora": True}),
    "mixtral, down alone": (MIXTRAL, ["w2", "q_proj"], {"alpha_pattern": {"down_proj": 9}}),
    "qwen3_moe": (QWEN3_MOE, ["q_proj", "gate_proj", "up_proj", "down_proj"], {}),
    "qwen3_moe, router": (QWEN3_MOE, ["gate", "down_proj"], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_experts_that_were_layers(name: str, tmp_path: Path) -> None:
    base, targets, fields = CASES[name]
    write(base, targets, tmp_path, **fields)
    check_exact(Kind(base), tmp_path, max_step_tokens=16, max_num_seqs=8)


PATTERNS: dict[str, tuple[Base, list[str], str]] = {
    "mixtral": (MIXTRAL, ["q_proj", "gate", "w1", "w2", "w3"], r".*\.(q_proj|gate|w\d)"),
    "mixtral, by the old block": (MIXTRAL, ["w2"], r"model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.w2"),
    "qwen3_moe": (QWEN3_MOE, ["q_proj", "gate_proj", "up_proj", "down_proj"], r".*\.(q|gate|up|down)_proj"),
    "qwen3_moe, Unsloth's": (
        QWEN3_MOE, ["gate_proj", "up_proj", "down_proj"],
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp|feed_forward|ffn|dense)\..*?(?:gate_proj|up_proj|down_proj))",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_means_the_layers_that_it_matched(name: str, tmp_path: Path) -> None:
    """PEFT 0.21 converts lists of names only, so the oracle is the same adapter with a list."""
    base, targets, pattern = PATTERNS[name]
    for folder, meant in (("list", targets), ("pattern", pattern)):
        write(base, targets, tmp_path / folder)
        file = tmp_path / folder / CONFIG_FILE
        file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": meant}))
    check_exact(Kind(base), tmp_path / "pattern", load(Kind(base), tmp_path / "list"))


def test_what_peft_cannot_convert_is_refused_by_name(tmp_path: Path) -> None:
    write(MIXTRAL, ["w1", "q_proj"], tmp_path / "half")
    write(MIXTRAL, ["w2", "q_proj"], tmp_path / "hole", without="layers.1.block_sparse_moe.experts.2.w2.lora_B")
    write(MIXTRAL, ["w2", "q_proj"], tmp_path / "pattern")
    write(MIXTRAL, ["q_proj"], tmp_path / "new")
    write(MIXTRAL, ["q_proj"], tmp_path / "whole")
    write(MIXTRAL, ["w1", "w3"], tmp_path / "lost")
    patterns = {"pattern": r".*(\.0\.w2|q_proj)", "new": r".*(w2|q_proj)", "whole": "all-linear"}
    for name, targets in patterns.items():
        file = tmp_path / name / CONFIG_FILE
        file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": targets}))
    reasons = {
        "half": "only one of w1 and w3",
        "hole": "missing for targeted layers: model.layers.1.mlp.experts.2.w2.lora_B",
        "lost": "loses what is adapted of w1 and w3",
        "pattern": "layers that the base model does not have",  # the pattern matches only some experts
        "new": "list the layers",  # the file has none of these layers
        "whole": "list the layers",
    }
    engine = make_engine(MIXTRAL, {name: tmp_path / name for name in reasons})
    asked = ask(engine, [greedy_request(name, name, asked_prompts(Kind(MIXTRAL))[0], 2) for name in reasons])
    for name, reason in reasons.items():
        error = asked.finish[name].error
        assert error is not None
        assert reason in error.message
        assert error.status == 422


def test_the_families_are_those_of_peft() -> None:
    theirs = {
        model_type: family
        for model_type, family in FAMILY_OF_TYPE.items()
        if family in _MOE_FUSED_TARGETS and model_type in CONFIG_MAPPING
    }
    assert sorted(theirs) == sorted(FAMILIES)
    for model_type, family in theirs.items():
        names = FAMILIES[model_type]
        assert names.parameters == _MOE_TARGET_MODULE_MAPPING[family]
        assert list(names.fused) == _MOE_FUSED_TARGETS[family]["gate_up_proj"]


MANY = {**EXPERTS, "num_experts": 16, "num_local_experts": 16}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_rows_read_the_experts_that_they_go_to_alone(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A token uses two of sixteen experts: the weights of the others are not read and may hold anything.

    For expert modules that run a second time; `test_expert_rows.py` tests those whose LoRA is rows of the pool.
    """
    fields = {
        **(QWEN3_MOE if model_type == "qwen3_moe" else GPT_OSS if model_type == "gpt_oss" else MIXTRAL)[1],
        **MANY,
    }
    kind = Kind((model_type, fields), EXPERT_PARAMETERS)
    make_adapter(kind, tmp_path)
    monkeypatch.setattr(adaptable_modules, "find_grouped_experts", lambda *_, **__: {})
    engine = make_engine(kind.base, {"tuned": tmp_path}, prefix_cache=False)
    prompt = asked_prompts(kind)[0]
    ids, logits = engine_logits(engine, [greedy_request("x", "tuned", prompt, 8)])["x"]
    expected = peft_logits(load(kind, tmp_path), prompt, ids)
    assert difference(logits, expected) <= MAX_DIFFERENCE
    assert (expected - model_logits(make_base(kind.base), prompt, ids)).abs().max() >= 100 * MAX_DIFFERENCE
    modules = [module for name, module in engine.model.adaptable.modules.items() if name.endswith(".experts")]
    assert modules
    assert all(module.few_experts for module in modules)
    assert all(f"LoRA on {module.name} cannot use the pool" in caplog.text for module in modules)

    parameters = engine.adapters.extras["tuned"].parameters
    poisoned = [lora for loras in parameters.values() for lora in loras]
    assert all(lora.lhs.shape[0] == 16 for lora in poisoned)
    hit = {module.name: torch.zeros(16, dtype=torch.bool) for module in modules}

    def watch(name: str) -> Any:
        def hook(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
            [index] = [arg for arg in args if not arg.is_floating_point()]
            hit[name][index.unique()] = True

        return hook

    handles = [module.module.register_forward_pre_hook(watch(module.name)) for module in modules]
    first = ask(engine, [greedy_request("again", "tuned", prompt, 2)]).ids["again"]
    for handle in handles:
        handle.remove()
    for module in modules:
        assert not hit[module.name].all(), "or nothing would be shown"
        with torch.inference_mode():
            for lora in parameters[module.name]:
                lora.lhs[~hit[module.name]] = torch.nan
    assert ask(engine, [greedy_request("poisoned", "tuned", prompt, 2)]).ids["poisoned"] == first == ids[:2]

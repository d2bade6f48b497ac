"""Adapters trained on a twin of the base, with equal weights under other names, give PEFT's results on the twin."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import examples
from oracle.adapters.peft_kinds import TINY, Kind, asked_prompts, compare, load, make_adapter, read_files
from oracle.peft_oracle import oracle_settings
from oracle.tiny_models import decoder_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
)

from gpu_worker.build import build_engine
from gpu_worker.model.prepare import prepare_model
from peft_adapters.format import WEIGHTS_FILE, parse_header, read_adapter

GEMMA = TINY | {"head_dim": 16, "sliding_window": 12, "tie_word_embeddings": True}
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
LLAMA = TINY | {"rms_norm_eps": 1e-5, "head_dim": 16}
ANY = Kind(("llama", {}))


def gemma_text() -> PreTrainedModel:
    return decoder_of(Gemma3TextConfig(**GEMMA))


def gemma_wrapper() -> PreTrainedModel:
    return decoder_of(Gemma3Config(text_config=GEMMA, vision_config=VISION, mm_tokens_per_image=4))


def llama() -> PreTrainedModel:
    return decoder_of(LlamaConfig(**LLAMA))


def phi3() -> PreTrainedModel:
    return decoder_of(Phi3Config(**LLAMA))


Weights = dict[str, Tensor]


def wrapped(weights: Weights) -> Weights:
    return {re.sub(r"^model\.", "model.language_model.", name): tensor for name, tensor in weights.items()}


def unwrapped(weights: Weights) -> Weights:
    found = {name.replace("model.language_model.", "model."): tensor for name, tensor in weights.items()}
    return {name: tensor for name, tensor in found.items() if "vision" not in name and "projector" not in name}


def split(weights: Weights) -> Weights:
    found: Weights = {}
    for name, tensor in weights.items():
        if "qkv_proj" in name:
            parts = zip(("q_proj", "k_proj", "v_proj"), tensor.split([64, 32, 32]), strict=True)
            found |= {name.replace("qkv_proj", part): rows.clone() for part, rows in parts}
        elif "gate_up_proj" in name:
            parts = zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True)
            found |= {name.replace("gate_up_proj", part): rows.clone() for part, rows in parts}
        else:
            found[name] = tensor
    return found


def fused(weights: Weights) -> Weights:
    found = {name: tensor for name, tensor in weights.items() if not re.search(r"\.(q|k|v|gate|up)_proj", name)}
    for name in weights:
        for first, parts, whole in (
            (".q_proj", (".q_proj", ".k_proj", ".v_proj"), ".qkv_proj"),
            (".gate_proj", (".gate_proj", ".up_proj"), ".gate_up_proj"),
        ):
            if first in name:
                found[name.replace(first, whole)] = torch.cat([weights[name.replace(first, part)] for part in parts])
    return found


def lora(*targets: str, **fields: Any) -> dict[str, Any]:
    return {"target_modules": list(targets), **fields}


@dataclass(frozen=True, slots=True)
class Twins:
    """A served base, and the model with the same weights on which the adapter is trained."""

    served: Callable[[], PreTrainedModel]
    trained: Callable[[], PreTrainedModel]
    weights: Callable[[Weights], Weights]  # converts the served model's weights to the trained one's
    config: dict[str, Any]
    mapped: dict[str, str]


TEXT = r".*language_model.*(q_proj|o_proj|down_proj)"
PARTS = {"*.q_proj, *.k_proj, *.v_proj": "*.qkv_proj"}
MLP_PARTS = {"*.gate_proj, *.up_proj": "*.gate_up_proj"}
SPLIT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
CASES: dict[str, Twins] = {
    "text class on a wrapper": Twins(
        gemma_wrapper, gemma_text, unwrapped, lora("q_proj", "down_proj"), {"model.*": "model.language_model.*"}
    ),
    "text class on a wrapper, head and tokens": Twins(
        gemma_wrapper, gemma_text, unwrapped,
        lora("q_proj", trainable_token_indices=[3, 150], modules_to_save=["norm"], use_dora=True),
        {"model.*": "model.language_model.*"},
    ),
    "wrapper on a text class": Twins(
        gemma_text, gemma_wrapper, wrapped, lora() | {"target_modules": TEXT},
        {"model.language_model.*": "model.*"},
    ),
    "wrapper on a text class, ranks by pattern": Twins(
        gemma_text, gemma_wrapper, wrapped,
        lora(rank_pattern={r"model\.language_model\.layers\.1.*": 6}) | {"target_modules": TEXT},
        {"model.language_model.*": "model.*"},
    ),
    "fused on a split base": Twins(
        llama, phi3, fused, lora("qkv_proj", "gate_up_proj", "o_proj"),
        {"*.qkv_proj": "*.q_proj, *.k_proj, *.v_proj", "*.gate_up_proj": "*.gate_proj, *.up_proj"},
    ),
    "split on a fused base": Twins(phi3, llama, split, lora(*SPLIT), PARTS | MLP_PARTS),
    "split on a fused base, k alone": Twins(phi3, llama, split, lora("k_proj", "down_proj", lora_alpha=40), PARTS),
    "split on a fused base, ranks and scales of each": Twins(
        phi3, llama, split, lora(*SPLIT, rank_pattern={"q_proj": 2, "up_proj": 7}, alpha_pattern={"v_proj": 40}),
        PARTS | MLP_PARTS,
    ),
    "fused on a split base, DoRA": Twins(
        llama, phi3, fused, lora("qkv_proj", "o_proj", use_dora=True), {"*.qkv_proj": "*.q_proj, *.k_proj, *.v_proj"}
    ),
    "split on a fused base, DoRA of all and of some": Twins(
        phi3, llama, split, lora("q_proj", "v_proj", "gate_proj", "up_proj", use_dora=True), PARTS | MLP_PARTS
    ),
    "fused on a split base, biases": Twins(
        llama, phi3, fused, lora("gate_up_proj", lora_bias=True), {"*.gate_up_proj": "*.gate_proj, *.up_proj"}
    ),
    "split on a fused base, biases": Twins(
        phi3, llama, split, lora("q_proj", "k_proj", lora_bias=True, alpha_pattern={"k_proj": 40}), PARTS
    ),
    "split on a fused base, rsLoRA of one layer": Twins(
        phi3, llama, split, lora("q_proj", "v_proj", use_rslora=True, layers_to_transform=[1], layers_pattern="layers"),
        PARTS,
    ),
}  # fmt: skip


def twin_of(twins: Twins) -> PreTrainedModel:
    """Return the model to train, with the weights of the served one."""
    model = twins.trained()
    lacking = model.load_state_dict(twins.weights(twins.served().state_dict()), strict=False)
    assert not lacking.unexpected_keys
    assert not [name for name in lacking.missing_keys if "vision" not in name and "projector" not in name]
    return model


def hold(served: PreTrainedModel, folder: Path, expected: torch.nn.Module, base: PreTrainedModel) -> dict[str, str]:
    """Compare the engine's logits under an adapter and under the base with PEFT's. Return the mapped names."""
    settings = oracle_settings(max_step_tokens=16, max_num_seqs=8)
    engine, info = build_engine(prepare_model(served, frozenset(), None), settings, lambda _: read_files(folder), None)
    compare(engine, asked_prompts(ANY), expected, base, base).check()
    files = read_files(folder)
    weights = bytes(files.weights)
    return dict(read_adapter(files.config, parse_header(weights, len(weights)), info).mapped)


@pytest.mark.parametrize(
    "name",
    examples.some(
        CASES, "text class on a wrapper, head and tokens", "fused on a split base, biases",
        "split on a fused base, ranks and scales of each", "split on a fused base, DoRA of all and of some",
    ),
)  # fmt: skip
def test_adapters_of_a_twin_are_those_of_peft(name: str, tmp_path: Path) -> None:
    twins = CASES[name]
    make_adapter(replace(ANY, options=twins.config), tmp_path, model=twin_of(twins))
    mapped = hold(twins.served(), tmp_path, load(ANY, tmp_path, twin_of(twins)), twin_of(twins))
    assert mapped == twins.mapped


def rewrite(folder: Path, rename: Callable[[str], str]) -> None:
    found = load_file(folder / WEIGHTS_FILE)
    save_file({rename(name): tensor for name, tensor in found.items()}, folder / WEIGHTS_FILE)


SAVERS: dict[str, Sequence[tuple[str, str]]] = {
    "raw state dict": [(r"(lora_[AB])\.", r"\1.default."), (r"lm_head\.", "lm_head.modules_to_save.default.")],
    "no prefix": [(r"^base_model\.model\.", "")],
    "FSDP": [(r"^", "_fsdp_wrapped_module."), (r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module.")],
    "bare decoder": [(r"\.model\.model\.", ".model.")],
}


@pytest.mark.parametrize("name", SAVERS)
def test_adapters_of_other_savers_are_those_of_peft(name: str, tmp_path: Path) -> None:
    saved = {"modules_to_save": ["lm_head"]} if name == "raw state dict" else {}
    make_adapter(replace(ANY, options=lora("q_proj", "down_proj", **saved)), tmp_path, model=llama())
    expected = load(ANY, tmp_path, llama())

    def rename(key: str) -> str:
        for old, new in SAVERS[name]:
            key = re.sub(old, new, key)
        return key

    rewrite(tmp_path, rename)
    assert hold(llama(), tmp_path, expected, llama())


def test_a_decoder_trained_alone_is_read_for_its_language_model(tmp_path: Path) -> None:
    decoder = AutoModel.from_config(LlamaConfig(**LLAMA), attn_implementation="eager")
    decoder.load_state_dict(llama().model.state_dict())
    options = lora("q_proj", "up_proj", task_type="FEATURE_EXTRACTION")
    make_adapter(replace(ANY, options=options), tmp_path, model=decoder)
    model = llama()
    model.model = load(ANY, tmp_path, decoder).merge_and_unload()
    assert hold(llama(), tmp_path, model, llama()) == {"*": "model.*"}

"""LoRA in GGUF, as written by llama.cpp's `convert_lora_to_gguf.py`.

The matrix pair of a weight W is `W.lora_a` and `W.lora_b`, with PEFT's shapes. llama.cpp scales the product by
`adapter.lora.alpha` over the pair's rank, or 1 if alpha is 0 (`llama_adapter_lora_weight::get_scale`). Names are those
in gguf-py's `tensor_mapping.py`. For some architectures the converter reorders rows of q and k, because llama.cpp
rotates neighbors instead of halves of a head (`LlamaModel.permute`); undoing this requires the base's head dimension.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from peft_adapters.config_fields import is_alpha
from peft_adapters.formats.conversion import PREFIX, Conversion, Moved, config_of, lora_pairs
from peft_adapters.formats.gguf_header import GgufFile
from peft_adapters.reasons import Reasons, show
from protocol.wire.errors import AdapterRefused
from protocol.wire.messages import ServedModel

GGUF_END = ".gguf"

_SPLIT = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FUSED = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_ATTENTION = {weight: module for weight, module in _SPLIT.items() if weight.startswith("attn_")}
_HEAD = "output.weight"
_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,5})\.([\w.]{1,64})\.weight", re.ASCII)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A GGUF architecture."""

    types: tuple[str, ...]  # transformers' model types
    layers: dict[str, str]  # GGUF's name of a weight in a layer -> the module
    is_paired: bool = False  # whether rows of q and k are reordered


ARCHITECTURES = {
    "llama": Architecture(("llama", "mistral", "mixtral"), _SPLIT, is_paired=True),
    "mistral3": Architecture(("ministral3",), _SPLIT, is_paired=True),
    "granite": Architecture(("granite",), _SPLIT, is_paired=True),
    "smollm3": Architecture(("smollm3",), _SPLIT, is_paired=True),
    "qwen2": Architecture(("qwen2",), _SPLIT),
    "qwen2moe": Architecture(("qwen2_moe",), _ATTENTION),
    "qwen3": Architecture(("qwen3",), _SPLIT),
    "qwen3moe": Architecture(("qwen3_moe",), _ATTENTION),
    "qwen35": Architecture(("qwen3_5", "qwen3_5_text"), _SPLIT),
    "gemma": Architecture(("gemma",), _SPLIT),
    "gemma2": Architecture(("gemma2",), _SPLIT),
    "gemma3": Architecture(("gemma3", "gemma3_text"), _SPLIT),
    "phi2": Architecture(
        ("phi",), {**_ATTENTION, "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
    ),
    "phi3": Architecture(("phi3",), _FUSED),
    "glm4": Architecture(("glm4",), {**_ATTENTION, "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}),
    "olmo2": Architecture(("olmo2", "olmo3"), _SPLIT),
    "seed_oss": Architecture(("seed_oss",), _SPLIT),
    "command-r": Architecture(("cohere",), _SPLIT),
    "cohere2": Architecture(("cohere2",), _SPLIT),
    "exaone4": Architecture(("exaone4",), _SPLIT),
    "stablelm": Architecture(("stablelm",), _SPLIT),
    "starcoder2": Architecture(("starcoder2",), {**_ATTENTION, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
    "gpt-oss": Architecture(("gpt_oss",), _ATTENTION),
    "lfm2": Architecture(
        ("lfm2",),
        {
            **_ATTENTION,
            "attn_output": "self_attn.out_proj",
            "ffn_gate": "feed_forward.w1",
            "ffn_up": "feed_forward.w3",
            "ffn_down": "feed_forward.w2",
            "shortconv.in_proj": "conv.in_proj",
            "shortconv.out_proj": "conv.out_proj",
        },
    ),
}
"""The supported architectures. Others reorder weights in other ways, such as qwen35 those of its delta rules."""


def convert_gguf(file: GgufFile, base: ServedModel) -> Conversion:
    """Return the plan for converting LoRA in GGUF for PEFT and a base. Raises AdapterRefused with all reasons."""
    reasons = Reasons()
    _check_kind(file, reasons)
    name = file.fields.get("general.architecture")
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        reasons.add(f"GGUF adapters of the architecture {show(name)} are not served; those of {known} are")
        raise AdapterRefused(reasons.render())
    if base.model_type not in architecture.types:
        reasons.add(f"the adapter is for the architecture {show(name)}; the base model is of type {base.model_type}")
    alpha = file.fields.get("adapter.lora.alpha")
    if not is_alpha(alpha):
        reasons.add(f"adapter.lora.alpha {show(alpha)} is not a finite number")
        alpha = 0.0
    tokens = file.fields.get("adapter.alora.invocation_tokens", [])
    moved: list[Moved] = []
    ranks: dict[str, int] = {}
    for weight, (a, b) in lora_pairs(file.tensors, (".lora_a", ".lora_b"), reasons).items():
        module = _module_of(weight, architecture)
        if not module:
            reasons.add(f"weights that adapters of the architecture {show(name)} cannot change here", weight)
            continue
        if a.shape[0] != b.shape[1]:
            reasons.add(f"lora_a of rank {a.shape[0]} and lora_b of rank {b.shape[1]} do not fit together", weight)
        ranks[module] = a.shape[0]
        moved.append(Moved(f"{PREFIX}{module}.lora_A.weight", a))
        if architecture.is_paired and module.endswith(("q_proj", "k_proj")):
            if base.head_dim < 2 or base.head_dim % 2 or b.shape[0] % base.head_dim:
                reasons.add(f"{b.shape[0]} rows are not heads of {base.head_dim}, the base model's", weight)
            moved.append(Moved(f"{PREFIX}{module}.lora_B.weight", b, "unpaired", base.head_dim))
        else:
            moved.append(Moved(f"{PREFIX}{module}.lora_B.weight", b))
    if not ranks:
        reasons.add("the file has no lora_a and lora_b")
    if reasons:
        raise AdapterRefused(reasons.render())
    alphas = {module: alpha or float(rank) for module, rank in ranks.items()}
    fields = {"alora_invocation_tokens": tokens} if tokens else {}
    return Conversion(config_of(ranks, alphas, **fields), tuple(moved))


def _check_kind(file: GgufFile, reasons: Reasons) -> None:
    """Add reasons against a file that is not a LoRA adapter."""
    kind, what = file.fields.get("general.type"), file.fields.get("adapter.type")
    if kind != "adapter":
        reasons.add(f"the GGUF file is of type {show(kind)}, not an adapter")
    elif what != "lora":
        reasons.add(f"adapter.type {show(what)} is not lora")


def _module_of(weight: str, architecture: Architecture) -> str:
    """Return the module of a weight, as transformers' text classes name it; "" if it is not supported."""
    if weight == _HEAD:
        return "lm_head"
    match = _LAYER.fullmatch(weight)
    leaf = architecture.layers.get(match[2]) if match else None
    return f"model.layers.{match[1]}.{leaf}" if match and leaf else ""

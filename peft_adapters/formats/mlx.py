"""Adapters of MLX-LM: `adapters.safetensors`, with an `adapter_config.json` that has `lora_parameters`.

MLX-LM (`mlx_lm/tuner/lora.py`, `dora.py`) computes `x @ lora_a @ lora_b` times `scale`, with lora_a [in, rank] and
lora_b [rank, out]: the transposes of PEFT's A and B. `scale` is the whole factor, which in PEFT is `lora_alpha / r`.
DoRA's magnitude `m` is the same as PEFT's. Modules have transformers' names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_adapters.config_fields import is_alpha
from peft_adapters.formats.conversion import PREFIX, Conversion, Moved, config_of, lora_pairs
from peft_adapters.json_values import is_object
from peft_adapters.reasons import Reasons, show
from peft_adapters.safetensors_header import TensorInfo
from protocol.wire.errors import AdapterRefused

MLX_WEIGHTS = "adapters.safetensors"

_MAGNITUDE = ".m"
_TYPES = ("lora", "dora")


def convert_mlx(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Conversion:
    """Return the plan for converting an MLX-LM adapter for PEFT. Raises AdapterRefused with all reasons.

    config: its parsed `adapter_config.json`. tensors: from `parse_header`.
    """
    reasons = Reasons()
    kind = config.get("fine_tune_type", "lora")
    if kind not in _TYPES:
        reasons.add(f"fine_tune_type {show(kind)} of MLX-LM is not served; only {' and '.join(_TYPES)} are")
    scale = _scale(config.get("lora_parameters"), reasons)
    magnitudes = {name.removesuffix(_MAGNITUDE): info for name, info in tensors.items() if name.endswith(_MAGNITUDE)}
    rest = {name: info for name, info in tensors.items() if not name.endswith(_MAGNITUDE)}
    pairs = lora_pairs(rest, (".lora_a", ".lora_b"), reasons)
    moved: list[Moved] = []
    for module, (a, b) in pairs.items():
        if module.endswith("embed_tokens"):
            # With tied weights, MLX-LM adapts the head too; PEFT does not.
            reasons.add("LoRA of MLX-LM on embeddings is not served", module)
        if a.shape[1] != b.shape[0]:
            reasons.add(f"lora_a of rank {a.shape[1]} and lora_b of rank {b.shape[0]} do not fit together", module)
        moved.append(Moved(f"{PREFIX}{module}.lora_A.weight", a, "transposed"))
        moved.append(Moved(f"{PREFIX}{module}.lora_B.weight", b, "transposed"))
    if (kind == "dora" or magnitudes) and magnitudes.keys() != pairs.keys():
        reasons.add("not every layer with LoRA has a magnitude (m)")
    if magnitudes and kind == "lora":
        reasons.add("magnitudes (m) of DoRA, where fine_tune_type is lora")
    moved += [Moved(f"{PREFIX}{module}.lora_magnitude_vector", info) for module, info in sorted(magnitudes.items())]
    if not pairs:
        reasons.add("the file has no lora_a and lora_b")
    if reasons:
        raise AdapterRefused(reasons.render())
    ranks = {module: a.shape[1] for module, (a, _) in pairs.items()}
    alphas = {module: scale * rank for module, rank in ranks.items()}
    return Conversion(config_of(ranks, alphas, use_dora=kind == "dora"), tuple(moved))


def _scale(parameters: Any, reasons: Reasons) -> float:
    """Read the scale of the product from the config's `lora_parameters`."""
    if not is_object(parameters):
        reasons.add("adapter_config.json has no lora_parameters of MLX-LM")
        return 0.0
    if "alpha" in parameters:
        # Versions up to 0.18 multiply by alpha / rank; later ones ignore alpha.
        reasons.add("lora_parameters has alpha, which versions of MLX-LM read differently: take it out, scale it in")
    scale: Any = parameters.get("scale")
    if not is_alpha(scale):
        reasons.add(f"scale {show(scale)} in lora_parameters is not a finite number")
        return 0.0
    return float(scale)

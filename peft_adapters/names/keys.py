"""Tensor names as written by savers other than PEFT's, and PEFT's names for the same tensors.

Dropped parts do not affect results: the prefix of PEFT's wrapper, the adapter's name (which PEFT omits when saving, but
trainers' raw state dicts contain), and the parts that FSDP, DDP, `torch.compile` and activation checkpointing insert
into names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

PREFIX = "base_model.model."
"""PEFT's prefix for the name of every tensor of a module."""
MODEL_PREFIX = "base_model."
"""PEFT's prefix for other tensors, which layers share."""

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.|^module\.")
_NAMED = re.compile(
    r"(?P<before>.+)\.(?P<what>lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|modules_to_save|trainable_tokens_delta)\.(?P<adapter>[^.]+)(?:\.(?P<parameter>weight|bias))?",
    re.DOTALL,
)
_USUAL = (".lora_A.weight", ".lora_B.weight")
"""Suffixes of names; most files have no others."""
_WITH_WEIGHT = ("lora_A", "lora_B")
"""Kinds of modules with their own weight; the rest are parameters, or `modules_to_save`."""


@dataclass(frozen=True, slots=True)
class TensorNames:
    """The tensors of a file under PEFT's names."""

    files: dict[str, str]  # PEFT's name -> the file's
    rules: dict[str, str]  # renaming applied to all names, old -> new, for display


def peft_keys(names: Iterable[str]) -> TensorNames:
    """Return PEFT's name for each tensor of a file. A file with mixed naming schemes keeps its own names.

    names: the file's names.
    """
    own = list(names)
    if all(name.startswith(PREFIX) and name.endswith(_USUAL) and "._" not in name for name in own):
        return TensorNames({name: name for name in own}, {})
    rules: dict[str, str] = {}
    found = [_WRAPPERS.sub("", name) for name in own]
    if found != own:
        rules["parts of names that wrappers of training add"] = "left out"
    adapters = {match["adapter"] for name in found if (match := _adapter_in(name))}
    if len(adapters) == 1 and all(_adapter_in(name) for name in found if ".lora_" in name):
        rules[f"*.{adapters.pop()}.*"] = "*.*"
        found = [_without_adapter(name) for name in found]
    if found and not any(name.startswith(PREFIX) for name in found):
        rules["*"] = f"{PREFIX}*"
        found = [PREFIX + name for name in found]
    if not rules or len(set(found)) < len(found):
        return TensorNames({name: name for name in own}, {})
    return TensorNames(dict(zip(found, own, strict=True)), rules)


def _adapter_in(name: str) -> re.Match[str] | None:
    """Return the match of a name that includes the adapter's name; None for a name as PEFT saves it."""
    match = _NAMED.fullmatch(name)
    if match is None or match["adapter"] in ("weight", "bias"):
        return None
    return match


def _without_adapter(name: str) -> str:
    match = _adapter_in(name)
    if match is None:
        return name
    parameter = f".{match['parameter']}" if match["parameter"] else ""
    if match["what"] == "modules_to_save":
        return match["before"] + parameter
    if match["what"] not in _WITH_WEIGHT and parameter == ".weight":
        parameter = ""
    return f"{match['before']}.{match['what']}{parameter}"

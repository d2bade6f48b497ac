"""From the hidden states of a text to its embedding: as sentence-transformers' files say, else the first token's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from protocol.wire.errors import BadRequest

MODULES = "modules.json"
Mode = Literal["cls", "mean", "max", "lasttoken"]


@dataclass(frozen=True, slots=True)
class Pooling:
    """How one vector is made of a text's hidden states. The defaults are LoRAX's."""

    mode: Mode = "cls"
    unit_length: bool = False

    def apply(self, hidden: Tensor) -> Tensor:
        """Return the embedding of a text, fp32 [D], from its hidden states [T, D]."""
        hidden = hidden.float()
        if self.mode == "mean":
            vector = hidden.mean(0)
        elif self.mode == "max":
            vector = hidden.amax(0)
        else:
            vector = hidden[0 if self.mode == "cls" else -1]
        return F.normalize(vector, dim=0) if self.unit_length else vector


def read_pooling(folder: Path) -> Pooling:
    """Return the pooling that sentence-transformers' files in a folder ask for. Raises BadRequest if not served."""
    if not (folder / MODULES).is_file():
        return Pooling()
    modules = _read(folder / MODULES)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise BadRequest(f"{folder / MODULES} is not a list of modules")
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        shown = ", ".join(kinds)
        raise BadRequest(
            f"{folder / MODULES} has {shown}; what is served is Transformer, Pooling, and perhaps Normalize"
        )
    if modules[0].get("path"):
        raise BadRequest(
            f"{folder / MODULES} has its Transformer in {modules[0]['path']}; it must be in the folder itself"
        )
    settings = folder / "sentence_bert_config.json"
    if settings.is_file() and _object(settings).get("do_lower_case"):
        raise BadRequest(f"{settings}: do_lower_case is not served; tokenizer.json should do it")
    return Pooling(_mode(folder / str(modules[1].get("path")) / "config.json"), unit_length=len(kinds) == 3)


def _mode(path: Path) -> Mode:
    """Return the mode that a pooling config names in `pooling_mode` or switches on by a flag. Raises BadRequest."""
    config = _object(path)
    named = config.get("pooling_mode")
    if named is None:
        flags = [key.removeprefix("pooling_mode_") for key, on in config.items() if "pooling_mode_" in key and on]
        modes = [flag.removesuffix("_token").removesuffix("_tokens") for flag in flags]
    else:
        modes = named if isinstance(named, list) else [named]
    for mode in get_args(Mode):
        if modes == [mode]:
            return mode
    raise BadRequest(f"{path}: pooling by {' and '.join(map(str, modes)) or 'nothing'} is not served")


def _object(path: Path) -> Mapping[str, Any]:
    value = _read(path)
    if not isinstance(value, dict):
        raise BadRequest(f"{path} is not a JSON object")
    return value


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadRequest(f"{path} cannot be read: {error}") from error

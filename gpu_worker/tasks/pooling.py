"""From a text's hidden states to its embedding: by sentence-transformers' files, else the first token's state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from protocol.wire.errors import BadRequest

MODULES = "modules.json"
Mode = Literal["cls", "mean", "max", "lasttoken"]


@dataclass(frozen=True, slots=True)
class Pooling:
    """How a text's hidden states are combined into one vector. The defaults are LoRAX's."""

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


class TextPool:
    """The hidden states of one text computed in chunks, reduced to what its result needs.

    If only one token counts, the last one is stored: the text ends with that token. A preempted text restarts with its
    first token.
    """

    def __init__(self, mode: Mode) -> None:
        self.mode: Mode = mode
        self._kept = torch.empty(0)  # fp32 [D]: one token's state, or the sum or maximum so far
        self._num = 0

    @property
    def needs_all(self) -> bool:
        """Whether every token's hidden state counts, so that cached blocks cannot be used."""
        return self.mode in ("mean", "max")

    def add(self, hidden: Tensor, start: int) -> None:
        """Add the hidden states [n, D] of the tokens from position `start` on."""
        hidden = hidden.float()
        part = hidden.sum(0) if self.mode == "mean" else hidden.amax(0) if self.mode == "max" else hidden[-1].clone()
        if start == 0 or not self.needs_all:
            self._kept, self._num = part, len(hidden)
        else:
            self._kept = self._kept + part if self.mode == "mean" else torch.maximum(self._kept, part)
            self._num += len(hidden)

    @property
    def vector(self) -> Tensor:
        """The pooled vector of all tokens so far, fp32 [D]."""
        return self._kept / self._num if self.mode == "mean" else self._kept


def read_pooling(folder: Path) -> Pooling:
    """Return the pooling in a folder's sentence-transformers files. Raises BadRequest if unsupported."""
    if not (folder / MODULES).is_file():
        return Pooling()
    modules, kinds = _modules(folder), module_kinds(folder)
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


def module_kinds(folder: Path) -> list[str]:
    """Return the classes of a folder's modules, in order. Raises BadRequest for an unreadable list."""
    return [str(module.get("type")).rpartition(".")[2] for module in _modules(folder)]


def module_settings(folder: Path, kind: str) -> Mapping[str, Any]:
    """Return the config of the first module of a class. Raises BadRequest if it cannot be read."""
    path = next(str(module.get("path")) for module in _modules(folder) if str(module.get("type")).endswith(f".{kind}"))
    return _object(folder / path / "config.json")


def _modules(folder: Path) -> list[dict[str, Any]]:
    modules = _read(folder / MODULES)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise BadRequest(f"{folder / MODULES} is not a list of modules")
    return modules


def _mode(path: Path) -> Mode:
    """Return the mode that a pooling config names in `pooling_mode` or enables by a flag. Raises BadRequest."""
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

"""The tensors of a Hub folder under the names of transformers' model, one expert at a time.

Files of a mixture may store experts one by one, where transformers' model has them fused: its conversion mapping, which
PEFT uses as well, says which tensors become which parameter. Fusing all experts of a layer to quantize them would take
as much memory as many layers do afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from protocol.wire.errors import BadRequest


class HubTensors:
    """The tensors in a folder's safetensors."""

    def __init__(self, model: PreTrainedModel, files: Sequence[Path]) -> None:
        """model: on any device; only its names and its config are used."""
        self._where: dict[str, Any] = {}
        for path in files:
            opened: Any = safe_open(path, framework="pt")
            self._where |= dict.fromkeys(opened.keys(), opened)
        transforms = get_model_conversion_mapping(model)
        renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self._keys: dict[str, str] = {}
        self._parts: dict[str, dict[str, list[str]]] = {}
        self._converters: dict[str, WeightConverter] = {}
        wanted, by_pattern = model.state_dict(), {part: one for one in converters for part in one.source_patterns}
        for key in sorted(self._where, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
            if pattern is None:
                self._keys[name] = key
            else:
                self._converters[name] = by_pattern[pattern]
                self._parts.setdefault(name, {}).setdefault(pattern, []).append(key)

    def __contains__(self, name: str) -> bool:
        """Return whether a parameter is in the files, whole or in parts."""
        return name in self._keys or name in self._parts

    def tensor(self, name: str) -> Tensor:
        """Return a parameter. Raises BadRequest for parts that cannot be joined."""
        if name in self._keys:
            key = self._keys[name]
            return self._where[key].get_tensor(key)
        return torch.stack([*self.experts(name)])

    def experts(self, name: str) -> Iterator[Tensor]:
        """Yield the entries of a parameter's first dimension. Raises BadRequest for parts that are no experts."""
        if name in self._keys:
            key = self._keys[name]
            whole = self._where[key].get_slice(key)
            for i in range(whole.get_shape()[0]):
                yield whole[i]
            return
        parts = self._parts_of(name)
        for keys in zip(*parts, strict=True):
            yield torch.cat([self._where[key].get_tensor(key) for key in keys])

    def _parts_of(self, name: str) -> list[list[str]]:
        """Return the keys of a fused parameter: those of all experts, for each part of an expert's rows."""
        converter, found = self._converters[name], self._parts[name]
        kinds = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
        parts = [found.get(pattern, []) for pattern in converter.source_patterns]
        is_merge = kinds[:1] == [(MergeModulelist, 0)] and kinds[1:] in ([], [(Concatenate, 1)])
        if not is_merge or (len(parts) > 1 and len(kinds) == 1):
            steps = ", ".join(kind.__name__ for kind, _ in kinds)
            raise BadRequest(f"{name} is made of other tensors by {steps}, which is not supported with quantization")
        if len({len(keys) for keys in parts}) > 1:
            raise BadRequest(f"the experts of {name} lack some of their tensors")
        return parts

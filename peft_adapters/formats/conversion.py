"""A plan for converting an adapter into PEFT's files: the source of each tensor, and the new config.

Conversion copies numbers but never computes any: every tensor keeps its dtype and bits, perhaps reordered.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from peft_adapters.reasons import Reasons
from peft_adapters.safetensors_header import ITEM_BYTES, TensorInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

PREFIX = "base_model.model."

Order = Literal["same", "transposed", "unpaired"]
"""How a tensor is reordered: not at all; transposed; or with rows of a rotary embedding that pairs neighbors put in the
order of one that pairs halves of a head (undoing llama.cpp's `permute`)."""


@dataclass(frozen=True, slots=True)
class Moved:
    """A tensor of the result."""

    name: str  # PEFT's name
    source: TensorInfo  # its numbers in the source file
    order: Order = "same"
    head_dim: int = 0  # head dimension, if unpaired

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape in PEFT's file."""
        return self.source.shape[::-1] if self.order == "transposed" else self.source.shape

    def numbers(self, file: memoryview) -> NDArray[Any]:
        """Return a copy of the tensor in PEFT's shape, as unsigned integers with the bits of its numbers."""
        import numpy as np  # imported here, since a store that has converted no adapter does not need it

        item = np.uint32 if ITEM_BYTES[self.source.dtype] == 4 else np.uint16
        bits = np.frombuffer(file[self.source.begin : self.source.end], item).reshape(self.source.shape)
        if self.order == "transposed":
            return np.ascontiguousarray(bits.T)
        if self.order == "unpaired":
            heads = bits.reshape(-1, self.head_dim // 2, 2, *bits.shape[1:])
            return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(bits.shape)
        return bits.copy()


@dataclass(frozen=True, slots=True)
class Conversion:
    """A complete adapter to be written."""

    config: dict[str, Any]  # adapter_config.json
    tensors: tuple[Moved, ...]

    def header(self) -> bytes:
        """Return the beginning of the safetensors file, up to the first number."""
        entries: dict[str, Any] = {}
        at = 0
        for tensor in self.tensors:
            num_bytes = tensor.source.end - tensor.source.begin
            shape, at = list(tensor.shape), at + num_bytes
            entries[tensor.name] = {"dtype": tensor.source.dtype, "shape": shape, "data_offsets": [at - num_bytes, at]}
        raw = json.dumps(entries, separators=(",", ":")).encode()
        return len(raw).to_bytes(8, "little") + raw

    @property
    def num_bytes(self) -> int:
        """Size of the safetensors file, in bytes."""
        return len(self.header()) + sum(tensor.source.end - tensor.source.begin for tensor in self.tensors)

    def infos(self) -> dict[str, TensorInfo]:
        """Return the tensors of the safetensors file, like `parse_header` of that file."""
        at, found = len(self.header()), dict[str, TensorInfo]()
        for tensor in self.tensors:
            num_bytes = tensor.source.end - tensor.source.begin
            found[tensor.name] = TensorInfo(tensor.source.dtype, tensor.shape, at, at + num_bytes)
            at += num_bytes
        return found

    def weights(self, file: memoryview) -> Iterator[bytes | memoryview]:
        """Yield the safetensors file in pieces, at most one tensor at a time. file: the whole source file."""
        yield self.header()
        for tensor in self.tensors:
            yield tensor.numbers(file).data.cast("B")


def lora_pairs(names: Mapping[str, TensorInfo], ends: tuple[str, str], reasons: Reasons) -> dict[str, list[TensorInfo]]:
    """Return A and B by module. Adds reasons for tensors without a pair or with other names.

    ends: suffixes of the names of A and B; the rest is the module's name.
    """
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in names.items():
        end = next((end for end in ends if name.endswith(end)), "")
        if not end or len(info.shape) != 2 or not math.prod(info.shape):
            reasons.add(f"tensors that are not a matrix {ends[0]} or {ends[1]}", name)
        else:
            found.setdefault(name.removesuffix(end), {})[end] = info
    for module, own in found.items():
        if len(own) < 2:
            reasons.add("tensors without the other half", module + next(iter(own)))
    return {module: [own[end] for end in ends] for module, own in sorted(found.items()) if len(own) == 2}


def config_of(ranks: Mapping[str, int], alphas: Mapping[str, float], **fields: Any) -> dict[str, Any]:
    """Return a LoRA config for modules with these ranks and `lora_alpha`s.

    The most common rank and alpha are global, the others go into the patterns.
    """
    rank, alpha = _commonest(ranks), _commonest(alphas)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        **fields,
    }
    config["rank_pattern"] = {module: own for module, own in ranks.items() if own != rank}
    config["alpha_pattern"] = {module: own for module, own in alphas.items() if own != alpha}
    return config


def _commonest(values: Mapping[str, Any]) -> Any:
    found = list(values.values())
    return max(dict.fromkeys(found), key=found.count)

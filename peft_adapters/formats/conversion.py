"""The plan of a conversion into PEFT's files: which tensor is made of which part of the source, and the new config.

Numbers are moved, never computed: every tensor keeps its dtype and its bits, in another order.
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
"""How numbers of the source lie in the result: as they are; rows as columns; or rows of a rotary embedding that pairs
neighbours, as rows of one that pairs halves of a head (llama.cpp's `permute`, undone)."""


@dataclass(frozen=True, slots=True)
class Moved:
    """A tensor of the result."""

    name: str  # name in PEFT's format
    source: TensorInfo  # its numbers in the source file
    order: Order = "same"
    head_dim: int = 0  # head size of an unpaired one

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that PEFT gives it."""
        return self.source.shape[::-1] if self.order == "transposed" else self.source.shape

    def numbers(self, file: memoryview) -> NDArray[Any]:
        """Return a copy of its numbers as unsigned integers with their bits, in the shape that PEFT gives it."""
        import numpy as np  # here, since a store that has converted no adapter needs none of it

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
    """A whole adapter as it is to be written."""

    config: dict[str, Any]  # adapter_config.json
    tensors: tuple[Moved, ...]

    def header(self) -> bytes:
        """Return the begin of the safetensors file, up to the first number."""
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
        """The bytes of the safetensors file."""
        return len(self.header()) + sum(tensor.source.end - tensor.source.begin for tensor in self.tensors)

    def infos(self) -> dict[str, TensorInfo]:
        """Return the tensors of the safetensors file, as `parse_header` does of it."""
        at, found = len(self.header()), dict[str, TensorInfo]()
        for tensor in self.tensors:
            num_bytes = tensor.source.end - tensor.source.begin
            found[tensor.name] = TensorInfo(tensor.source.dtype, tensor.shape, at, at + num_bytes)
            at += num_bytes
        return found

    def weights(self, file: memoryview) -> Iterator[bytes | memoryview]:
        """Yield the safetensors file in pieces, at most one tensor at a time. file: the whole source."""
        yield self.header()
        for tensor in self.tensors:
            yield tensor.numbers(file).data.cast("B")


def lora_pairs(names: Mapping[str, TensorInfo], ends: tuple[str, str], reasons: Reasons) -> dict[str, list[TensorInfo]]:
    """Return A and B by the module that a tensor's name begins with. Adds a reason for what has no pair or other names.

    ends: of the names of A and of B.
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
    """Return the config of LoRA on modules with these ranks, and with these `lora_alpha`s.

    The commonest rank and alpha are the config's, the others those of patterns.
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

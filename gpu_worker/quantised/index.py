"""The folder of a base served with quantized weights: an index of the tensors in a memory-mapped file.

The folder has the base's configs and tokenizer, the weights file or a link to it, and the index, with transformers'
tensor names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from lora_kernels.quantised import KINDS, Kind, QuantisedWeight, row_bytes
from protocol.runtime.model_files import QUANTISED_INDEX
from protocol.wire.errors import BadRequest

FORMAT = 2
"""Version of the file format. Part of the names of cached folders, so that no version reads another's."""

ALIGNMENT = 64

NumberKind = Literal["f32", "f16", "bf16"]
DTYPES: dict[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Entry(msgspec.Struct, frozen=True):
    """A tensor in the file."""

    kind: Kind | NumberKind
    shape: tuple[int, ...]  # logical shape
    offset: int  # byte offset
    heads: int = 0  # number of heads whose halves llama.cpp interleaves, to be reordered
    minus_one: bool = False  # whether llama.cpp added 1 to the numbers

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in the file, in bytes."""
        *outer, last = self.shape
        size = row_bytes(self.kind, last) if self.kind in KINDS else last * DTYPES[self.kind].itemsize
        for length in outer:
            size *= length
        return size


class Index(msgspec.Struct, frozen=True):
    """The index of a folder."""

    file: str  # name of the weights file in the folder
    tensors: dict[str, Entry]
    rope_factors: str = ""  # tensor by which rotary frequencies are divided


def write_index(folder: Path, index: Index) -> None:
    """Write a folder's index."""
    (folder / QUANTISED_INDEX).write_bytes(msgspec.json.encode(index))


class MappedWeights:
    """The tensors of a folder, memory-mapped: pages are read on first use, and can be dropped under memory pressure."""

    def __init__(self, folder: Path) -> None:
        """Map the file. Raises BadRequest if file or index cannot be read, or do not match."""
        try:
            self.index = msgspec.json.decode((folder / QUANTISED_INDEX).read_bytes(), type=Index)
            path = folder / self.index.file
            size = path.stat().st_size
            self._bytes = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        except (OSError, msgspec.DecodeError, RuntimeError) as error:
            raise BadRequest(f"the quantised weights in {folder} cannot be read: {error}") from error
        for name, entry in self.index.tensors.items():
            if entry.offset + entry.num_bytes > size:
                raise BadRequest(f"the quantised weights in {folder} are cut: {name} reaches beyond their end")

    def numbers(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a copy of a tensor as numbers of a dtype, dequantized if necessary."""
        entry = self.index.tensors[name]
        if entry.kind in KINDS:
            found = self.blocks(name).dequantise().view(entry.shape)
        else:
            found = _in_order(self._slice(entry).view(DTYPES[entry.kind]).view(entry.shape), entry.heads).float()
        return (found - 1 if entry.minus_one else found).to(dtype, copy=True)

    def blocks(self, name: str) -> QuantisedWeight:
        """Return a tensor [N, K] in blocks; these are the file's own memory unless rows must be reordered."""
        entry = self.index.tensors[name]
        assert entry.kind in KINDS
        rows = self._slice(entry).view(-1, row_bytes(entry.kind, entry.shape[-1]))
        return QuantisedWeight(entry.kind, _in_order(rows, entry.heads), entry.shape[-1])

    def is_quantised(self, name: str) -> bool:
        """Return whether a tensor exists and is quantized."""
        return name in self.index.tensors and self.index.tensors[name].kind in KINDS

    def _slice(self, entry: Entry) -> Tensor:
        return self._bytes[entry.offset : entry.offset + entry.num_bytes]


def _in_order(rows: Tensor, heads: int) -> Tensor:
    """Return rows in transformers' order: a head's first half, then its second; llama.cpp interleaves them."""
    if not heads:
        return rows
    return rows.view(heads, len(rows) // heads // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def is_quantised_folder(folder: Path) -> bool:
    """Return whether a folder holds indexed quantized weights."""
    return (folder / QUANTISED_INDEX).is_file()


def config_fields(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's config.json."""
    return msgspec.json.decode((folder / "config.json").read_bytes())

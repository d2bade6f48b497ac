"""Reads the header of an untrusted GGUF file: bounded, strict, without the gguf library.

The format is that of `docs/gguf.md` in ggml, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

from peft_adapters.reasons import Reasons, show
from peft_adapters.safetensors_header import ITEM_BYTES, MAX_NAME_CHARS, MAX_TENSORS, TensorInfo
from protocol.wire.errors import AdapterRefused

MAGIC = b"GGUF"
MAX_FIELDS = 256
MAX_ITEMS = 4_096
"""Maximum entries of an array field."""
MAX_TEXT_BYTES = 65_536
MAX_DIMENSIONS = 4

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_DTYPES = {0: "F32", 1: "F16", 30: "BF16"}


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a GGUF file."""

    fields: dict[str, Any]
    tensors: dict[str, TensorInfo]  # shapes as in torch: the last dimension is contiguous


def parse_gguf(head: bytes, file_size: int) -> GgufFile:
    """Parse the header of a GGUF file with LoRA. Raises AdapterRefused.

    head: the file's first bytes, which must include the whole header. file_size: in bytes.
    """
    if head[:4] != MAGIC:
        raise AdapterRefused(["the file does not begin as GGUF does"])
    reader = _Reader(head)
    version = reader.number("I")
    if version not in (2, 3):
        raise AdapterRefused([f"GGUF version {version} is not served; only 2 and 3, little-endian, are"])
    num_tensors, num_fields = reader.number("Q"), reader.number("Q")
    if num_tensors > MAX_TENSORS:
        raise AdapterRefused([f"the GGUF file has {num_tensors} tensors; the limit is {MAX_TENSORS}"])
    if num_fields > MAX_FIELDS:
        raise AdapterRefused([f"the GGUF file has {num_fields} fields; an adapter's limit is {MAX_FIELDS}"])
    fields: dict[str, Any] = {}
    for _ in range(num_fields):
        name = reader.text()
        if name in fields:
            raise AdapterRefused([f"the GGUF file has the field {show(name)} twice"])
        fields[name] = reader.value()
    entries = [reader.entry() for _ in range(num_tensors)]
    return GgufFile(fields, _tensors(entries, _begin(reader.at, fields), file_size))


@dataclass(slots=True)
class _Reader:
    """Reads consecutive values. Raises AdapterRefused if the bytes end."""

    head: bytes
    at: int = 4

    def number(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        self._check(size)
        (value,) = struct.unpack_from("<" + code, self.head, self.at)
        self.at += size
        return value

    def text(self) -> str:
        size = self.number("Q")
        if size > MAX_TEXT_BYTES:
            raise AdapterRefused([f"a text in the GGUF header has {size} bytes; the limit is {MAX_TEXT_BYTES}"])
        self._check(size)
        raw = self.head[self.at : self.at + size]
        self.at += size
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise AdapterRefused([f"a text in the GGUF header is not UTF-8: {error}"]) from None

    def value(self) -> Any:
        kind = self.number("I")
        if kind == _TEXT:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise AdapterRefused([f"the GGUF header has a field of the unknown type {kind}"])
        item, size = self.number("I"), self.number("Q")
        if size > MAX_ITEMS:
            raise AdapterRefused([f"a field in the GGUF header has {size} entries; the limit is {MAX_ITEMS}"])
        if item not in _NUMBERS and item != _TEXT:
            raise AdapterRefused([f"the GGUF header has an array of the type {item}, which is not served"])
        return [self.text() if item == _TEXT else self.number(_NUMBERS[item]) for _ in range(size)]

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return a tensor's name, shape, type and offset."""
        name, num = self.text(), self.number("I")
        if not 1 <= num <= MAX_DIMENSIONS:
            raise AdapterRefused([f"tensor {show(name)} has {num} dimensions"])
        shape = tuple(self.number("Q") for _ in range(num))[::-1]
        return name, shape, self.number("I"), self.number("Q")

    def _check(self, size: int) -> None:
        if self.at + size > len(self.head):
            raise AdapterRefused([f"the GGUF header is cut, or larger than {len(self.head)} bytes"])


def _begin(at: int, fields: dict[str, Any]) -> int:
    """Return the offset of the first tensor's numbers."""
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 4_096 or alignment % 8:
        raise AdapterRefused([f"general.alignment {show(alignment)} is not a multiple of 8 from 8 to 4096"])
    return -(-at // alignment) * alignment


def _tensors(entries: list[tuple[str, tuple[int, ...], int, int]], begin: int, size: int) -> dict[str, TensorInfo]:
    """Return a file's tensors by name. begin: offset of the tensor data. size: of the file, in bytes."""
    found: dict[str, TensorInfo] = {}
    reasons = Reasons()
    for name, shape, kind, offset in entries:
        num_bytes = math.prod(shape) * ITEM_BYTES.get(_DTYPES.get(kind, ""), 0)
        if name in found:
            reasons.add("tensors that are there twice", name)
        elif len(name) > MAX_NAME_CHARS:
            reasons.add(f"tensor names of more than {MAX_NAME_CHARS} characters", name)
        elif kind not in _DTYPES:
            reasons.add(f"tensors of GGUF type {kind}: only {', '.join(_DTYPES.values())} are served", name)
        elif begin + offset + num_bytes > size:
            reasons.add("tensors that reach beyond the end of the file", name)
        else:
            found[name] = TensorInfo(_DTYPES[kind], shape, begin + offset, begin + offset + num_bytes)
    taken = 0  # end of the bytes that belong to tensors so far
    for name, info in sorted(found.items(), key=lambda entry: (entry[1].begin, entry[1].end)):
        if info.begin < taken:  # would turn a small file into a large one
            reasons.add("tensors that share bytes with others", name)
        taken = max(taken, info.end)
    if reasons:
        raise AdapterRefused(reasons.render())
    return found

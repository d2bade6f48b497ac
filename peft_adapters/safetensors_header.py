"""Reads the header of an untrusted safetensors file: bounded, strict, without the safetensors library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from peft_adapters.json_values import is_list, is_object, load_json_object
from peft_adapters.reasons import Reasons, show
from protocol.wire.errors import AdapterRefused

MAX_HEADER_BYTES = 4 << 20
"""Maximum header size.

An entry takes 150 bytes: adapters of all of a model's experts, saved per expert, have some 18,000.
"""

MAX_TENSORS = 20_000
MAX_NAME_CHARS = 512
MAX_KEPT_HEADER_BYTES = 256 << 10
NUM_KEPT_HEADERS = 8
"""Number of parsed headers cached, each up to MAX_KEPT_HEADER_BYTES: adapters of one recipe have identical headers."""

FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes per number by safetensors dtype: the dtypes allowed for LoRA's tensors."""

ITEM_BYTES = {**FLOATS, "I64": 8, "I32": 4, "I16": 2, "U8": 1}
"""Bytes per number by dtype.

Integers are indices, which some kinds of adapters save. Other dtypes are not supported.
"""

MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file. Its numbers are bytes [begin, end) of the file."""

    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_header(head: bytes, file_size: int) -> dict[str, TensorInfo]:
    """Parse the header of a safetensors file. Return its tensors by name.

    head: the file's first `8 + MAX_HEADER_BYTES` bytes, or all. file_size: in bytes. The tensors must fill the rest of
    the file without gaps or overlap, have a dtype in ITEM_BYTES and one to MAX_DIMENSIONS dimensions. Raises
    AdapterRefused.
    """
    if len(head) < 8:
        raise AdapterRefused([f"the weights file has {file_size} bytes: too short for a safetensors header"])
    size = int.from_bytes(head[:8], "little")
    if size > MAX_HEADER_BYTES:
        raise AdapterRefused([f"the safetensors header claims {size} bytes; the limit is {MAX_HEADER_BYTES}"])
    if len(head) < 8 + size or file_size < 8 + size:
        raise AdapterRefused([f"the weights file is cut: its header claims {size} bytes, the file has {file_size}"])
    header = load_json_object(bytes(head[8 : 8 + size]), "the safetensors header")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        is_object(metadata) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise AdapterRefused(["the safetensors header's __metadata__ is not a map of strings"])
    if len(header) > MAX_TENSORS:
        raise AdapterRefused([f"the weights file has {len(header)} tensors; the limit is {MAX_TENSORS}"])
    tensors: dict[str, TensorInfo] = {}
    reasons = Reasons()
    for name, entry in header.items():
        problem = _entry_problem(entry)
        if not problem and len(name) > MAX_NAME_CHARS:
            problem = f"tensor names of more than {MAX_NAME_CHARS} characters"
        if problem:
            reasons.add(problem, name)
        else:
            begin, end = entry["data_offsets"]
            tensors[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]), 8 + size + begin, 8 + size + end)
    if reasons:
        raise AdapterRefused(reasons.render())
    _check_layout(tensors, 8 + size, file_size)
    return tensors


def read_header(file: Any) -> Mapping[str, TensorInfo]:
    """Parse the header of a whole safetensors file in memory, like `parse_header`, with a cache.

    file: a buffer of bytes. Raises AdapterRefused.
    """
    with memoryview(file) as view:
        claimed = int.from_bytes(view[:8], "little")
        head = bytes(view[: 8 + min(claimed, MAX_HEADER_BYTES)])
        return (_kept_header if len(head) <= MAX_KEPT_HEADER_BYTES else parse_header)(head, len(view))


@lru_cache(NUM_KEPT_HEADERS)
def _kept_header(head: bytes, file_size: int) -> Mapping[str, TensorInfo]:
    return MappingProxyType(parse_header(head, file_size))


def _entry_problem(entry: Any) -> str:
    """Return the error in a header entry, "" if it is valid."""
    if not is_object(entry) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "header entries must have exactly dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return f"dtype {show(dtype)} is not served (only {', '.join(ITEM_BYTES)})"
    if not _are_sizes(shape) or not 1 <= len(shape) <= MAX_DIMENSIONS:
        return f"shape {show(shape)} is not one of one to {MAX_DIMENSIONS} dimensions"
    if not _are_sizes(offsets) or len(offsets) != 2:
        return f"data_offsets {show(offsets)} are not a begin and an end"
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        return f"shape {show(shape)} of {dtype} does not fill data_offsets {show(offsets)}"
    return ""


def _are_sizes(value: Any) -> bool:
    return is_list(value) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)


def _check_layout(tensors: Mapping[str, TensorInfo], begin: int, file_size: int) -> None:
    """Raise AdapterRefused unless the tensors fill `[begin, file_size)` without gaps or overlap."""
    at = begin
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != at:
            what = "overlaps another tensor" if tensor.begin < at else "leaves a hole before it"
            raise AdapterRefused([f"tensor {show(name)} {what}"])
        at = tensor.end
    if at != file_size:
        raise AdapterRefused([f"the weights file has {file_size} bytes where its header describes {at}"])

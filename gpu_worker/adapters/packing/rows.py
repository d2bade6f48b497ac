"""Packs plain adapters, which have nothing but low-rank rows, into one buffer as the pool holds them.

Pure numpy, because the loader's process has no torch. The buffer holds, for each site with rows in ascending order, A
[rank, in] and then B transposed [rank, out], in the site's dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from peft_adapters.format import AdapterSpec, LoraWeights, read_adapter
from peft_adapters.safetensors_header import MAX_HEADER_BYTES, TensorInfo, parse_header
from protocol.wire.errors import AdapterRefused
from protocol.wire.messages import ServedModel
from protocol.wire.tokens import TokenTable

MAX_RANK = 4096
ALIGN_BYTES = 64

_Item = type[np.uint16] | type[np.uint32]
_ITEMS: dict[str, _Item] = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}
_EXPONENTS = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
"""The exponent's bits, which are all set in infinities and NaN alone."""

_FILE_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class RowSite(msgspec.Struct, frozen=True):
    """A linear layer, as far as packing its rows needs to know it."""

    name: str
    in_features: int
    out_features: int
    dtype: str  # adapters that change a layer of a dtype outside _ITEMS are not plain

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return 4 if self.dtype == "float32" else 2


@dataclass(frozen=True, slots=True)
class Rows:
    """A plain adapter, packed."""

    buffer: Any  # a writable buffer, laid out as the module's docstring says
    ranks: NDArray[np.int32]  # [sites]; 0: the adapter does not change the site
    scales: NDArray[np.float32]  # [sites]
    invocation: tuple[int, ...] = ()  # activated LoRA, see `AdapterSpec`
    tokens: TokenTable | None = None  # of its own tokenizer, if it brings one


def layout(ranks: NDArray[np.int32], sites: Sequence[RowSite]) -> Iterator[tuple[int, int, int, int]]:
    """Yield (site index, begin of A, begin of B, end) for every site with rows: positions in the buffer, in bytes."""
    at = 0
    for index in ranks.nonzero()[0].tolist():
        site, rank = sites[index], int(ranks[index])
        b = at + _padded(rank * site.in_features * site.item_bytes)
        end = b + _padded(rank * site.out_features * site.item_bytes)
        yield index, at, b, end
        at = end


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES


class RowPacker:
    """Packs the plain adapters of one model."""

    def __init__(self, sites: Sequence[RowSite], served: ServedModel) -> None:
        self._sites = sites
        self._served = served
        self._index = {site.name: index for index, site in enumerate(sites)}

    def pack(self, config: Mapping[str, Any], file: bytes | memoryview, allocate: Callable[[int], Any]) -> Rows | None:
        """Pack an adapter into a buffer.

        config: its `adapter_config.json`. file: its weights, a safetensors file. allocate: returns a buffer of as many
        zero bytes as it is asked for; called at most once. Returns None if the adapter is not plain, or if anything is
        wrong with it: `Packer`, which packs any adapter, packs it or says what is wrong.
        """
        try:
            tensors = parse_header(bytes(file[: 8 + MAX_HEADER_BYTES]), len(file))
            spec = read_adapter(config, tensors, self._served)
        except AdapterRefused:
            return None
        if not self._is_plain(spec, tensors):
            return None
        ranks, scales = np.zeros(len(self._sites), np.int32), np.zeros(len(self._sites), np.float32)
        parts: dict[int, LoraWeights] = {}
        for part in spec.sites:
            index = self._index[part.site]
            parts[index], ranks[index], scales[index] = part, part.rank, part.scale
        spans = list(layout(ranks, self._sites))
        buffer = allocate(spans[-1][3])
        for index, a, b, _ in spans:
            site, part = self._sites[index], parts[index]
            for begin, name, transposed in ((a, part.a, False), (b, part.b, True)):
                numbers = _convert(_numbers(file, tensors[name]), tensors[name], site.dtype)
                numbers = numbers.T if transposed else numbers
                np.ndarray(numbers.shape, numbers.dtype, buffer, begin)[...] = numbers
        return Rows(buffer, ranks, scales, spec.invocation) if self._is_finite(buffer, spans) else None

    def _is_finite(self, buffer: Any, spans: Sequence[tuple[int, int, int, int]]) -> bool:
        """Return whether all numbers in a buffer are finite. Neighbours of one dtype are looked at together."""
        for dtype, run in itertools.groupby(spans, lambda span: self._sites[span[0]].dtype):
            same = list(run)
            begin, end = same[0][1], same[-1][3]
            numbers = np.frombuffer(memoryview(buffer)[begin:end], _ITEMS[dtype])
            if (numbers << 1).max() >= _EXPONENTS[dtype] << 1:  # the shift drops the signs
                return False
        return True

    def _is_plain(self, spec: AdapterSpec, tensors: Mapping[str, TensorInfo]) -> bool:
        if spec.embeddings or spec.parameters or spec.replaced or spec.tokens or spec.vocab_size or spec.head:
            return False
        if not spec.sites:
            return False
        if spec.rank > MAX_RANK or len({part.site for part in spec.sites}) < len(spec.sites):
            return False
        return all(
            not (part.bias or part.magnitude or part.singular or part.blocks)
            and tensors[part.b].shape[0] == self._sites[self._index[part.site]].out_features
            and self._sites[self._index[part.site]].dtype in _ITEMS
            for part in spec.sites
        )


def _numbers(file: bytes | memoryview, info: TensorInfo) -> NDArray[Any]:
    """Return a tensor of a safetensors file as unsigned integers with the bits of its numbers."""
    item = _ITEMS[_FILE_DTYPES[info.dtype]]
    count = (info.end - info.begin) // np.dtype(item).itemsize
    return np.frombuffer(file, item, count, info.begin).reshape(info.shape)


def _convert(numbers: NDArray[Any], info: TensorInfo, dtype: str) -> NDArray[Any]:
    """Return numbers, as bits, in another dtype: rounded to nearest even, infinite where they are too large for it."""
    source = _FILE_DTYPES[info.dtype]
    if source == dtype:
        return numbers
    if source == "bfloat16":
        wide = (numbers.astype(np.uint32) << 16).view(np.float32)
    else:
        wide = numbers.view(np.float16).astype(np.float32) if source == "float16" else numbers.view(np.float32)
    if dtype == "bfloat16":
        bits = wide.view(np.uint32)
        # Rounding a NaN could carry into its exponent and make it a number.
        rounded = np.where(np.isfinite(wide), bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (rounded >> 16).astype(np.uint16)
    if dtype == "float32":
        return wide.view(np.uint32)
    with np.errstate(over="ignore"):
        return wide.astype(np.float16).view(np.uint16)

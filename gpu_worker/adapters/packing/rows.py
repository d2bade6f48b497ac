"""Packs plain adapters, which have only low-rank rows, into one buffer in the pool's format.

Pure numpy, because the loader process has no torch. For each site with rows, in ascending order, the buffer holds A
[rank, in], then B transposed [rank, out], in the site's dtype; for fused experts [experts, rank, in] and [experts,
rank, out]. Rows in int8 are followed by one float32 factor per rank row.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from peft_adapters.config_fields import is_alpha
from peft_adapters.format import AdapterSpec, LoraWeights, canonical_config, read_adapter
from peft_adapters.safetensors_header import FLOATS, MAX_KEPT_HEADER_BYTES, TensorInfo, read_header
from peft_adapters.spec import KindRows
from peft_adapters.texts.tokenizer_json import AddedToken
from protocol.wire.errors import AdapterRefused
from protocol.wire.messages import ServedModel

MAX_RANK = 4096
MAX_EXPERT_RANK = 256
"""Kernels have space for this many rank products per pair of token and expert."""

ALIGN_BYTES = 64
NUM_OUTLINES = 8
"""Maximum cached outlines.

Their headers are limited by `read_header`, so that one takes at most some 1 MB. Making an outline takes a third of the
packing time, and most adapters of a fleet were trained with the same config.
"""

PIECE_BYTES = 1 << 20
"""Numbers are converted and checked in pieces of about this size, so that temporaries stay in the CPU caches."""

_Item = type[np.uint16] | type[np.uint32]
_ITEMS: dict[str, _Item] = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}
_EXPONENTS = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
"""Mask of the exponent bits, which are all set in infinities and NaN only."""

_FILE_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WHOLE = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "U8": np.uint8}


class RowSite(msgspec.Struct, frozen=True):
    """The facts of a linear layer, or of one product of fused experts, that packing its rows needs."""

    name: str
    in_features: int
    out_features: int
    dtype: str  # dtype of the rows; int8: see `quantise`. An adapter that changes a layer of another dtype is not plain
    num_experts: int = 0  # 0: a linear layer

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return {"float32": 4, "int8": 1}.get(self.dtype, 2)

    @property
    def num_matrices(self) -> int:
        """The number of A and B pairs that an adapter has here."""
        return self.num_experts or 1


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A packed plain adapter."""

    buffer: Any  # a writable buffer, with the layout in the module's docstring
    ranks: NDArray[np.int32]  # [sites]; 0: the adapter does not change the site
    scales: NDArray[np.float32]  # [sites]
    invocation: tuple[int, ...] = ()  # activated LoRA, see `AdapterSpec`
    added: list[AddedToken] | None = None  # tokens added to the base's tokenizer, if it has its own


class RowLayout:
    """The offsets of sites' rows in a buffer."""

    def __init__(self, sites: Sequence[RowSite]) -> None:
        sizes = [(s.in_features * s.item_bytes, s.out_features * s.item_bytes, 4 * (s.dtype == "int8")) for s in sites]
        matrices = np.array([site.num_matrices for site in sites], np.int64)
        self._bytes = matrices[:, None] * np.array(sizes, np.int64).reshape(-1, 3)  # bytes per rank: A, B, factors

    def spans(self, ranks: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return (site index, begin of A, of B, of factors, end) for every site with rows: int64 [n, 5], in bytes.

        ranks: int32 [sites]. Only int8 rows have factors; for others that span is empty.
        """
        sites = ranks.nonzero()[0]
        sizes = self._bytes[sites] * ranks[sites, None]
        sizes += -sizes % ALIGN_BYTES
        bounds = np.concatenate([[0], sizes.cumsum()])
        return np.stack([sites, bounds[:-1:3], bounds[1::3], bounds[2::3], bounds[3::3]], axis=1)


def quantise(rows: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return rows [n, width] as int8 numbers, and each row's step [n]: its largest magnitude divided by 127.

    The step of a row with a number that is not finite is not finite either.
    """
    steps = np.abs(rows).max(1, initial=0) / np.float32(127)
    with np.errstate(invalid="ignore"):
        numbers = np.rint(rows / np.where(steps > 0, steps, np.float32(1))[:, None])
        return numbers.astype(np.int8), steps


@dataclass(frozen=True, slots=True)
class _Outline:
    """The part of packing that depends only on header and config without alpha; shared by adapters equal in these."""

    tensors: Mapping[str, TensorInfo]  # the header; `read_header` returns one object for equal headers
    ranks: NDArray[np.int32]  # [sites]
    divisors: NDArray[np.float64]  # [sites]; scale = alpha / divisor, see `AdapterConfig.scale`
    parts: dict[int, LoraWeights]  # weights by site
    spans: list[list[int]]  # see `RowLayout.spans`
    invocation: tuple[int, ...]


def _key_of(config: Mapping[str, Any]) -> bytes:
    """Return a hash of all significant fields of a config except alpha."""
    return hashlib.sha256(json.dumps(canonical_config({**config, "lora_alpha": None})).encode()).digest()


class RowPacker:
    """Packs the plain adapters of one model."""

    def __init__(self, sites: Sequence[RowSite], served: ServedModel) -> None:
        self._sites = sites
        self._served = served
        self._layout = RowLayout(sites)
        self._outlines: dict[bytes, _Outline] = {}  # by `_key_of`, oldest first
        self._lock = threading.Lock()
        self._index = {site.name: index for index, site in enumerate(sites)}

    def pack(
        self,
        config: Mapping[str, Any],
        file: bytes | memoryview,
        allocate: Callable[[int], Any],
        release: Callable[[int, int], object] = lambda _begin, _end: None,
    ) -> PackedRows | None:
        """Pack an adapter into a buffer.

        config: its `adapter_config.json`. file: its weights, a safetensors file. allocate: returns a buffer of the
        given number of bytes, with arbitrary content; called at most once. release: called with a span of the file that
        is no longer needed. Returns None if the adapter is not plain or its config or tensor shapes are invalid;
        `Packer`, which handles all adapters, then packs it or reports the error. Raises AdapterRefused for numbers that
        are not finite.
        """
        try:
            tensors = read_header(file)
            outline, scales = self._outline(config, tensors)
        except AdapterRefused:
            return None
        ranks, parts, spans = outline.ranks, outline.parts, outline.spans
        buffer = allocate(spans[-1][-1])
        bad: list[str] = []  # int8 sites' tensors with numbers that are not finite
        for index, *begins, end in spans:
            site, rank = self._sites[index], int(ranks[index])
            shapes = [(site.num_matrices, rank, width) for width in (site.in_features, site.out_features)]
            item = _ITEMS.get(site.dtype, np.int8)
            a, b = (np.ndarray(shape, item, buffer, begin) for shape, begin in zip(shapes, begins, strict=False))
            of_kind = parts[index].of_kind
            if site.num_experts or a.nbytes + b.nbytes < end - begins[0]:  # some bytes are not written below
                np.ndarray(end - begins[0], np.uint8, buffer, begins[0]).fill(0)
            if site.dtype == "int8":
                wide_a, wide_b = (np.zeros(shape, np.uint32) for shape in shapes)
                if of_kind is not None:
                    _write_kind(wide_a, wide_b, of_kind, tensors, file, "float32")
                else:
                    _pack_site(wide_a, wide_b, parts[index], tensors, partial(_copy, file, "float32"))
                (a[0], steps_a), (b[0], steps_b) = (quantise(wide[0].view(np.float32)) for wide in (wide_a, wide_b))
                np.ndarray(rank, np.float32, buffer, begins[2])[:] = steps_a * steps_b
                steps = zip(_labels(parts[index]), (steps_a, steps_b), strict=True)
                bad += [name for name, own in steps if not np.isfinite(own).all()]
            elif of_kind is not None:
                _write_kind(a, b, of_kind, tensors, file, site.dtype)
            else:
                _pack_site(a, b, parts[index], tensors, partial(_copy, file, site.dtype))
            for name in itertools.chain.from_iterable(parts[index].tensors):
                release(tensors[name].begin, tensors[name].end)
        _refuse(bad, "float32")
        self._check_finite(buffer, spans, parts)
        return PackedRows(buffer, ranks, scales, outline.invocation)

    def _outline(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> tuple[_Outline, NDArray[Any]]:
        """Return an adapter's outline, cached if possible, and its scales, float32 [sites].

        Raises AdapterRefused if the adapter is not plain or is invalid.
        """
        alpha: Any = config.get("lora_alpha")
        key = _key_of(config)
        with self._lock:
            outline = self._outlines.get(key)
        if outline is not None and outline.tensors is tensors and is_alpha(alpha):
            return outline, (alpha / outline.divisors).astype(np.float32)
        spec = read_adapter(config, tensors, self._served)
        if not self._is_plain(spec, tensors):
            raise AdapterRefused(["it has more than rows"])
        ranks, scales = np.zeros(len(self._sites), np.int32), np.zeros(len(self._sites))
        divisors, parts = np.ones(len(self._sites)), dict[int, LoraWeights]()
        for part in (*spec.sites, *spec.parameters):
            index = self._index[part.site]
            parts[index], ranks[index], scales[index] = part, _rank_of(part, tensors), part.scale
            divisors[index] = math.sqrt(part.rank) if config.get("use_rslora") else part.rank
        divisors[ranks == 0] = np.inf
        spans: list[list[int]] = self._layout.spans(ranks).tolist()
        outline = _Outline(tensors, ranks, divisors, parts, spans, spec.invocation)
        # An alpha of 0 makes every scale 0, which does not show whether the divisors hold for other alphas.
        can_show = is_alpha(alpha) and alpha != 0 and not config.get("alpha_pattern")
        is_known_again = min(info.begin for info in tensors.values()) <= MAX_KEPT_HEADER_BYTES
        if can_show and is_known_again and np.array_equal(scales, alpha / divisors):
            with self._lock:
                self._outlines[key] = outline
                while len(self._outlines) > NUM_OUTLINES:
                    self._outlines.pop(next(iter(self._outlines)))
        return outline, scales.astype(np.float32)

    def _check_finite(self, buffer: Any, spans: Sequence[Sequence[int]], parts: Mapping[int, LoraWeights]) -> None:
        """Raise AdapterRefused unless all numbers in a buffer are finite; checks adjacent rows of one dtype together.

        Rows in int8 are always finite.
        """
        for dtype, run in itertools.groupby(spans, lambda span: self._sites[span[0]].dtype):
            same = list(run)
            if dtype == "int8" or _is_finite(buffer, same[0][1], same[-1][-1], dtype):
                continue
            halves = [
                (_labels(parts[index])[half], begin, end)
                for index, *bounds, _ in same
                for half, (begin, end) in enumerate(itertools.pairwise(bounds))
            ]
            _refuse([name for name, begin, end in halves if not _is_finite(buffer, begin, end, dtype)], dtype)

    def _is_plain(self, spec: AdapterSpec, tensors: Mapping[str, TensorInfo]) -> bool:
        if (
            spec.idle
            or spec.operations
            or spec.embeddings
            or spec.replaced
            or spec.tokens
            or spec.vocab_size
            or spec.head
        ):
            return False
        parts = [*spec.sites, *spec.parameters]
        if not parts or spec.rank > MAX_RANK or len({part.site for part in parts}) < len(parts):
            return False
        return all(
            (site := self._known(part)) is not None
            and (site.dtype in _ITEMS or site.dtype == "int8")
            and not (part.bias or part.magnitude or part.singular or part.blocks)
            and not (part.of_kind is not None and part.of_kind.rows.needs_weight)
            and self._fits(site, part, tensors)
            for part in parts
        )

    def _fits(self, site: RowSite, part: LoraWeights, tensors: Mapping[str, TensorInfo]) -> bool:
        """Return whether the pool can hold a part's rows: few enough for experts, else as many outputs as the base."""
        if site.num_experts:
            return _rank_of(part, tensors) <= MAX_EXPERT_RANK
        if part.of_kind is not None:
            return part.width == site.out_features
        return tensors[part.b].shape[0] == site.out_features

    def _known(self, part: LoraWeights) -> RowSite | None:
        """Return the site of a part; None for a parameter without rows, such as a router."""
        index = self._index.get(part.site)
        return None if index is None else self._sites[index]


def _refuse(bad: Iterable[str], dtype: str) -> None:
    """Raise AdapterRefused if `bad` names any tensors: they have numbers that are not finite in `dtype`."""
    if names := list(dict.fromkeys(bad)):
        raise AdapterRefused([f"numbers that are not finite in {dtype}: {', '.join(names[:5])}"])


def _is_finite(buffer: Any, begin: int, end: int, dtype: str) -> bool:
    """Return whether all numbers in [begin, end) of a buffer are finite."""
    for at in range(begin, end, PIECE_BYTES):
        numbers = np.frombuffer(memoryview(buffer)[at : min(at + PIECE_BYTES, end)], _ITEMS[dtype])
        if (numbers << 1).max() >= _EXPONENTS[dtype] << 1:  # the shift drops the signs
            return False
    return True


def _rank_of(part: LoraWeights, tensors: Mapping[str, TensorInfo]) -> int:
    """Return the rows of A of a layer or of one expert, summed over all layers that its parameter fuses."""
    return sum(tensors[name].shape[0] for name, _ in part.experts[0]) if part.experts else part.rank


def _labels(part: LoraWeights) -> tuple[str, str]:
    """Return the names under which A and B of a site are reported."""
    return part.tensors[0] if len(part.tensors) == 1 else (part.site, part.site)


def _write_kind(
    a: NDArray[Any],
    b: NDArray[Any],
    of_kind: KindRows,
    tensors: Mapping[str, TensorInfo],
    file: bytes | memoryview,
    dtype: str,
) -> None:
    """Write a layer's rows of a kind other than LoRA, as bits. a: [1, rank, in], b: [1, rank, out]."""
    rows, columns = of_kind.matrices(lambda name: read_numbers(file, tensors[name]))
    for to, numbers in ((a[0], rows), (b[0], columns.T)):
        step = max(1, PIECE_BYTES // max(1, 4 * to.shape[1]))
        for begin in range(0, len(to), step):
            part = np.ascontiguousarray(numbers[begin : begin + step], np.float32)
            to[begin : begin + step] = _convert(part.view(np.uint32), "float32", dtype)


def read_numbers(file: bytes | memoryview, info: TensorInfo) -> NDArray[Any]:
    """Return a tensor of a safetensors file in fp32; integers keep their dtype."""
    if info.dtype not in FLOATS:
        return np.ndarray(info.shape, _WHOLE[info.dtype], file, info.begin)
    return _convert(_numbers(file, info), _FILE_DTYPES[info.dtype], "float32").view(np.float32)


def _pack_site(
    a: NDArray[Any],
    b: NDArray[Any],
    part: LoraWeights,
    tensors: Mapping[str, TensorInfo],
    copy: Callable[[TensorInfo, NDArray[Any]], object],
) -> None:
    """Write the rows of one site. a: [matrices, rank, in]. b: [matrices, rank, out], zero before.

    copy: writes a tensor into an array with the same number of elements, in the same order.
    """
    if not part.experts:
        # PEFT stores A of experts as [E * rank, in], and B as [out, rank * E] with interleaved columns of the experts.
        copy(tensors[part.a], a.reshape(-1, a.shape[-1]))
        copy(tensors[part.b], b.transpose(2, 1, 0))
        return
    for own_a, own_b, layers in zip(a, b, part.experts, strict=True):
        row = column = 0
        for name_a, name_b in layers:  # stacked in A; in B each layer has its own outputs
            rank, width = tensors[name_a].shape[0], tensors[name_b].shape[0]
            copy(tensors[name_a], own_a[row : row + rank])
            copy(tensors[name_b], own_b[row : row + rank, column : column + width].T)
            row, column = row + rank, column + width


def _copy(file: bytes | memoryview, dtype: str, info: TensorInfo, to: NDArray[Any]) -> None:
    """Write a tensor of a safetensors file into an array of `dtype` bits with as many elements, in the same order."""
    numbers = _numbers(file, info).reshape(to.shape)
    if _FILE_DTYPES[info.dtype] == dtype:
        to[:] = numbers
        return
    step = max(1, PIECE_BYTES * len(numbers) // max(1, numbers.nbytes))
    for begin in range(0, len(numbers), step):
        to[begin : begin + step] = _convert(numbers[begin : begin + step], _FILE_DTYPES[info.dtype], dtype)


def _numbers(file: bytes | memoryview, info: TensorInfo) -> NDArray[Any]:
    """Return a tensor of a safetensors file as the bits of its numbers, in unsigned integers."""
    return np.ndarray(info.shape, _ITEMS[_FILE_DTYPES[info.dtype]], file, info.begin)


def _convert(numbers: NDArray[Any], source: str, dtype: str) -> NDArray[Any]:
    """Convert numbers, given and returned as bits: rounded to nearest even, infinite where they overflow."""
    if source == "bfloat16":
        wide = (numbers.astype(np.uint32) << 16).view(np.float32)
    else:
        wide = numbers.view(np.float16).astype(np.float32) if source == "float16" else numbers.view(np.float32)
    if dtype == "bfloat16":
        bits = wide.view(np.uint32)
        # Rounding a NaN could carry into its exponent and turn it into a number.
        rounded = np.where(np.isfinite(wide), bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (rounded >> 16).astype(np.uint16)
    if dtype == "float32":
        return wide.view(np.uint32)
    with np.errstate(over="ignore"):
        return wide.astype(np.float16).view(np.uint16)

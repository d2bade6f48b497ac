"""Packs plain adapters, which have nothing but low-rank rows, into one buffer as the pool holds them.

Pure numpy, because the loader's process has no torch. The buffer holds, for each site with rows in ascending order, A
[rank, in] and then B transposed [rank, out], in the site's dtype; for layers of fused experts [experts, rank, in] and
[experts, rank, out]. Rows in int8 are followed by a float32 factor for each rank row.
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
"""Kernels have room for this many rank products of each pair of token and expert."""

ALIGN_BYTES = 64
NUM_OUTLINES = 8
"""Outlines that are kept, of headers that `read_header` keeps, so that one has some 1 MB at most. Making one takes a
third of packing, and most adapters of a fleet were trained alike."""

PIECE_BYTES = 1 << 20
"""Numbers are converted and checked in pieces of about this size: what that takes besides stays in the cache."""

_Item = type[np.uint16] | type[np.uint32]
_ITEMS: dict[str, _Item] = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}
_EXPONENTS = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
"""The exponent's bits, which are all set in infinities and NaN alone."""

_FILE_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WHOLE = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "U8": np.uint8}


class RowSite(msgspec.Struct, frozen=True):
    """A linear layer, or one product of fused experts, as far as packing its rows needs to know it."""

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
        """How many pairs of A and B an adapter has here."""
        return self.num_experts or 1


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A plain adapter, packed."""

    buffer: Any  # a writable buffer, laid out as the module's docstring says
    ranks: NDArray[np.int32]  # [sites]; 0: the adapter does not change the site
    scales: NDArray[np.float32]  # [sites]
    invocation: tuple[int, ...] = ()  # activated LoRA, see `AdapterSpec`
    added: list[AddedToken] | None = None  # to the base's tokenizer, if it brings that


class RowLayout:
    """Where the rows of sites lie in a buffer."""

    def __init__(self, sites: Sequence[RowSite]) -> None:
        sizes = [(s.in_features * s.item_bytes, s.out_features * s.item_bytes, 4 * (s.dtype == "int8")) for s in sites]
        matrices = np.array([site.num_matrices for site in sites], np.int64)
        self._bytes = matrices[:, None] * np.array(sizes, np.int64).reshape(-1, 3)  # bytes per rank: A, B, factors

    def spans(self, ranks: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return (site index, begin of A, of B, of factors, end) for every site with rows: int64 [n, 5], in bytes.

        ranks: int32 [sites]. There are factors of rows in int8 only: those of others end where they begin.
        """
        sites = ranks.nonzero()[0]
        sizes = self._bytes[sites] * ranks[sites, None]
        sizes += -sizes % ALIGN_BYTES
        bounds = np.concatenate([[0], sizes.cumsum()])
        return np.stack([sites, bounds[:-1:3], bounds[1::3], bounds[2::3], bounds[3::3]], axis=1)


def quantise(rows: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return rows [n, width] as int8 numbers, and the step [n] of each row: its largest number is 127 of them.

    A step is not finite where a number of its row is not.
    """
    steps = np.abs(rows).max(1, initial=0) / np.float32(127)
    with np.errstate(invalid="ignore"):
        numbers = np.rint(rows / np.where(steps > 0, steps, np.float32(1))[:, None])
        return numbers.astype(np.int8), steps


@dataclass(frozen=True, slots=True)
class _Outline:
    """What packing takes of an adapter's config and header: the same for all that differ in numbers and alpha alone."""

    tensors: Mapping[str, TensorInfo]  # the header, which `read_header` gives as one object to all that have the same
    ranks: NDArray[np.int32]  # [sites]
    divisors: NDArray[np.float64]  # [sites]; a scale is alpha by this, see `AdapterConfig.scale`
    parts: dict[int, LoraWeights]  # weights by site
    spans: list[list[int]]  # see `RowLayout.spans`
    invocation: tuple[int, ...]


def _key_of(config: Mapping[str, Any]) -> bytes:
    """Return a hash of all of a config that counts but alpha."""
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

        config: its `adapter_config.json`. file: its weights, a safetensors file. allocate: returns a buffer of as many
        bytes, of any content, as it is asked for; called at most once. release: told of bytes of the file that nobody
        needs again. Returns None if the adapter is not plain, or if anything is wrong with its config or the shapes of
        its tensors: `Packer`, which packs any adapter, packs it or says what is wrong. Raises AdapterRefused for
        numbers that are not finite.
        """
        try:
            tensors = read_header(file)
            outline, scales = self._outline(config, tensors)
        except AdapterRefused:
            return None
        ranks, parts, spans = outline.ranks, outline.parts, outline.spans
        buffer = allocate(spans[-1][-1])
        bad: list[str] = []  # tensors with numbers that are not finite, of those that become int8
        for index, *begins, end in spans:
            site, rank = self._sites[index], int(ranks[index])
            shapes = [(site.num_matrices, rank, width) for width in (site.in_features, site.out_features)]
            item = _ITEMS.get(site.dtype, np.int8)
            a, b = (np.ndarray(shape, item, buffer, begin) for shape, begin in zip(shapes, begins, strict=False))
            of_kind = parts[index].of_kind
            if site.num_experts or a.nbytes + b.nbytes < end - begins[0]:  # with bytes that no number is written to
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
        """Return what an adapter has in common with others that were trained alike, and its scales, float32 [sites].

        Raises AdapterRefused where the adapter is not plain, or anything is wrong with it.
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
        # An alpha of 0 makes every scale 0, so that it does not show whether the divisors are right for other alphas.
        can_show = is_alpha(alpha) and alpha != 0 and not config.get("alpha_pattern")
        is_known_again = min(info.begin for info in tensors.values()) <= MAX_KEPT_HEADER_BYTES
        if can_show and is_known_again and np.array_equal(scales, alpha / divisors):
            with self._lock:
                self._outlines[key] = outline
                while len(self._outlines) > NUM_OUTLINES:
                    self._outlines.pop(next(iter(self._outlines)))
        return outline, scales.astype(np.float32)

    def _check_finite(self, buffer: Any, spans: Sequence[Sequence[int]], parts: Mapping[int, LoraWeights]) -> None:
        """Raise AdapterRefused unless all numbers in a buffer are finite, those of neighbours looked at together.

        Rows in int8 always are.
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
        """Return whether the pool can hold a part's rows: of few enough rank rows, or in the base's vocabulary."""
        if site.num_experts:
            return _rank_of(part, tensors) <= MAX_EXPERT_RANK
        if part.of_kind is not None:
            return part.width == site.out_features
        return tensors[part.b].shape[0] == site.out_features

    def _known(self, part: LoraWeights) -> RowSite | None:
        """Return the site of a part; None for a parameter that has no rows, such as a router."""
        index = self._index.get(part.site)
        return None if index is None else self._sites[index]


def _refuse(bad: Iterable[str], dtype: str) -> None:
    """Raise AdapterRefused if any names of tensors that are not finite in a dtype are given."""
    if names := list(dict.fromkeys(bad)):
        raise AdapterRefused([f"numbers that are not finite in {dtype}: {', '.join(names[:5])}"])


def _is_finite(buffer: Any, begin: int, end: int, dtype: str) -> bool:
    """Return whether all numbers in a part of a buffer are finite."""
    for at in range(begin, end, PIECE_BYTES):
        numbers = np.frombuffer(memoryview(buffer)[at : min(at + PIECE_BYTES, end)], _ITEMS[dtype])
        if (numbers << 1).max() >= _EXPONENTS[dtype] << 1:  # the shift drops the signs
            return False
    return True


def _rank_of(part: LoraWeights, tensors: Mapping[str, TensorInfo]) -> int:
    """Return the rows of A at a layer, or of one expert: those of all layers that its parameter fuses."""
    return sum(tensors[name].shape[0] for name, _ in part.experts[0]) if part.experts else part.rank


def _labels(part: LoraWeights) -> tuple[str, str]:
    """Return by which names A and B of a site are reported."""
    return part.tensors[0] if len(part.tensors) == 1 else (part.site, part.site)


def _write_kind(
    a: NDArray[Any],
    b: NDArray[Any],
    of_kind: KindRows,
    tensors: Mapping[str, TensorInfo],
    file: bytes | memoryview,
    dtype: str,
) -> None:
    """Write the rows that another kind than LoRA has on a layer, as bits: a [1, rank, in], b [1, rank, out]."""
    rows, columns = of_kind.matrices(lambda name: read_numbers(file, tensors[name]))
    for to, numbers in ((a[0], rows), (b[0], columns.T)):
        step = max(1, PIECE_BYTES // max(1, 4 * to.shape[1]))
        for begin in range(0, len(to), step):
            part = np.ascontiguousarray(numbers[begin : begin + step], np.float32)
            to[begin : begin + step] = _convert(part.view(np.uint32), "float32", dtype)


def read_numbers(file: bytes | memoryview, info: TensorInfo) -> NDArray[Any]:
    """Return a tensor of a safetensors file in fp32; whole numbers as they are."""
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
    """Write the rows of one site: a [matrices, rank, in], and b [matrices, rank, out], which is zero.

    copy: writes a tensor into an array that has as many numbers in the same order.
    """
    if not part.experts:
        # PEFT keeps A of experts as [E * rank, in], and B as [out, rank * E], in which the experts' columns alternate.
        copy(tensors[part.a], a.reshape(-1, a.shape[-1]))
        copy(tensors[part.b], b.transpose(2, 1, 0))
        return
    for own_a, own_b, layers in zip(a, b, part.experts, strict=True):
        row = column = 0
        for name_a, name_b in layers:  # beside each other in A; in B each has outputs of its own
            rank, width = tensors[name_a].shape[0], tensors[name_b].shape[0]
            copy(tensors[name_a], own_a[row : row + rank])
            copy(tensors[name_b], own_b[row : row + rank, column : column + width].T)
            row, column = row + rank, column + width


def _copy(file: bytes | memoryview, dtype: str, info: TensorInfo, to: NDArray[Any]) -> None:
    """Write a tensor of a safetensors file, in another dtype, into an array with as many numbers in the same order."""
    numbers = _numbers(file, info).reshape(to.shape)
    if _FILE_DTYPES[info.dtype] == dtype:
        to[:] = numbers
        return
    step = max(1, PIECE_BYTES * len(numbers) // max(1, numbers.nbytes))
    for begin in range(0, len(numbers), step):
        to[begin : begin + step] = _convert(numbers[begin : begin + step], _FILE_DTYPES[info.dtype], dtype)


def _numbers(file: bytes | memoryview, info: TensorInfo) -> NDArray[Any]:
    """Return a tensor of a safetensors file as unsigned integers with the bits of its numbers."""
    return np.ndarray(info.shape, _ITEMS[_FILE_DTYPES[info.dtype]], file, info.begin)


def _convert(numbers: NDArray[Any], source: str, dtype: str) -> NDArray[Any]:
    """Return numbers, as bits, in another dtype: rounded to nearest even, infinite where they are too large for it."""
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

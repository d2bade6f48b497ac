"""Packs an adapter's files for the pool: low-rank rows in the pool's dtype, and extras."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_worker.adapters.packing.expert_rows import ExpertRows, expert_sites, pack_experts, pages_by_shape
from gpu_worker.adapters.packing.extras_packer import GetTensor, matrices_of, pack_extras
from gpu_worker.adapters.packing.rows import MAX_RANK, PackedRows, RowLayout, RowSite, quantise
from gpu_worker.layers.adaptable_modules import AdaptableModules
from gpu_worker.layers.expert_modules import ExpertSite
from gpu_worker.layers.extras import Extras, tensors_of
from gpu_worker.layers.lora import GROUPS, SiteInfo
from lora_kernels.ops import PAGE_ROWS
from peft_adapters.effect import check_idle
from peft_adapters.format import AdapterSpec, read_adapter
from peft_adapters.safetensors_header import TensorInfo, read_header
from protocol.wire.errors import AdapterRefused
from protocol.wire.messages import ServedModel
from protocol.wire.tokens import TokenTable

EXTRA_PAGE_BYTES = 1 << 16
"""Extras are accounted in pages of this size; they are not stored in pages."""

_WHOLE_WEIGHTS = threading.Semaphore(2)
"""Maximum adapters packed at once that compute with whole weights of the base, as DoRA does: each needs several times
the memory of the base's largest layer."""

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class LinearRows:
    """An adapter's rows for linear layers, in the pool's dtypes, in the layout of `packing.rows`."""

    buffer: Tensor  # uint8 [bytes]
    spans: np.ndarray  # int64 [n, 5], see `RowLayout.spans`; linear layers only

    @classmethod
    def of(cls, sites: Sequence[RowSite], ranks: np.ndarray, rows: Mapping[int, Sequence[Tensor]]) -> LinearRows:
        """Copy rows into a buffer.

        ranks: int32 [sites]. rows: by site, A [rank, K], B transposed [rank, N] and, for int8, factors [rank].
        """
        spans = RowLayout(sites).spans(ranks)
        buffer = torch.zeros(int(spans[-1, -1]) if len(spans) else 0, dtype=torch.uint8)
        for index, *begins, _ in spans.tolist():
            for part, begin in zip(rows[index], begins, strict=False):
                buffer[begin : begin + part.nbytes].view(part.dtype).view(part.shape).copy_(part)
        return cls(buffer, spans)

    def parts(self, sites: Sequence[RowSite], ranks: np.ndarray) -> list[tuple[int, Tensor, Tensor, Tensor]]:
        """Return (site, A [rank, K], B transposed [rank, N], factors [rank]) of each site with rows.

        Factors are empty except for int8. sites, ranks: as in `of`. The tensors are views of the buffer.
        """
        found: list[tuple[int, Tensor, Tensor, Tensor]] = []
        for index, *bounds in self.spans.tolist():
            site, rank = sites[index], int(ranks[index])
            dtype: torch.dtype = getattr(torch, site.dtype)
            a, b, factors = (self.buffer[begin:end] for begin, end in itertools.pairwise(bounds))
            a = a.view(dtype)[: rank * site.in_features].view(rank, -1)
            b = b.view(dtype)[: rank * site.out_features].view(rank, -1)
            found.append((index, a, b, factors.view(torch.float32)[:rank]))
        return found


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter in host memory: its rows for linear layers, those for experts, and its extras."""

    digest: str
    ranks: np.ndarray  # int32 [sites]; 0: the adapter does not change the site
    scales: np.ndarray  # float32 [sites]
    rows: LinearRows
    num_pages: tuple[int, ...]  # by pool group, then by shape of experts, extras last
    num_bytes: int
    extras: Extras = field(default_factory=Extras)
    experts: tuple[ExpertRows, ...] = ()
    invocation: tuple[int, ...] = ()  # activated LoRA, see `AdapterSpec`
    tokens: TokenTable | None = None  # the base's tokens and the added ones, if it has a tokenizer


@dataclass(frozen=True)
class Packer:
    """Packs adapters for one model."""

    sites: Sequence[SiteInfo]
    served: ServedModel
    adaptable: AdaptableModules
    int8: bool = False  # whether the pool holds rows of linear layers in int8

    @cached_property
    def row_sites(self) -> list[RowSite]:
        """All sites for rows, linear layers first, as `RowPacker` expects."""
        return row_sites(self.sites, self.expert_sites, int8=self.int8)

    @cached_property
    def layout(self) -> RowLayout:
        """The offsets of all these sites' rows in a buffer."""
        return RowLayout(self.row_sites)

    @cached_property
    def expert_sites(self) -> list[ExpertSite]:
        """The sites for LoRA on experts whose rows are in the pool."""
        return expert_sites(self.adaptable.experts)

    def pack(self, digest: str, config: dict[str, Any], weights: Any) -> HostAdapter:
        """Read and pack a PEFT adapter. weights: a safetensors file as a buffer. Raises AdapterRefused."""
        return self.pack_spec(digest, *self.read(config, weights))

    def read(self, config: dict[str, Any], weights: Any) -> tuple[AdapterSpec, GetTensor]:
        """Read a PEFT adapter without packing it. weights: a safetensors file as a buffer. Raises AdapterRefused."""
        view = memoryview(weights)
        tensors = read_header(view)
        spec = read_adapter(config, tensors, self.served)
        check_idle(spec, tensors, view)
        # A tensor is writable, so that read-only memory must be copied. The loader's memory is writable.
        file = torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)
        return spec, lambda name: _read(file, tensors[name])

    def wrap(self, digest: str, packed: PackedRows) -> HostAdapter:
        """Return an adapter whose rows are already packed, without copying them."""
        memory, num_linear = torch.frombuffer(packed.buffer, dtype=torch.uint8), len(self.sites)
        spans = self.layout.spans(packed.ranks)
        is_linear = spans[:, 0] < num_linear
        experts: list[ExpertRows] = []
        for index, begin_a, begin_b, end, _ in spans[~is_linear].tolist():
            site, rank = self.row_sites[index], int(packed.ranks[index])
            parts = ((begin_a, begin_b, site.in_features), (begin_b, end, site.out_features))
            a, b = (
                memory[begin:to]
                .view(getattr(torch, site.dtype))[: site.num_experts * rank * width]
                .view(site.num_experts, rank, width)
                for begin, to, width in parts
            )
            experts.append(ExpertRows(index - num_linear, a, b, float(packed.scales[index])))
        ranks, scales = packed.ranks[:num_linear], packed.scales[:num_linear]
        num_pages = (*self._row_pages(ranks), *pages_by_shape(experts, self.expert_sites), 0)
        return HostAdapter(
            digest,
            ranks,
            scales,
            LinearRows(memory, spans[is_linear]),
            num_pages,
            memory.nbytes,
            experts=tuple(experts),
            invocation=packed.invocation,
        )

    def pack_spec(self, digest: str, spec: AdapterSpec, get: GetTensor) -> HostAdapter:
        """Pack an adapter's tensors. get: returns a tensor of the spec by name. Raises AdapterRefused."""
        if spec.rank > MAX_RANK:
            raise AdapterRefused([f"rank {spec.rank} is over this worker's limit of {MAX_RANK}"])
        by_name = {site.name: site for site in self.sites}
        ranks, scales = np.zeros(len(self.sites), np.int32), np.zeros(len(self.sites), np.float32)
        rows: list[tuple[int, Tensor, Tensor]] = []
        names: list[str] = []
        needs_weights = any(part.needs_weight for part in (*spec.sites, *spec.embeddings))
        with _WHOLE_WEIGHTS if needs_weights else nullcontext(), torch.inference_mode():
            experts, others = pack_experts(spec.parameters, get, self.adaptable.experts)
            extras = pack_extras(replace(spec, parameters=tuple(others)), get, by_name, self.adaptable, int8=self.int8)
            for part in spec.sites:
                site = by_name[part.site]
                own = extras.linear.get(site.index)
                if own is not None and own.lora is not None:
                    continue  # the pool cannot hold its rows
                a, b = matrices_of(part, get, self.adaptable)
                dtype = torch.float32 if self.int8 else site.dtype
                rows.append((site.index, a.to(dtype), b.T.to(dtype).contiguous()))
                names += part.tensors[0] if part.tensors else (part.site, part.site)
                ranks[site.index], scales[site.index] = part.rank, part.scale
        _check_finite(rows, names, experts, extras)
        parts = {index: _quantised(a, b) if self.int8 else (a, b) for index, a, b in rows}
        linear = LinearRows.of(self.row_sites[: len(self.sites)], ranks, parts)
        extra_bytes = extras.num_bytes
        expert_pages = pages_by_shape(experts, self.expert_sites)
        num_pages = (*self._row_pages(ranks), *expert_pages, -(-extra_bytes // EXTRA_PAGE_BYTES))
        num_bytes = linear.buffer.nbytes + extra_bytes
        num_bytes += sum(part.a.nbytes + part.b.nbytes for part in experts)
        return HostAdapter(
            digest,
            ranks,
            scales,
            linear,
            num_pages,
            num_bytes,
            extras,
            tuple(experts),
            invocation=spec.invocation,
        )

    def _row_pages(self, ranks: np.ndarray) -> list[int]:
        """Return the pages that rows take in each group, enough for its largest rank. ranks: int32 [sites]."""
        group_ranks = [0] * len(GROUPS)
        for index in ranks.nonzero()[0].tolist():
            group = self.sites[index].group
            group_ranks[group] = max(group_ranks[group], int(ranks[index]))
        return [-(-rank // PAGE_ROWS) for rank in group_ranks]


def row_sites(sites: Sequence[SiteInfo], experts: Sequence[ExpertSite] = (), *, int8: bool = False) -> list[RowSite]:
    """Return a model's sites for rows, as `RowPacker` expects: linear layers, then products of experts.

    int8: whether the pool holds rows of linear layers in int8.
    """
    linear = [RowSite(s.name, s.in_features, s.out_features, "int8" if int8 else name_of(s.dtype)) for s in sites]
    shapes = [(site.name, site.shape) for site in experts]
    grouped = [RowSite(n, s.in_features, s.out_features, name_of(s.dtype), s.num_experts) for n, s in shapes]
    return [*linear, *grouped]


def _quantised(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return A and B of a site in int8, and their factors, float32 [rank]. a, b: fp32."""
    (numbers_a, steps_a), (numbers_b, steps_b) = quantise(a.numpy()), quantise(b.numpy())
    return torch.from_numpy(numbers_a), torch.from_numpy(numbers_b), torch.from_numpy(steps_a * steps_b)


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name without the prefix "torch."."""
    return str(dtype).removeprefix("torch.")


def _read(file: Tensor, info: TensorInfo) -> Tensor:
    """Return one tensor of a file (uint8 [bytes])."""
    part = file[info.begin : info.end]
    if info.begin % _DTYPES[info.dtype].itemsize:
        part = part.clone()  # a view must be aligned
    return part.view(_DTYPES[info.dtype]).view(info.shape)


def _check_finite(
    rows: Sequence[tuple[int, Tensor, Tensor]], names: Sequence[str], experts: Sequence[ExpertRows], extras: Extras
) -> None:
    """Raise AdapterRefused if a number is not finite in the pool's dtype. names: of the rows' tensors."""
    # On bf16, isfinite is twenty times slower than aminmax, whose results also show NaN and infinity.
    tensors = [tensor for _, a, b in rows for tensor in (a, b)]
    others = [*tensors_of(extras), *(tensor for part in experts for tensor in (part.a, part.b))]
    extremes = [torch.stack(torch.aminmax(tensor)).float() for tensor in (*tensors, *others) if tensor.numel()]
    if not extremes:
        return
    bad = ~torch.isfinite(torch.stack(extremes)).all(-1)
    if bad.any():
        labels = [*names, *["what it changes besides"] * len(others)]
        found = dict.fromkeys(labels[i] for i in bad.nonzero()[:, 0].tolist())
        dtype = rows[0][1].dtype if rows else torch.float32
        raise AdapterRefused([f"numbers that are not finite in {dtype}: {', '.join(list(found)[:5])}"])

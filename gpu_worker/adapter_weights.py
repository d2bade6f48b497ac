"""Adapter weights in host memory, packed as the pool wants them, and the pool's tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_worker.lora import GROUPS, SharedInput, SiteInfo
from gpu_worker.memory import zeros
from gpu_worker.pool import PagePool
from lora_kernels.ops import PAGE_ROWS, AdapterTable, LoraSite
from protocol.errors import AdapterRefused, BadRequest
from protocol.messages import ServedModel
from protocol.peft_format import AdapterSpec, parse_header, read_adapter
from protocol.safetensors_header import MAX_HEADER_BYTES, TensorInfo

OTHER_SHARE = 0.05
"""Part of the pool for adapters of the head: few have any, and its pages are large."""

MAX_SLOTS = 4096
MAX_RANK = 4096

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter in host memory: the rows to copy, in the pool's dtype."""

    digest: str
    ranks: np.ndarray  # int32 [sites]; 0: not touched
    scales: np.ndarray  # float32 [sites]
    rows: list[tuple[int, Tensor, Tensor]]  # (site, A [rank, K], B transposed [rank, N])
    num_pages: tuple[int, ...]  # by group
    num_bytes: int


def pack_adapter(
    digest: str, config: dict[str, Any], weights: Any, sites: Sequence[SiteInfo], served: ServedModel, *, pin: bool
) -> HostAdapter:
    """Read a PEFT adapter for the model's sites. weights: a safetensors file as a buffer. Raises AdapterRefused.

    pin: keep the rows in page-locked memory, from which a GPU copies beside its computing.
    """
    view = memoryview(weights)
    tensors = parse_header(bytes(view[: 8 + MAX_HEADER_BYTES]), len(view))
    spec = read_adapter(config, tensors, served)
    if spec.rank > MAX_RANK:
        raise AdapterRefused([f"rank {spec.rank} is over this worker's limit of {MAX_RANK}"])
    by_name = {site.name: site for site in sites}
    ranks, scales = np.zeros(len(sites), np.int32), np.zeros(len(sites), np.float32)
    group_ranks = [0] * len(GROUPS)
    rows: list[tuple[int, Tensor, Tensor]] = []
    file = torch.frombuffer(bytearray(view), dtype=torch.uint8)
    for part in spec.sites:
        site = by_name[part.site]
        a = _tensor(file, tensors[part.a], site.dtype)
        b = _tensor(file, tensors[part.b], site.dtype)
        rows.append((site.index, a, b.T.contiguous()))
        ranks[site.index], scales[site.index] = part.rank, part.scale
        group_ranks[site.group] = max(group_ranks[site.group], part.rank)
    _check_finite(spec, rows)
    if pin:
        rows = [(index, a.pin_memory(), b.pin_memory()) for index, a, b in rows]
    num_bytes = sum(a.nbytes + b.nbytes for _, a, b in rows)
    num_pages = tuple(-(-rank // PAGE_ROWS) for rank in group_ranks)
    return HostAdapter(digest, ranks, scales, rows, num_pages, num_bytes)


def _tensor(file: Tensor, info: TensorInfo, dtype: torch.dtype) -> Tensor:
    """Return one tensor of a file (uint8 [bytes]), converted."""
    part = file[info.begin : info.end]
    if info.begin % _DTYPES[info.dtype].itemsize:
        part = part.clone()  # a view needs aligned numbers
    return part.view(_DTYPES[info.dtype]).view(info.shape).to(dtype)


def _check_finite(spec: AdapterSpec, rows: Sequence[tuple[int, Tensor, Tensor]]) -> None:
    """Raise AdapterRefused when a number is not finite in the pool's dtype."""
    # isfinite is twenty times slower on bf16 than this, which NaN and infinity pass through as well.
    extremes = [torch.stack(torch.aminmax(tensor)).float() for _, a, b in rows for tensor in (a, b)]
    bad = ~torch.isfinite(torch.stack(extremes)).all(-1)
    if bad.any():
        names = [name for part in spec.sites for name in (part.a, part.b)]
        found = [names[i] for i in bad.nonzero()[:, 0].tolist()]
        raise AdapterRefused([f"numbers that are not finite in {rows[0][1].dtype}: {', '.join(found[:5])}"])


class PoolWeights:
    """The pool's tensors: rank rows of every site, and the table by which kernels find them."""

    def __init__(self, sites: Sequence[SiteInfo], shared: Sequence[SharedInput], budget: int, device: Any) -> None:
        self.sites = sites
        self.page_bytes = [_page_bytes(sites, group) for group in range(len(GROUPS))]
        self.capacity = split_budget(self.page_bytes, budget)
        self.num_slots = max(1, min(sum(self.capacity), MAX_SLOTS))
        max_pages = max(1, min(max(self.capacity), MAX_RANK // PAGE_ROWS))
        self._device = torch.device(device)
        self.table = _empty_table(self.num_slots, len(sites), max_pages, self._device)
        if self._device.type != "cpu":
            self.table.host = _empty_table(self.num_slots, len(sites), max_pages, torch.device("cpu"))
        self.lora_sites = [self._lora_site(site) for site in sites]
        first = 0
        for inputs in shared:
            inputs.lora_sites = self.lora_sites[first : first + inputs.num_siblings]
            inputs.table = self.table
            first += inputs.num_siblings
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def _lora_site(self, site: SiteInfo) -> LoraSite:
        num_rows = self.capacity[site.group] * PAGE_ROWS
        # Zeros, not garbage: a kernel may read the unused rows of a page and multiply them by zero.
        a = zeros((num_rows, site.in_features), site.dtype, self._device)
        b = zeros((num_rows, site.out_features), site.dtype, self._device)
        return LoraSite(site.index, site.group, a, b)

    def new_pool(self) -> PagePool:
        """Return the bookkeeping of these tensors' pages and slots."""
        return PagePool(self.capacity, self.page_bytes, self.num_slots)

    def copy_rows(self, adapter: HostAdapter, pages: Sequence[Sequence[int]]) -> None:
        """Write an adapter's rows into pages that no step sees. For a loader thread: returns when they have arrived."""
        if self._stream is not None:
            # The pages may have been another adapter's until now: steps that were launched may still read them.
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            with torch.cuda.stream(self._stream):
                self._copy_rows(adapter, pages)
            self._stream.synchronize()
        else:
            self._copy_rows(adapter, pages)

    def _copy_rows(self, adapter: HostAdapter, pages: Sequence[Sequence[int]]) -> None:
        for index, a, b in adapter.rows:
            site = self.lora_sites[index]
            for i, page in enumerate(pages[site.group]):
                first, last = i * PAGE_ROWS, min((i + 1) * PAGE_ROWS, len(a))
                if first >= last:
                    break
                at = slice(page * PAGE_ROWS, page * PAGE_ROWS + last - first)
                site.a_rows[at].copy_(a[first:last], non_blocking=True)
                site.b_rows[at].copy_(b[first:last], non_blocking=True)

    def publish(self, slot: int, adapter: HostAdapter, pages: Sequence[Sequence[int]]) -> None:
        """Enter an adapter whose rows have arrived into the table. Called between steps."""
        for table in (self.table, self.table.host):
            if table is None:
                continue
            table.ranks[slot] = torch.from_numpy(adapter.ranks).to(table.ranks.device)
            table.scales[slot] = torch.from_numpy(adapter.scales).to(table.scales.device)
            for group, group_pages in enumerate(pages):
                table.pages[slot, group, : len(group_pages)] = torch.tensor(group_pages, dtype=torch.int32)


def split_budget(page_bytes: Sequence[int], budget: int) -> list[int]:
    """Return the pages of each group that fit a budget in bytes: as many for attention as for MLP, a few for others.

    Raises BadRequest when not even one page each fits.
    """
    attention, mlp, other = page_bytes
    num_other = min(math.ceil(OTHER_SHARE * budget / other), budget // other) if other else 0
    left = budget - num_other * other
    num = left // (attention + mlp) if attention + mlp else 0
    num_other = min(num_other, num) if attention + mlp else num_other
    if num == 0 and num_other == 0:
        needed = sum(page_bytes) / (1 << 20)
        raise BadRequest(f"adapter_pool_bytes is {budget}: adapters of this model need {needed:.1f} MiB at least")
    return [num if attention else 0, num if mlp else 0, num_other]


def _page_bytes(sites: Sequence[SiteInfo], group: int) -> int:
    widths = sum((s.in_features + s.out_features) * s.dtype.itemsize for s in sites if s.group == group)
    return PAGE_ROWS * widths


def _empty_table(num_slots: int, num_sites: int, max_pages: int, device: torch.device) -> AdapterTable:
    return AdapterTable(
        ranks=torch.zeros(num_slots, num_sites, dtype=torch.int32, device=device),
        scales=torch.zeros(num_slots, num_sites, dtype=torch.float32, device=device),
        pages=torch.zeros(num_slots, len(GROUPS), max_pages, dtype=torch.int32, device=device),
    )

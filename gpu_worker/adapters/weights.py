"""The adapter pool's tensors: rank rows of every site, and the table through which kernels find them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_worker.adapters.copy_stream import CopyStream
from gpu_worker.adapters.expert_pool import ExpertPool
from gpu_worker.adapters.packing.expert_rows import expert_sites
from gpu_worker.adapters.packing.packer import EXTRA_PAGE_BYTES, MAX_RANK, HostAdapter
from gpu_worker.adapters.pool import PagePool
from gpu_worker.layers.adaptable_modules import AdaptableModules
from gpu_worker.layers.extras import Extras, map_tensors, tensors_of
from gpu_worker.layers.lora import GROUPS, SharedInput, SiteInfo
from gpu_worker.memory import MemoryAhead, send, zeros
from lora_kernels import ops
from lora_kernels.ops import PAGE_ROWS, AdapterTable, LoraSite
from protocol.wire.errors import BadRequest

OTHER_SHARE = 0.05
"""Share of the pool for adapters of the head: few adapters change it, and its pages are large."""

MAX_SLOTS = 4096


class PoolWeights:
    """The pool's tensors on one device. `PagePool` assigns pages and slots."""

    def __init__(
        self,
        sites: Sequence[SiteInfo],
        shared: Sequence[SharedInput],
        budget: int,
        device: Any,
        extra_bytes: int = 0,
        stream: CopyStream | None = None,
        adaptable: AdaptableModules | None = None,
        *,
        int8: bool = False,
    ) -> None:
        """Allocate the rows, and connect the siblings of `shared` and the experts of `adaptable` to them.

        budget: bytes for the rows. extra_bytes: for rows of experts, if any, and for extras, which are allocated as
        adapters bring them. stream: for copies; None: a new one on a CUDA device, none elsewhere. int8: hold the rows
        of linear layers in int8. Raises BadRequest if the budget is too small.
        """
        self.sites = sites
        self._int8 = int8
        self.page_bytes = [page_bytes(sites, group, int8=int8) for group in range(len(GROUPS))]
        self.capacity = split_budget(self.page_bytes, budget)
        self.num_slots = max(1, min(sum(self.capacity), MAX_SLOTS))
        max_pages = max(1, min(max(self.capacity), MAX_RANK // PAGE_ROWS))
        self._device = torch.device(device)
        grouped = expert_sites({} if adaptable is None else adaptable.experts)
        self.experts = ExpertPool(grouped, extra_bytes, self.num_slots, self._device)
        self.extra_bytes = extra_bytes - self.experts.num_bytes
        if adaptable is not None:
            adaptable.context.expert_slots = self.experts.slots_with_rows
        self.table = _empty_table(self.num_slots, len(sites), max_pages, self._device)
        if self._device.type != "cpu":
            self.table.host = _empty_table(self.num_slots, len(sites), max_pages, torch.device("cpu"))
        self.lora_sites = [self._lora_site(site) for site in sites]
        self._tensors = _tensors_of(self.lora_sites)
        row_bytes = [tensor.stride(0) * tensor.itemsize for tensor in self._tensors]
        self._row_bytes = np.array(row_bytes, np.int64).reshape(-1, 3 if int8 else 2)
        self._groups = np.array([site.group for site in sites], np.int64)
        by_group = [[site for site in self.lora_sites if site.group == group] for group in range(len(GROUPS))]
        self.ahead = [MemoryAhead(_tensors_of(own), PAGE_ROWS) for own in by_group]
        first = 0
        for inputs in shared:
            inputs.lora_sites = self.lora_sites[first : first + inputs.num_siblings]
            inputs.table = self.table
            first += inputs.num_siblings
        self._stream = CopyStream(self._device) if stream is None and self._device.type == "cuda" else stream

    def _lora_site(self, site: SiteInfo) -> LoraSite:
        num_rows = self.capacity[site.group] * PAGE_ROWS
        # Zeros, because a kernel may read a page's unused rows and multiply them by zero.
        dtype = torch.int8 if self._int8 else site.dtype
        a = zeros((num_rows, site.in_features), dtype, self._device)
        b = zeros((num_rows, site.out_features), dtype, self._device)
        factors = zeros((num_rows,), torch.float32, self._device) if self._int8 else None
        return LoraSite(site.index, site.group, a, b, factors)

    def new_pool(self) -> PagePool:
        """Return a `PagePool` for these tensors, with all pages and slots free."""
        capacity = [*self.capacity, *self.experts.capacity, self.extra_bytes // EXTRA_PAGE_BYTES]
        sizes = [*self.page_bytes, *self.experts.page_bytes, EXTRA_PAGE_BYTES]
        return PagePool(capacity, sizes, self.num_slots)

    def copy(self, adapter: HostAdapter, pages: Sequence[Sequence[int]]) -> Extras:
        """Write an adapter's rows into pages that no step uses, and return its extras on the device.

        pages: by group. For a loader thread: returns when the copies have ended.
        """
        pieces = self._pieces(adapter, pages)
        if self._stream is None:
            ops.copy_rows_(self._tensors, adapter.rows.buffer, pieces)
            self.experts.copy(adapter.experts, pages[len(GROUPS) : -1], Tensor.copy_)
            return adapter.extras
        # First allocate, then wait: launched steps may still read the allocated memory, which may have just been freed,
        # and the pages, which were another adapter's.
        extras = map_tensors(adapter.extras, self._stream.allocate_like)
        self._stream.wait_for_steps()
        with self._stream.use():
            for target, source in ops.row_pieces(self._tensors, adapter.rows.buffer, pieces):
                self._stream.copy_(target, source)
            self.experts.copy(adapter.experts, pages[len(GROUPS) : -1], self._stream.copy_)
            for target, source in zip(tensors_of(extras), tensors_of(adapter.extras), strict=True):
                self._stream.copy_(target, source.contiguous())
        self._stream.synchronize()
        return extras

    def _pieces(self, adapter: HostAdapter, pages: Sequence[Sequence[int]]) -> Tensor:
        """Return the copies of an adapter's rows to its pages, in the form of `ops.copy_rows_`: int64 [n, 4].

        Rows for adjacent pages are one piece.
        """
        sites, *begins = adapter.rows.spans[:, :4].T
        ranks, groups = adapter.ranks[sites], self._groups[sites]
        found: list[np.ndarray] = []
        for group, own in enumerate(pages[: len(GROUPS)]):
            for first, page, num_pages in page_runs(own):
                counts = np.clip(ranks - first * PAGE_ROWS, 0, num_pages * PAGE_ROWS)  # rows of each site
                mine = ((groups == group) & (counts > 0)).nonzero()[0]
                for part, row_bytes in enumerate(self._row_bytes[sites[mine]].T):
                    pools = self._row_bytes.shape[1] * sites[mine] + part
                    at = begins[part][mine] + first * PAGE_ROWS * row_bytes
                    found.append(np.stack([pools, np.full(len(mine), page * PAGE_ROWS), counts[mine], at], axis=1))
        return torch.from_numpy(np.concatenate(found) if found else np.zeros((0, 4), np.int64))

    def publish(self, slot: int, adapter: HostAdapter, pages: Sequence[Sequence[int]]) -> None:
        """Enter a loaded adapter into the table. Called between steps. pages: by group."""
        for table in (self.table, self.table.host):
            if table is None:
                continue
            device = table.ranks.device  # asynchronous: a step may be running on the device
            table.ranks[slot] = send(adapter.ranks, device)
            table.scales[slot] = send(adapter.scales, device)
            for group, group_pages in enumerate(pages[: len(GROUPS)]):
                table.pages[slot, group, : len(group_pages)] = send(np.array(group_pages, np.int32), device)
        self.experts.publish(slot, adapter.experts, pages[len(GROUPS) : -1])


def _tensors_of(sites: Sequence[LoraSite]) -> list[Tensor]:
    """Return the targets of `ops.copy_rows_`: A and B of each site, and for int8 its factors."""
    return [part for site in sites for part in (site.a_rows, site.b_rows, site.factors) if part is not None]


def page_runs(pages: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return runs of consecutive pages: (index of the first, its page number, count)."""
    runs: list[tuple[int, int, int]] = []
    for index, page in enumerate(pages):
        if runs and page == runs[-1][1] + runs[-1][2]:
            first, start, num = runs.pop()
            runs.append((first, start, num + 1))
        else:
            runs.append((index, page, 1))
    return runs


def split_budget(page_bytes: Sequence[int], budget: int) -> list[int]:
    """Return the pages of each group that fit a budget in bytes: as many for attention as for MLP, a few for others.

    page_bytes: of one page, by group. Raises BadRequest if not even one page of each fits.
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


def page_bytes(sites: Sequence[SiteInfo], group: int, *, int8: bool = False) -> int:
    """Return the bytes of one page of a group, over all its sites. int8: includes a factor per row."""
    mine = [site for site in sites if site.group == group]
    if int8:
        return PAGE_ROWS * sum(site.in_features + site.out_features + 4 for site in mine)
    return PAGE_ROWS * sum((site.in_features + site.out_features) * site.dtype.itemsize for site in mine)


def _empty_table(num_slots: int, num_sites: int, max_pages: int, device: torch.device) -> AdapterTable:
    return AdapterTable(
        ranks=torch.zeros(num_slots, num_sites, dtype=torch.int32, device=device),
        scales=torch.zeros(num_slots, num_sites, dtype=torch.float32, device=device),
        pages=torch.zeros(num_slots, len(GROUPS), max_pages, dtype=torch.int32, device=device),
    )

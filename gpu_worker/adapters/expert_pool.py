"""The adapter pool's tensors for experts. Layers of one shape share pages, so a layer without LoRA costs nothing.

A page holds 16 rank rows of every expert of a layer. `PagePool` assigns the pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gpu_worker.adapters.packing.expert_rows import ExpertRows, expert_shapes
from gpu_worker.adapters.packing.rows import MAX_EXPERT_RANK
from gpu_worker.layers.expert_modules import ExpertShape, ExpertSite
from gpu_worker.memory import send, zeros
from lora_kernels.experts import ExpertPages
from lora_kernels.ops import PAGE_ROWS, AdapterTable, LoraSite

EXPERT_SHARE = 0.75
"""Share of the memory for extras that is for the rows of experts."""

MAX_PAGES = 4096


class ExpertPool:
    """The rows of experts on one device, and the tables through which kernels find them."""

    def __init__(self, sites: Sequence[ExpertSite], budget: int, num_slots: int, device: torch.device) -> None:
        """Allocate the rows and connect the sites to them.

        budget: bytes for these and all other extras. num_slots: the adapter pool's. If a page of each shape does not
        fit, there are none and no adapter fits.
        """
        self._sites, self._device = sites, device
        self._shapes = expert_shapes(sites)
        self.page_bytes = [page_bytes(shape) for shape in self._shapes]
        num = int(budget * EXPERT_SHARE) // sum(self.page_bytes) if sites else 0
        self.capacity = [min(num, MAX_PAGES)] * len(self._shapes)
        self.slots_with_rows = np.zeros(num_slots, bool)
        first_pages = torch.full((len(sites), num_slots), -1, dtype=torch.int32)
        self._first_pages = first_pages.to(device)
        self._pages = [self._allocate(*one) for one in zip(self._shapes, self.capacity, strict=True)]
        for i, site in enumerate(sites):
            site.pages, site.first_pages = self._pages[self._shapes.index(site.shape)], self._first_pages[i]

    @property
    def num_bytes(self) -> int:
        """Size of all rows, in bytes."""
        return sum(num * size for num, size in zip(self.capacity, self.page_bytes, strict=True))

    def _allocate(self, shape: ExpertShape, num_pages: int) -> ExpertPages:
        num_rows, num_virtual = num_pages * shape.num_experts * PAGE_ROWS, num_pages * shape.num_experts + 1
        # Zeros, because a kernel may read a page's unused rows and multiply them by zero.
        a = zeros((num_rows, shape.in_features), shape.dtype, self._device)
        b = zeros((num_rows, shape.out_features), shape.dtype, self._device)
        most = max(1, min(num_pages, MAX_EXPERT_RANK // PAGE_ROWS))
        table = AdapterTable(
            ranks=zeros((num_virtual, 1), torch.int32, self._device),
            scales=zeros((num_virtual, 1), torch.float32, self._device),
            pages=zeros((num_virtual, 1, most), torch.int32, self._device),
        )
        return ExpertPages(LoraSite(0, 0, a, b), table, shape.num_experts)

    def _placed(
        self, rows: Sequence[ExpertRows], pages: Sequence[Sequence[int]]
    ) -> Iterator[tuple[ExpertRows, ExpertPages, Sequence[int]]]:
        """Yield the rows of each layer with their pages. pages: the adapter's, by shape."""
        used = [0] * len(self._shapes)
        for part in rows:
            group = self._shapes.index(self._sites[part.site].shape)
            own = pages[group][used[group] : used[group] + part.num_pages]
            used[group] += part.num_pages
            yield part, self._pages[group], own

    def copy(
        self, rows: Sequence[ExpertRows], pages: Sequence[Sequence[int]], copy: Callable[[Tensor, Tensor], object]
    ) -> None:
        """Copy an adapter's rows to its pages, one page of all experts at a time. copy: takes target and source."""
        for part, to, own in self._placed(rows, pages):
            for i, page in enumerate(own):
                for source, pool in ((part.a, to.site.a_rows), (part.b, to.site.b_rows)):
                    target = pool.view(-1, to.num_experts, PAGE_ROWS, pool.shape[1])[page]
                    copy(target, _whole_page(source[:, i * PAGE_ROWS : (i + 1) * PAGE_ROWS]))

    def publish(self, slot: int, rows: Sequence[ExpertRows], pages: Sequence[Sequence[int]]) -> None:
        """Enter a copied adapter into the tables, or record that a slot's adapter has no expert rows."""
        if not rows and not self.slots_with_rows[slot]:
            return
        self.slots_with_rows[slot] = bool(rows)
        firsts = np.full(len(self._sites), -1, np.int32)
        for part, to, own in self._placed(rows, pages):
            firsts[part.site] = own[0]
            num = to.num_experts
            at = slice(own[0] * num, (own[0] + 1) * num)
            to.table.ranks[at] = part.a.shape[1]
            to.table.scales[at] = part.scale
            numbers = np.array(own, np.int32) * num + np.arange(num, dtype=np.int32)[:, None]
            to.table.pages[at, 0, : len(own)] = send(numbers, self._device)
        self._first_pages[:, slot] = send(firsts, self._device)


def _whole_page(rows: Tensor) -> Tensor:
    """Return up to 16 rank rows of every expert [E, n, width] as a page [E, 16, width], padded with zeros."""
    if rows.shape[1] == PAGE_ROWS:
        return rows.contiguous()
    page = rows.new_zeros(len(rows), PAGE_ROWS, rows.shape[2])
    page[:, : rows.shape[1]] = rows
    return page


def page_bytes(shape: ExpertShape) -> int:
    """Return the bytes of a page of a shape: 16 rank rows of A and of B for every expert."""
    return shape.num_experts * PAGE_ROWS * (shape.in_features + shape.out_features) * shape.dtype.itemsize

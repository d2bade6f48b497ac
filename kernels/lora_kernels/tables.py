"""What stays in memory between steps, as the operations see it: the adapter pool and packed weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class LoraSite:
    """One linear layer's share of the adapter pool. K and N are the layer's input and output widths."""

    index: int  # column of AdapterTable.ranks and .scales
    group: int  # page space: which row of AdapterTable.pages addresses a_rows and b_rows
    a_rows: Tensor  # [pages * PAGE_ROWS, K] rank rows of A
    b_rows: Tensor  # [pages * PAGE_ROWS, N] rank rows of B transposed


@dataclass(slots=True)
class AdapterTable:
    """What is resident, by slot. Changed only when an adapter is loaded or leaves, never by a step.

    Rank row j of a slot is row pages[slot, group, j // PAGE_ROWS] * PAGE_ROWS + j % PAGE_ROWS of the site's pool.
    """

    ranks: Tensor  # int32 [slots, sites]; 0: the adapter does not touch the site
    scales: Tensor  # float32 [slots, sites]
    pages: Tensor  # int32 [slots, groups, max_pages]
    host: AdapterTable | None = None  # the same numbers in host memory, for plans that must not wait for the device


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A linear layer's weight, laid out for one implementation."""

    weight: Tensor
    out_features: int
    in_features: int
    layout: Literal["plain", "vnni"]  # plain: [N, K] as torch has it; vnni: pairs of K interleaved over columns

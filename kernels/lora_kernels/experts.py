"""LoRA on experts: turns a step's token-expert pairs into rows of `ops.lora_add_`.

Each expert of an adapter is a virtual adapter with its own rows in the pool. Pairs are sorted by expert, as the
experts' products require, and by adapter within an expert, so that a virtual adapter's rows are consecutive. Only the
device knows the routing: all of this is torch with fixed shapes, and never waits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels import sums
from lora_kernels.segments import LARGE_TILE_ROWS_PER_SEGMENT, TILE_LARGE, TILE_SMALL, LoraBatch
from lora_kernels.tables import AdapterTable, LoraSite


@dataclass(frozen=True, slots=True)
class ExpertPages:
    """The pool rows of expert layers of one shape: E experts of K inputs and N outputs.

    A page has 16 rank rows of every expert: row j of expert e is row (page * E + e) * 16 + j of `site`'s tensors. A
    virtual adapter has the number first_page * E + e in `table`; the last number, of rank 0, stands for no LoRA.
    """

    site: LoraSite  # with tensors of shape [pages * E * PAGE_ROWS, K] and [.., N]
    table: AdapterTable  # one site, one group, and pages * E + 1 virtual adapters
    num_experts: int

    @property
    def none(self) -> int:
        """The number of the virtual adapter of rank 0."""
        return len(self.table.ranks) - 1


@dataclass(frozen=True, slots=True)
class ExpertOrder:
    """The S = T * top_k pairs of a step, sorted by expert, then by adapter; and their tiles."""

    pairs: Tensor  # int64 [S], pair at each place; pair i is of token i // top_k
    tokens: Tensor  # int64 [S], token at each place
    experts: Tensor  # int64 [S], expert at each place, ascending
    ends: Tensor  # int32 [E], end of each expert's places
    num_active: Tensor  # int32 [1], number of places whose token has an adapter
    num_tiles: Tensor  # int32 [1]
    rows: Tensor  # int32 [S], places whose token has an adapter, ascending; the first num_active are valid
    tile_slots: Tensor  # int64 [S], adapter slot of each tile; here and below the first num_tiles are valid
    tile_experts: Tensor  # int64 [S]
    tile_firsts: Tensor  # int32 [S], first index into `rows`
    tile_counts: Tensor  # int32 [S]
    tile_rows: int  # rows of a full tile


def order_by_expert(expert_ids: Tensor, token_slots: Tensor, num_experts: int, num_slots: int) -> ExpertOrder:
    """Sort a step's pairs, and cut those with an adapter into tiles of one adapter and expert.

    expert_ids: int [T, top_k], each in [0, num_experts). token_slots: int32 [T] on the same device, -1: no adapter.
    num_slots: slots of the pool.
    """
    top_k, device = expert_ids.shape[1], expert_ids.device
    num_pairs = expert_ids.numel()
    # Large tiles if each expert would have many rows with a single adapter, which is all the host can tell. With fixed
    # sums, a row's tile must not depend on the number of rows.
    large = num_pairs >= LARGE_TILE_ROWS_PER_SEGMENT * num_experts and not sums.are_fixed()
    tile_rows = TILE_LARGE if large else TILE_SMALL
    keys = expert_ids.long() * (num_slots + 1) + (token_slots.long() + 1)[:, None]
    keys, pairs = torch.sort(keys.view(-1), stable=True)
    experts, slots = keys // (num_slots + 1), keys % (num_slots + 1) - 1
    places = torch.arange(num_pairs, device=device)
    active = slots >= 0
    row = active.cumsum(0) - 1  # index into `rows` of each active place
    begins = torch.ones_like(active)
    begins[1:] = keys[1:] != keys[:-1]
    run = torch.where(begins, places, 0).cummax(0).values  # first place of each run of equal keys
    opens = active & ((places - run) % tile_rows == 0)
    tile = opens.cumsum(0) - 1

    def compacted(chosen: Tensor, at: Tensor, values: Tensor) -> Tensor:
        found = torch.zeros(num_pairs + 1, dtype=torch.int64, device=device)  # the last entry is for what is not chosen
        return found.scatter_add_(0, torch.where(chosen, at, num_pairs), values)[:num_pairs]

    tile_places = compacted(opens, tile, places)
    return ExpertOrder(
        pairs=pairs,
        tokens=pairs // top_k,
        experts=experts,
        ends=torch.searchsorted(experts, torch.arange(num_experts, device=device), right=True, out_int32=True),
        num_active=active.sum(0, keepdim=True, dtype=torch.int32),
        num_tiles=opens.sum(0, keepdim=True, dtype=torch.int32),
        rows=compacted(active, row, places).int(),
        tile_slots=slots[tile_places],
        tile_experts=experts[tile_places],
        tile_firsts=row[tile_places].int(),
        tile_counts=compacted(active, tile, torch.ones_like(places)).int(),
        tile_rows=tile_rows,
    )


def expert_batch(order: ExpertOrder, pages: ExpertPages, first_pages: Tensor, token_scales: Tensor | None) -> LoraBatch:
    """Return the work list of one expert layer, for `ops.lora_add_` with the site and table of `pages`.

    Its rows are places of `order`. first_pages: int32 [num_slots], first page of each slot's adapter in this layer, -1:
    none. token_scales: see `LoraBatch`.
    """
    page = first_pages[order.tile_slots].long()
    virtual = torch.where(page >= 0, page * pages.num_experts + order.tile_experts, pages.none).int()
    tiles = torch.stack([virtual, order.tile_firsts, order.tile_counts], 1)
    num_pairs = len(order.rows)
    counts = torch.cat([order.num_active, order.num_tiles, order.num_tiles, order.num_tiles])
    scales = None if token_scales is None else token_scales[order.tokens][order.rows.long()]
    # Each tile is a segment. Those past the count are empty, whatever virtual adapter they name.
    past = torch.arange(num_pairs, device=counts.device) >= order.num_tiles
    starts = torch.where(past, order.num_active, order.tile_firsts)
    large = order.tile_rows == TILE_LARGE
    return LoraBatch(
        buffer=counts,
        counts=counts,
        rows=order.rows,
        seg_slots=torch.where(past, pages.none, virtual),
        seg_starts=torch.cat([starts, order.num_active]),
        small_tiles=tiles,
        large_tiles=tiles,
        row_scales=scales,
        # The host's upper bounds for a launch: at most one tile per pair.
        num_rows=LARGE_TILE_ROWS_PER_SEGMENT * num_pairs if large else num_pairs,
        num_segments=num_pairs,
        num_small_tiles=num_pairs,
        num_large_tiles=num_pairs,
        num_tokens=num_pairs,
        uniform_slot=None,
        token_slots=None,
        token_scales=None,
    )

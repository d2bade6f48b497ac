"""Batched LoRA in two launches per set of sibling layers: shrink (hidden = x @ A.T) and expand (out += hidden @ B).

The tile list comes from the host (segments.py), ranks and pages from the adapter table. Programs stride over the tiles
up to a count read on the device, so that the grid does not depend on the mix of adapters and one captured graph serves
all mixes. Split-K writes partial planes, which expand sums in order: no memset, no atomics, and bit-identical results.
Nothing waits for the device.
"""

# The kernel language's types differ from Python's: for example, an unrolled loop has no iterator.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

import lora_kernels.triton_ops.tuning as tuning
from lora_kernels import sums
from lora_kernels.segments import LARGE_TILE_ROWS_PER_SEGMENT, PAGE_ROWS, TILE_LARGE, TILE_SMALL, LoraBatch
from lora_kernels.tables import AdapterTable, LoraSite
from lora_kernels.triton_ops.launch import Device, Launch, device_of, require_rows

MAX_SITES = 4  # siblings in one launch; a site's column and group are packed into one integer each
_SITE_BITS = 15
MAX_RANK_PROGRAMS = 4  # programs that share one tile's rank blocks; they loop over higher ranks

# Arguments that change from step to step must not select a kernel variant: each variant is a compilation.
_PER_STEP = ("num_tokens", "site_columns", "site_groups")
_UNALIGNED = ("rows", "tiles", "num_tiles", "row_scales")


@triton.jit
def _pick(site, values, NUM_SITES: tl.constexpr):
    """Return values[site] from a tuple with one value per site."""
    chosen = values[0]
    for other in tl.static_range(1, NUM_SITES):
        chosen = tl.where(site == other, values[other], chosen)
    return chosen


@triton.jit
def _unpack(packed, site, SITE_BITS: tl.constexpr):
    return ((packed >> (site * SITE_BITS)) & ((1 << SITE_BITS) - 1)).to(tl.int32)


@triton.jit
def _pool_rows(pages, rank_rows, rank, PAGE_ROWS: tl.constexpr):
    """Return the pool rows of an adapter's rank rows; 0 for those beyond its rank, which are not read."""
    page = tl.load(pages + rank_rows // PAGE_ROWS, mask=rank_rows < rank, other=0)
    return page.to(tl.int64) * PAGE_ROWS + rank_rows % PAGE_ROWS


@triton.jit(do_not_specialize=_PER_STEP, do_not_specialize_on_alignment=_UNALIGNED)
def shrink_kernel(
    planes,  # float32 [splits, NUM_SITES, num_tokens, plane_width]
    x,  # [num_tokens, k]
    a_rows,  # tuple of [pool rows, k]
    ranks,  # int32 [slots, table_sites]
    pages,  # int32 [slots, groups, max_pages]
    rows,  # int32 [num_tokens]
    tiles,  # int32 [tiles, 3]
    num_tiles,  # int32 [1]
    site_columns,  # packed, see _pack
    site_groups,
    num_tokens,
    plane_width,
    k,
    x_stride,
    ranks_stride,
    pages_stride,
    max_pages,
    NUM_SITES: tl.constexpr,
    SITE_BITS: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """planes[split, site, i] = x[rows[i]] @ A.T over the split's part of K, for every row of every tile."""
    site = tl.program_id(1) % NUM_SITES
    rank_program = tl.program_id(1) // NUM_SITES
    num_rank_programs = tl.num_programs(1) // NUM_SITES
    split = tl.program_id(2)
    split_k = tl.cdiv(tl.cdiv(k, BLOCK_K), tl.num_programs(2)) * BLOCK_K
    a = _pick(site, a_rows, NUM_SITES)
    column = _unpack(site_columns, site, SITE_BITS)
    group = _unpack(site_groups, site, SITE_BITS)
    plane = planes + (split * NUM_SITES + site).to(tl.int64) * num_tokens * plane_width
    tile_rows = tl.arange(0, BLOCK_M)

    for tile in range(tl.program_id(0), tl.load(num_tiles), tl.num_programs(0)):
        slot = tl.load(tiles + tile * 3).to(tl.int64)
        first = tl.load(tiles + tile * 3 + 1)
        count = tl.load(tiles + tile * 3 + 2)
        rank = tl.load(ranks + slot * ranks_stride + column)
        # Rows past the tile's count reread its last row: cheaper than masking every load, and never stored.
        token = tl.load(rows + first + tl.minimum(tile_rows, count - 1)).to(tl.int64)
        x_row = x + token[:, None] * x_stride
        for rank_block in range(rank_program, tl.cdiv(rank, BLOCK_R), num_rank_programs):
            rank_rows = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
            live_rank = rank_rows < rank
            pool_rows = _pool_rows(pages + slot * pages_stride + group * max_pages, rank_rows, rank, PAGE_ROWS)
            a_row = a + pool_rows[:, None] * k
            acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            for k_start in range(split * split_k, tl.minimum(k, (split + 1) * split_k), BLOCK_K):
                k_range = k_start + tl.arange(0, BLOCK_K)
                if EVEN_K:
                    x_block = tl.load(x_row + k_range[None, :])
                    a_block = tl.load(a_row + k_range[None, :], mask=live_rank[:, None], other=0.0)
                else:
                    live_k = k_range[None, :] < k
                    x_block = tl.load(x_row + k_range[None, :], mask=live_k, other=0.0)
                    a_block = tl.load(a_row + k_range[None, :], mask=live_rank[:, None] & live_k, other=0.0)
                if UPCAST:
                    x_block = x_block.to(tl.float32)
                    a_block = a_block.to(tl.float32)
                acc = tl.dot(x_block, tl.trans(a_block), acc, input_precision="ieee")
            # Columns past the rank are written as zeros, so that expand may read whole blocks.
            target = plane + (first + tile_rows)[:, None].to(tl.int64) * plane_width + rank_rows[None, :]
            tl.store(target, acc, mask=(tile_rows < count)[:, None])


@triton.jit(do_not_specialize=_PER_STEP, do_not_specialize_on_alignment=_UNALIGNED)
def expand_kernel(
    outs,  # tuple of [num_tokens, widths[i]]
    planes,  # float32 [SPLITS, NUM_SITES, num_tokens, plane_width]
    b_rows,  # tuple of [pool rows, widths[i]]
    ranks,  # int32 [slots, table_sites]
    scales,  # float32 [slots, table_sites]
    pages,  # int32 [slots, groups, max_pages]
    rows,  # int32 [num_tokens]
    row_scales,  # float32 [num_tokens] or None
    tiles,  # int32 [tiles, 3]
    num_tiles,  # int32 [1]
    site_columns,  # packed, see _pack
    site_groups,
    num_tokens,
    plane_width,
    widths,
    out_strides,
    ranks_stride,
    pages_stride,
    max_pages,
    NUM_SITES: tl.constexpr,
    SITE_BITS: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """outs[site][rows[i]] += scale * planes[:, site, i].sum(0) @ B, for every row of every tile."""
    # Axis 1 runs over the column blocks of all sites in sequence, so that narrow siblings leave no program idle.
    block = tl.program_id(1)
    site = 0
    site_start = 0
    blocks_before = 0
    for other in tl.static_range(1, NUM_SITES):
        blocks_before += tl.cdiv(widths[other - 1], BLOCK_N)
        site = tl.where(block >= blocks_before, other, site)
        site_start = tl.where(block >= blocks_before, blocks_before, site_start)
    out = _pick(site, outs, NUM_SITES)
    b = _pick(site, b_rows, NUM_SITES)
    width = _pick(site, widths, NUM_SITES)
    out_stride = _pick(site, out_strides, NUM_SITES)
    column = _unpack(site_columns, site, SITE_BITS)
    group = _unpack(site_groups, site, SITE_BITS)
    n_range = (block - site_start) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_n = n_range < width
    plane_size = num_tokens.to(tl.int64) * plane_width
    tile_rows = tl.arange(0, BLOCK_M)

    for tile in range(tl.program_id(0), tl.load(num_tiles), tl.num_programs(0)):
        slot = tl.load(tiles + tile * 3).to(tl.int64)
        first = tl.load(tiles + tile * 3 + 1)
        count = tl.load(tiles + tile * 3 + 2)
        rank = tl.load(ranks + slot * ranks_stride + column)
        live = tile_rows < count
        if rank > 0:
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            hidden_rows = (first + tl.minimum(tile_rows, count - 1)).to(tl.int64)
            hidden_plane = planes + (tl.arange(0, SPLITS)[:, None, None] * NUM_SITES + site) * plane_size
            hidden_row = hidden_plane + hidden_rows[None, :, None] * plane_width
            for rank_start in range(0, rank, BLOCK_R):
                rank_rows = rank_start + tl.arange(0, BLOCK_R)
                live_rank = rank_rows < rank
                pool_rows = _pool_rows(pages + slot * pages_stride + group * max_pages, rank_rows, rank, PAGE_ROWS)
                b_block = tl.load(
                    b + pool_rows[:, None] * width + n_range[None, :],
                    mask=live_rank[:, None] & live_n[None, :],
                    other=0.0,
                )
                hidden = tl.sum(tl.load(hidden_row + rank_rows[None, None, :]), axis=0)
                if UPCAST:
                    b_block = b_block.to(tl.float32)
                acc = tl.dot(hidden.to(b_block.dtype), b_block, acc, input_precision="ieee")
            scale = tl.load(scales + slot * ranks_stride + column)
            if row_scales is not None:
                acc *= tl.load(row_scales + first + tile_rows, mask=live, other=0.0)[:, None]
            token = tl.load(rows + first + tile_rows, mask=live, other=0).to(tl.int64)
            target = out + token[:, None] * out_stride + n_range[None, :]
            mask = live[:, None] & live_n[None, :]
            base = tl.load(target, mask=mask, other=0.0)
            tl.store(target, (base.to(tl.float32) + acc * scale).to(base.dtype), mask=mask)


@dataclass(frozen=True, slots=True)
class _Tiles:
    """The tile list of a step, and the maximum number of tiles its launches must cover."""

    tiles: Tensor
    num_tiles: Tensor  # on the device
    max_tiles: int
    rows: int  # rows of a full tile


def lora_add_(
    outs: Sequence[Tensor], x: Tensor, sites: Sequence[LoraSite], table: AdapterTable, batch: LoraBatch
) -> None:
    """outs[i][row] += scale * (x[row] @ A_i.T) @ B_i for every row of every segment. See `ops.lora_add_`."""
    if _uniform_gemms_(outs, x, sites, table, batch):
        return
    device = device_of(x)
    for first in range(0, len(sites), MAX_SITES):
        part = slice(first, first + MAX_SITES)
        for launch in plan_lora(outs[part], x, sites[part], table, batch, device):
            launch()


def plan_lora(
    outs: Sequence[Tensor],
    x: Tensor,
    sites: Sequence[LoraSite],
    table: AdapterTable,
    batch: LoraBatch,
    device: Device,
) -> tuple[Launch, Launch]:
    """Return the shrink and expand launches of up to MAX_SITES siblings. Allocates the planes; runs nothing.

    Raises ValueError for tensors that the kernels would misread.
    """
    require_rows(x, *outs, *(rows for site in sites for rows in (site.a_rows, site.b_rows)))
    k = x.shape[1]
    max_rank = table.pages.shape[2] * PAGE_ROWS
    tiles = _choose_tiles(batch)
    blocks = tuning.shrink_blocks(tiles.rows, max_rank, k, x.element_size(), device)
    rank_blocks = -(-max_rank // blocks.rank)
    columns = len(sites) * min(MAX_RANK_PROGRAMS, rank_blocks)
    splits = 1 if sums.are_fixed() else tuning.lora_splits(tiles.max_tiles * columns, k // blocks.k, device)
    plane_width = rank_blocks * blocks.rank
    planes = x.new_empty(splits, len(sites), batch.num_tokens, plane_width, dtype=torch.float32)

    shared = {
        "ranks": table.ranks,
        "pages": table.pages,
        "rows": batch.rows,
        "tiles": tiles.tiles,
        "num_tiles": tiles.num_tiles,
        "site_columns": _pack([site.index for site in sites]),
        "site_groups": _pack([site.group for site in sites]),
        "num_tokens": batch.num_tokens,
        "plane_width": plane_width,
        "ranks_stride": table.ranks.stride(0),
        "pages_stride": table.pages.stride(0),
        "max_pages": table.pages.shape[2],
        "NUM_SITES": len(sites),
        "SITE_BITS": _SITE_BITS,
        "PAGE_ROWS": PAGE_ROWS,
        "BLOCK_M": tiles.rows,
        "UPCAST": device.upcast,
    }
    shrink_args = {
        "planes": planes,
        "x": x,
        "a_rows": tuple(site.a_rows for site in sites),
        "k": k,
        "x_stride": x.stride(0),
        "BLOCK_R": blocks.rank,
        "BLOCK_K": blocks.k,
        "EVEN_K": k % blocks.k == 0,
    }
    grid = (_tile_programs(tiles, columns * splits, device), columns, splits)
    shrink = Launch(shrink_kernel, grid, shared | shrink_args, blocks.limits)
    shared |= {"scales": table.scales, "row_scales": batch.row_scales}
    expand = _plan_expand(outs, planes, sites, max_rank, tiles, shared, device)
    return shrink, expand


def _plan_expand(
    outs: Sequence[Tensor],
    planes: Tensor,
    sites: Sequence[LoraSite],
    max_rank: int,
    tiles: _Tiles,
    shared: dict[str, object],
    device: Device,
) -> Launch:
    widths = tuple(site.b_rows.shape[1] for site in sites)
    blocks = tuning.expand_blocks(tiles.rows, max_rank, max(widths), outs[0].element_size(), planes.shape[0], device)
    assert planes.shape[3] % blocks.rank == 0, "expand reads whole blocks of what shrink wrote"
    columns = sum(-(-width // blocks.n) for width in widths)
    args = {
        "outs": tuple(outs),
        "planes": planes,
        "b_rows": tuple(site.b_rows for site in sites),
        "widths": widths,
        "out_strides": tuple(out.stride(0) for out in outs),
        "SPLITS": planes.shape[0],
        "BLOCK_R": blocks.rank,
        "BLOCK_N": blocks.n,
    }
    grid = (_tile_programs(tiles, columns, device), columns, 1)
    return Launch(expand_kernel, grid, shared | args, blocks.limits)


def _choose_tiles(batch: LoraBatch) -> _Tiles:
    if batch.num_rows >= LARGE_TILE_ROWS_PER_SEGMENT * batch.num_segments and not sums.are_fixed():
        return _Tiles(batch.large_tiles, batch.counts[3:4], batch.num_large_tiles, TILE_LARGE)
    return _Tiles(batch.small_tiles, batch.counts[2:3], batch.num_small_tiles, TILE_SMALL)


def _tile_programs(tiles: _Tiles, programs_per_tile: int, device: Device) -> int:
    return min(tiles.max_tiles, max(1, tuning.GRID_WAVES * device.num_sms // programs_per_tile))


def _pack(values: list[int]) -> int:
    """Pack one small integer per site into one argument.

    For a tuple, Triton would compile a variant for every pattern of ones and multiples of 16. The bit above the sites'
    bits makes the argument a 64-bit integer, whatever the values.
    """
    assert len(values) <= MAX_SITES
    assert all(0 <= value < 1 << _SITE_BITS for value in values), values
    return sum((value << (_SITE_BITS * i) for i, value in enumerate(values)), start=1 << (_SITE_BITS * MAX_SITES))


def _uniform_gemms_(
    outs: Sequence[Tensor], x: Tensor, sites: Sequence[LoraSite], table: AdapterTable, batch: LoraBatch
) -> bool:
    """Compute a long step of one adapter with two library products per site; return False, doing nothing, otherwise.

    Needs the table's host copy (to read rank, scale and pages without waiting for the device), and consecutive pages.
    """
    host, slot = table.host, batch.uniform_slot
    if host is None or slot is None or batch.row_scales is not None or sums.are_fixed():
        return False
    if batch.num_tokens < tuning.UNIFORM_GEMM_ROWS:
        return False
    runs = [_pool_run(host, slot, site) for site in sites]
    if None in runs:
        return False
    for out, site, run in zip(outs, sites, runs, strict=True):
        if run is not None and run.stop > run.start:
            hidden = x @ site.a_rows[run].T
            out.addmm_(hidden, site.b_rows[run], alpha=float(host.scales[slot, site.index]))
    return True


def _pool_run(host: AdapterTable, slot: int, site: LoraSite) -> slice | None:
    """Return an adapter's pool rows at a site, empty if it has none there; None if they are not consecutive."""
    rank = int(host.ranks[slot, site.index])
    pages = host.pages[slot, site.group, : -(-rank // PAGE_ROWS)].tolist()
    if not pages:
        return slice(0, 0)
    first = pages[0] * PAGE_ROWS
    return slice(first, first + rank) if pages == list(range(pages[0], pages[0] + len(pages))) else None

"""Block sizes by operation, rank class and width.

MEASURED_ON says where the numbers come from. They were chosen from the arithmetic in docs/triton.md and checked by
ahead-of-time compilation (no spills, shared memory within the card's limit); no GPU has timed them yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_kernels.segments import TILE_LARGE, TILE_SMALL
from lora_kernels.triton_ops.launch import Device

MEASURED_ON: str | None = None  # card and date of the measurement behind this table

SPLIT_WAVES = 2  # programs aimed at, in multiples of the device's SMs, where a reduction may be split
GRID_WAVES = 16  # most programs of a launch that strides over tiles: bounds the empty ones of a captured graph
MAX_LORA_SPLITS = 16
MAX_KV_SPLITS = 32
LARGE_TILE_ROWS_PER_SEGMENT = 32  # mean rows of a segment from which 64-row tiles are taken
UNIFORM_GEMM_ROWS = 256  # rows of a one-adapter step from which two library GEMMs a site replace the two launches


@dataclass(frozen=True, slots=True)
class ShrinkBlocks:
    """x [tile_rows, K] @ A.T [K, rank]: blocks of rank rows and of K."""

    rank: int
    k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class ExpandBlocks:
    """hidden [tile_rows, rank] @ B [rank, N]: blocks of rank rows and of N."""

    rank: int
    n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class AttentionBlocks:
    """Rows are (query, head of the group) pairs; keys are walked in blocks."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def rank_class(max_rank: int) -> int:
    """The rank block for a pool whose adapters have at most max_rank rows: 16, 32 or 64. Ranks above it loop."""
    return 16 if max_rank <= 16 else 32 if max_rank <= 32 else 64


# Decode reads each weight once, so a block is wide in K or N to keep many bytes in flight. Prefill is a GEMM whose
# rank dimension is short: the row tile does the work, and BLOCK_N 128 halves the number of times hidden is read.
_SHRINK = {
    (TILE_SMALL, 16): ShrinkBlocks(rank=16, k=256, num_warps=4, num_stages=3),
    (TILE_SMALL, 32): ShrinkBlocks(rank=32, k=128, num_warps=4, num_stages=4),
    (TILE_SMALL, 64): ShrinkBlocks(rank=32, k=128, num_warps=4, num_stages=4),
    (TILE_LARGE, 16): ShrinkBlocks(rank=16, k=128, num_warps=4, num_stages=3),
    (TILE_LARGE, 32): ShrinkBlocks(rank=32, k=64, num_warps=4, num_stages=4),
    (TILE_LARGE, 64): ShrinkBlocks(rank=64, k=64, num_warps=4, num_stages=4),
}
_EXPAND = {
    (TILE_SMALL, 16): ExpandBlocks(rank=16, n=256, num_warps=4, num_stages=2),
    (TILE_SMALL, 32): ExpandBlocks(rank=32, n=128, num_warps=4, num_stages=3),
    (TILE_SMALL, 64): ExpandBlocks(rank=32, n=128, num_warps=4, num_stages=3),
    (TILE_LARGE, 16): ExpandBlocks(rank=16, n=128, num_warps=4, num_stages=2),
    (TILE_LARGE, 32): ExpandBlocks(rank=32, n=128, num_warps=4, num_stages=2),
    (TILE_LARGE, 64): ExpandBlocks(rank=32, n=128, num_warps=4, num_stages=2),
}


def shrink_blocks(tile_rows: int, max_rank: int, k: int, element_bytes: int, device: Device) -> ShrinkBlocks:
    blocks = _SHRINK[tile_rows, rank_class(max_rank)]
    # A block of K never exceeds what K fills, and fp32 halves it so that a stage keeps its size in bytes.
    block_k = max(16, min(blocks.k * 2 // element_bytes, _power_of_2_below(k)))
    return ShrinkBlocks(blocks.rank, block_k, blocks.num_warps, _stages(blocks.num_stages, device))


def expand_blocks(tile_rows: int, max_rank: int, n: int, device: Device) -> ExpandBlocks:
    blocks = _EXPAND[tile_rows, rank_class(max_rank)]
    block_n = max(16, min(blocks.n, _power_of_2_below(n)))
    return ExpandBlocks(blocks.rank, block_n, blocks.num_warps, _stages(blocks.num_stages, device))


def attention_blocks(rows: int, head_dim: int, element_bytes: int, device: Device) -> AttentionBlocks:
    """rows: what the tile must hold, a power of two >= 16. head_dim: the wider of K and V, padded to a power of 2."""
    row_bytes = head_dim * element_bytes
    if device.backend == "hip":
        keys = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
        return AttentionBlocks(rows, keys, num_warps=4, num_stages=1)
    keys = 64 if row_bytes <= 256 else 32 if row_bytes <= 1024 else 16
    return AttentionBlocks(rows, keys, num_warps=4 if rows * head_dim <= 64 * 128 else 8, num_stages=2)


def prefill_rows(head_dim: int, element_bytes: int) -> int:
    """Rows of a prefill tile: 64 until the fp32 accumulator would no longer fit the register file."""
    return 64 if head_dim * element_bytes <= 512 else 32


def lora_splits(programs: int, num_k_blocks: int, device: Device) -> int:
    """Parts K is cut into so that a small shrink still fills the device: a power of two, few distinct kernels."""
    return _splits(programs, min(MAX_LORA_SPLITS, num_k_blocks), device)


def kv_splits(programs: int, device: Device) -> int:
    """Parts a decode's keys are cut into. Independent of their number, so that a captured graph serves any length."""
    return _splits(programs, MAX_KV_SPLITS, device)


def _splits(programs: int, limit: int, device: Device) -> int:
    wanted = SPLIT_WAVES * device.num_sms // max(programs, 1)
    return _power_of_2_below(max(1, min(wanted, limit)))


def _power_of_2_below(size: int) -> int:
    return 1 << (size.bit_length() - 1)


def _stages(num_stages: int, device: Device) -> int:
    # AMD's 64 KiB of LDS hold two stages of these blocks; more is a CUDA habit (cp.async).
    return min(num_stages, 2) if device.backend == "hip" else num_stages

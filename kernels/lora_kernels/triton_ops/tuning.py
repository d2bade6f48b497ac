"""Block sizes by operation, rank class and width.

MEASURED_ON names the measurement behind the numbers. They were derived from the arithmetic in docs/triton.md and
checked by ahead-of-time compilation (no spills, shared memory within the card's limit). No GPU has timed them yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_kernels.segments import TILE_LARGE, TILE_SMALL
from lora_kernels.triton_ops.launch import Device, Limits

MEASURED_ON: str | None = None  # card and date of the measurement behind this table

SPLIT_WAVES = 2  # target number of programs if a reduction may be split, in multiples of the device's SMs
GRID_WAVES = 16  # maximum programs of a launch over tiles, in multiples of SMs: bounds idle programs of captured graphs
MAX_LORA_SPLITS = 16
MAX_KV_SPLITS = 32
UNIFORM_GEMM_ROWS = 256  # rows from which a one-adapter step uses two library products per site instead of the kernels


@dataclass(frozen=True, slots=True)
class ShrinkBlocks:
    """Block sizes in rank rows and K, for x [tile_rows, K] @ A.T [K, rank]."""

    rank: int
    k: int
    limits: Limits


@dataclass(frozen=True, slots=True)
class ExpandBlocks:
    """Block sizes in rank rows and N, for hidden [tile_rows, rank] @ B [rank, N]."""

    rank: int
    n: int
    limits: Limits


@dataclass(frozen=True, slots=True)
class AttentionBlocks:
    """Rows of a tile, which are (query, head of its group) pairs, and keys of a block."""

    rows: int
    keys: int
    limits: Limits


@dataclass(frozen=True, slots=True)
class LinearBlocks:
    """Block sizes in rows, columns and K of a product with fixed sums."""

    rows: int
    n: int
    k: int
    limits: Limits


def linear_blocks(element_bytes: int, device: Device) -> LinearBlocks:
    """Return the block sizes of every product with fixed sums, for any number of rows."""
    if element_bytes == 4:
        return LinearBlocks(16, 64, 32, _on(device, Limits(num_warps=4, num_stages=2), element_bytes))
    return LinearBlocks(32, 64, 64, _on(device, Limits(num_warps=4, num_stages=3), element_bytes))


def rank_class(max_rank: int) -> int:
    """Return the rank block for adapters of at most max_rank rows: 16, 32 or 64. Programs loop over higher ranks."""
    return 16 if max_rank <= 16 else 32 if max_rank <= 32 else 64


# Decode reads each weight once, so a block is wide in K or N to keep many bytes in flight. Prefill is a GEMM with a
# short rank dimension: the row tile does the work, and 128 columns halve the reads of hidden.
_SHRINK = {
    (TILE_SMALL, 16): ShrinkBlocks(rank=16, k=256, limits=Limits(num_warps=4, num_stages=3)),
    (TILE_SMALL, 32): ShrinkBlocks(rank=32, k=128, limits=Limits(num_warps=4, num_stages=4)),
    (TILE_SMALL, 64): ShrinkBlocks(rank=32, k=128, limits=Limits(num_warps=4, num_stages=4)),
    (TILE_LARGE, 16): ShrinkBlocks(rank=16, k=128, limits=Limits(num_warps=4, num_stages=3)),
    (TILE_LARGE, 32): ShrinkBlocks(rank=32, k=64, limits=Limits(num_warps=4, num_stages=4)),
    (TILE_LARGE, 64): ShrinkBlocks(rank=64, k=64, limits=Limits(num_warps=4, num_stages=4)),
}
_EXPAND = {
    (TILE_SMALL, 16): ExpandBlocks(rank=16, n=256, limits=Limits(num_warps=4, num_stages=1)),
    (TILE_SMALL, 32): ExpandBlocks(rank=32, n=128, limits=Limits(num_warps=4, num_stages=2)),
    (TILE_SMALL, 64): ExpandBlocks(rank=32, n=128, limits=Limits(num_warps=4, num_stages=2)),
    (TILE_LARGE, 16): ExpandBlocks(rank=16, n=128, limits=Limits(num_warps=4, num_stages=1)),
    (TILE_LARGE, 32): ExpandBlocks(rank=32, n=128, limits=Limits(num_warps=4, num_stages=2)),
    (TILE_LARGE, 64): ExpandBlocks(rank=32, n=128, limits=Limits(num_warps=4, num_stages=2)),
}


def shrink_blocks(tile_rows: int, max_rank: int, k: int, element_bytes: int, device: Device) -> ShrinkBlocks:
    """Return the block sizes of a shrink whose input has k columns."""
    blocks = _SHRINK[tile_rows, rank_class(max_rank)]
    # A block of K is at most as wide as K; fp32 halves it, so that a stage keeps its size in bytes.
    block_k = max(16, min(blocks.k * 2 // element_bytes, _power_of_2_below(k)))
    rank = min(blocks.rank, 32) if element_bytes == 4 else blocks.rank
    return ShrinkBlocks(rank, block_k, _on(device, blocks.limits, element_bytes))


def expand_blocks(
    tile_rows: int, max_rank: int, n: int, element_bytes: int, splits: int, device: Device
) -> ExpandBlocks:
    """Return the block sizes of an expand to n columns, which sums the planes of `splits` parts of K."""
    blocks = _EXPAND[tile_rows, rank_class(max_rank)]
    block_n = max(16, min(blocks.n, _power_of_2_below(n)))
    if splits == 1:
        return ExpandBlocks(blocks.rank, block_n, _on(device, blocks.limits, element_bytes))
    # All planes of a block are in registers at once; software pipelining would put them all in shared memory.
    limits = replace(blocks.limits, num_stages=1)
    return ExpandBlocks(blocks.rank if splits < 16 else 16, block_n, _on(device, limits, element_bytes))


def prefill_rows(head_dim: int, element_bytes: int, device: Device) -> int:
    """Return the rows of a prefill chunk's tile: the maximum with the fp32 accumulator in registers."""
    if element_bytes == 4:
        return 16
    rows = 128 if head_dim <= 128 else 64 if head_dim <= 256 else 32
    return min(rows, 64) if device.backend == "hip" else rows


def attention_blocks(rows: int, head_dim: int, element_bytes: int, device: Device) -> AttentionBlocks:
    """Return the block sizes of an attention tile.

    rows: a power of two of at least 16, decided by the step. head_dim: the larger of keys' and values', padded to a
    power of two.
    """
    num_warps = 4 if rows < 128 and rows * head_dim <= 64 * 128 else 8
    limits = Limits(num_warps, num_stages=2)
    if element_bytes == 4:  # products without tensor cores: many registers per output element
        keys, limits = 16, replace(limits, num_stages=1)
    elif device.backend == "hip":
        keys = 64 if head_dim <= 128 else 32 if head_dim <= 256 else 16
        limits = Limits(num_warps=4, num_stages=1)
    else:
        # Ampere holds both operands of a product in registers; Hopper reads them from shared memory.
        keys = 64 if rows < 128 or device.capability >= 90 else 32
        keys = keys if head_dim <= 128 else 32 if head_dim <= 256 else 16
    return AttentionBlocks(rows, keys, _on(device, limits, element_bytes, crowded=rows >= 64 or head_dim > 256))


def reduce_limits(device: Device) -> Limits:
    """Return the limits of the kernel that joins the parts of split decodes; it has no products."""
    return _on(device, Limits(), element_bytes=2, crowded=True)


def lora_splits(programs: int, num_k_blocks: int, device: Device) -> int:
    """Return the number of parts of K with which a small shrink fills the device: 1, 4 or 16, for few variants."""
    splits = _splits(programs, min(MAX_LORA_SPLITS, num_k_blocks), device)
    return 16 if splits >= 16 else 4 if splits >= 4 else 1


def kv_splits(programs: int, device: Device) -> int:
    """Return the number of parts of a decode's keys; independent of length, so that one graph serves all lengths."""
    return _splits(programs, MAX_KV_SPLITS, device)


def _splits(programs: int, limit: int, device: Device) -> int:
    wanted = SPLIT_WAVES * device.num_sms // max(programs, 1)
    return _power_of_2_below(max(1, min(wanted, limit)))


def _power_of_2_below(size: int) -> int:
    return 1 << (size.bit_length() - 1)


def _on(device: Device, limits: Limits, element_bytes: int, crowded: bool = False) -> Limits:
    """Return limits that fit a device. crowded: whether the accumulator needs more registers than the cap allows."""
    if element_bytes == 4 or device.backend == "hip":
        # fp32 products use no tensor cores and need the registers; AMD's 64 KiB of LDS hold two stages.
        limits = replace(limits, num_stages=min(limits.num_stages, 2))
    if device.backend == "hip":
        return limits
    # 168 registers let three blocks of four warps share an SM. By default ptxas stops at lower steps and spills a few.
    return replace(limits, max_registers=255 if crowded or element_bytes == 4 else 168)

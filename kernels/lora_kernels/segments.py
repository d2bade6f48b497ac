"""A step's work lists: which token rows belong to which adapter, and the place of each token in the paged cache.

They are built once per step on the host, with numpy, and sent in one copy; every layer reads the same lists. They refer
to slots and blocks, not to adapters or requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

PAGE_ROWS = 16  # rank rows in an adapter-pool page
BLOCK_TOKENS = 16  # tokens in a KV block

TILE_SMALL = 16  # rows of a decode tile: the smallest M of a tensor-core dot
TILE_LARGE = 64  # rows of a prefill tile
LARGE_TILE_ROWS_PER_SEGMENT = 32  # mean rows per segment from which a GPU uses large tiles

_COUNTS = 4  # num_rows, num_segments, num_small_tiles, num_large_tiles


@dataclass(slots=True)
class LoraBatch:
    """A step's token rows with an adapter, sorted by slot; rows of one slot keep their order.

    Every tensor is a view of `buffer`, whose layout depends only on `num_tokens`: a captured graph stays valid when the
    next step's list is copied over it. Entries past the counts are zero.
    """

    buffer: Tensor  # int32 [12 * T + 5]
    counts: Tensor  # int32 [4] num_rows, num_segments, num_small_tiles, num_large_tiles, for kernels
    rows: Tensor  # int32 [T] token rows by slot; the first num_rows are valid
    seg_slots: Tensor  # int32 [T] slot of each segment; the first num_segments are valid
    seg_starts: Tensor  # int32 [T + 1] segment g is rows[seg_starts[g]:seg_starts[g + 1]]
    small_tiles: Tensor  # int32 [T, 3] (slot, first index into rows, row count <= 16)
    large_tiles: Tensor  # int32 [T, 3] (slot, first index into rows, row count <= 64)
    row_scales: Tensor | None  # float32 [T] request scale of rows[i]; None if all are 1
    token_slots: Tensor | None  # int32 [T] slot of each token, -1 for the base model; None: not for a step's tokens
    token_scales: Tensor | None  # float32 [T] request scale of each token; None if all are 1
    num_rows: int
    num_segments: int
    num_small_tiles: int
    num_large_tiles: int
    num_tokens: int  # T
    uniform_slot: int | None  # the slot, if one segment has all rows of the step; else None
    host_slots: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # distinct slots, on the host


def build_lora_batch(
    token_slots: np.ndarray,
    device: torch.device | str,
    token_scales: np.ndarray | None = None,
    into: LoraBatch | None = None,
) -> LoraBatch | None:
    """Sort a step's tokens by adapter slot, and copy the list to a device.

    token_slots: int [T], pool slot of each token's adapter, -1 for the base model. token_scales: float32 [T],
    multiplies the adapter's own scale. into: a recordable batch of T tokens to write to, instead of creating one.
    Returns None, writing nothing, if no row has an adapter: such a step runs no LoRA kernel.
    """
    num_tokens = len(token_slots)
    order = np.argsort(token_slots, kind="stable").astype(np.int32)
    order = order[int(np.count_nonzero(token_slots < 0)) :]
    num_rows = len(order)
    if num_rows == 0:
        return None
    slots = token_slots[order]
    firsts = np.flatnonzero(np.concatenate(([True], slots[1:] != slots[:-1])))
    seg_starts = np.append(firsts, num_rows)
    seg_slots = slots[firsts]
    num_segments = len(firsts)
    small = _tiles(seg_slots, seg_starts, TILE_SMALL)
    large = _tiles(seg_slots, seg_starts, TILE_LARGE)

    host = torch.zeros(_COUNTS + 12 * num_tokens + 1, dtype=torch.int32, pin_memory=torch.device(device).type == "cuda")
    batch = _view_lora_buffer(host, num_tokens)
    batch.counts.numpy()[:] = num_rows, num_segments, len(small), len(large)
    batch.rows.numpy()[:num_rows] = order
    batch.seg_slots.numpy()[:num_segments] = seg_slots
    batch.seg_starts.numpy()[: num_segments + 1] = seg_starts
    batch.small_tiles.numpy()[: len(small)] = small
    batch.large_tiles.numpy()[: len(large)] = large
    if batch.token_slots is not None:
        batch.token_slots.numpy()[:] = token_slots
    if batch.row_scales is not None and batch.token_scales is not None:
        # Written even if all are 1, because a captured graph always reads them.
        batch.row_scales.numpy()[:num_rows] = 1.0 if token_scales is None else token_scales[order]
        batch.token_scales.numpy()[:] = 1.0 if token_scales is None else token_scales
    if into is not None:
        into.buffer.copy_(host, non_blocking=True)
        return into
    sent = _view_lora_buffer(host.to(device, non_blocking=True), num_tokens)
    if token_scales is None:
        sent.row_scales = sent.token_scales = None
    sent.num_rows, sent.num_segments = num_rows, num_segments
    sent.num_small_tiles, sent.num_large_tiles = len(small), len(large)
    sent.uniform_slot = int(seg_slots[0]) if num_segments == 1 and num_rows == num_tokens else None
    sent.host_slots = seg_slots
    return sent


def recordable_lora_batch(num_tokens: int, device: torch.device | str) -> LoraBatch:
    """Return an empty batch for graph capture: `build_lora_batch` writes any step of num_tokens into it.

    Its counts on the host are upper bounds, so that a launch planned from them covers every step's list. For a step
    without LoRA rows the buffer must be zeroed.
    """
    buffer = torch.zeros(_COUNTS + 12 * num_tokens + 1, dtype=torch.int32, device=device)
    batch = _view_lora_buffer(buffer, num_tokens)
    batch.num_rows = batch.num_segments = batch.num_small_tiles = batch.num_large_tiles = num_tokens
    return batch


def _tiles(seg_slots: np.ndarray, seg_starts: np.ndarray, tile_rows: int) -> np.ndarray:
    """Cut every segment into tiles of at most tile_rows rows. Return int [tiles, 3]: slot, first row, row count."""
    lengths = np.diff(seg_starts)
    per_segment = -(-lengths // tile_rows)
    segment = np.repeat(np.arange(len(lengths)), per_segment)
    tile_of_segment = np.arange(len(segment)) - np.repeat(np.cumsum(per_segment) - per_segment, per_segment)
    first = seg_starts[segment] + tile_of_segment * tile_rows
    count = np.minimum(tile_rows, seg_starts[segment + 1] - first)
    return np.stack([seg_slots[segment], first, count], axis=1)


def _view_lora_buffer(buffer: Tensor, num_tokens: int) -> LoraBatch:
    t = num_tokens
    parts = buffer.split([_COUNTS, t, t, t + 1, 3 * t, 3 * t, t, t, t])
    counts, rows, seg_slots, seg_starts, small, large, scales, token_slots, token_scales = parts
    return LoraBatch(
        buffer=buffer,
        counts=counts,
        rows=rows,
        seg_slots=seg_slots,
        seg_starts=seg_starts,
        small_tiles=small.view(t, 3),
        large_tiles=large.view(t, 3),
        row_scales=scales.view(torch.float32),
        token_slots=token_slots,
        token_scales=token_scales.view(torch.float32),
        num_rows=0,
        num_segments=0,
        num_small_tiles=0,
        num_large_tiles=0,
        num_tokens=t,
        uniform_slot=None,
    )


@dataclass(slots=True)
class AttentionBatch:
    """The places of a step's tokens in the paged cache: S sequences with T tokens in total, packed in order.

    Query i of a sequence is at absolute position kv_len - query_len + i, for decodes, prefill chunks and resumed
    prefills alike. Every list except the tables is a view of `buffer`; on a CPU, where nothing is sent, lists are
    separate.
    """

    buffer: Tensor | None  # int32 [4 * T + 2 * S + 1]
    block_tables: Tensor  # int32 [S, max_blocks], cache block of each 16 tokens of a sequence
    query_starts: Tensor  # int32 [S + 1] sequence s owns tokens [query_starts[s], query_starts[s + 1])
    kv_lens: Tensor  # int32 [S] tokens in the cache after this step's are written
    slot_mapping: Tensor  # int64 [T] block * BLOCK_TOKENS + offset of each token
    positions: Tensor  # int64 [T] absolute position of each token
    max_query_len: int
    max_kv_len: int
    num_seqs: int
    num_tokens: int


def build_attention_batch(
    query_lens: np.ndarray,
    kv_lens: np.ndarray,
    block_tables: np.ndarray,
    device: torch.device | str,
    into: AttentionBatch | None = None,
) -> AttentionBatch:
    """Build a step's attention lists, and copy them to a device.

    query_lens, kv_lens: int [S], new tokens, and tokens after this step, with 1 <= query_len <= kv_len. block_tables:
    int [S, max_blocks], with at least ceil(kv_len / 16) valid entries per row; on a CPU the batch may share their
    memory. into: a recordable batch of S sequences and T tokens to write to, instead of creating one; its tables may be
    wider, and sequences without new tokens, as padding, may follow the others.
    """
    num_seqs, max_blocks = block_tables.shape
    # After a forward pass the CPU caches hold little of numpy's code: its reductions take longer than lists.
    lens, longest, device = query_lens.tolist(), max(kv_lens.tolist()), torch.device(device)
    if max(lens) == min(lens) == 1:  # decodes: each sequence has one token
        starts = np.arange(num_seqs + 1, dtype=np.int32)
        num_tokens, seq_of_token, positions = num_seqs, starts[:-1], kv_lens - 1
    else:
        starts = np.append(np.int32(0), np.cumsum(query_lens, dtype=np.int32))
        num_tokens, seq_of_token = int(starts[-1]), np.repeat(np.arange(num_seqs), query_lens)
        positions = np.arange(num_tokens) + (kv_lens - starts[1:])[seq_of_token]
    blocks, offsets = np.divmod(positions, BLOCK_TOKENS)
    slots = block_tables[seq_of_token, blocks] * np.int64(BLOCK_TOKENS) + offsets
    if into is None and device.type == "cpu":
        return AttentionBatch(
            buffer=None,
            block_tables=torch.from_numpy(np.ascontiguousarray(block_tables, np.int32)),
            query_starts=torch.from_numpy(starts),
            kv_lens=torch.from_numpy(kv_lens.astype(np.int32)),
            slot_mapping=torch.from_numpy(slots),
            positions=torch.from_numpy(positions),
            max_query_len=max(lens),
            max_kv_len=longest,
            num_seqs=num_seqs,
            num_tokens=num_tokens,
        )

    num_listed = 4 * num_tokens + 2 * num_seqs + 1
    host = torch.empty(num_listed + num_seqs * max_blocks, dtype=torch.int32, pin_memory=device.type == "cuda")
    lists = host.numpy()
    lists[: 4 * num_tokens].view(np.int64)[:] = np.concatenate((slots, positions))  # first, for alignment
    lists[4 * num_tokens :] = np.concatenate((starts, kv_lens, block_tables.reshape(-1)))
    if into is not None:
        assert into.buffer is not None
        into.buffer.copy_(host[:num_listed], non_blocking=True)
        into.block_tables[:, :max_blocks].copy_(host[num_listed:].view(num_seqs, max_blocks), non_blocking=True)
        return into
    sent = host.to(device, non_blocking=True)  # one copy for all lists
    batch = _view_attention_buffer(sent[:num_listed], sent[num_listed:].view(num_seqs, max_blocks))
    batch.max_query_len, batch.max_kv_len = max(lens), longest
    return batch


def recordable_attention_batch(block_tables: Tensor, num_tokens: int = 0) -> AttentionBatch:
    """Return a batch for graph capture: `build_attention_batch` writes steps of S sequences into it.

    block_tables: int32 [S, max_blocks], wide enough for the longest sequence; batches of several sizes may share it.
    num_tokens: tokens of every step, of which some sequences may have none; 0: one per sequence, a decode. Until a step
    is written, every sequence has one token, in block 0; or the first one has all, and its table must hold them.
    """
    num_seqs, decodes = len(block_tables), num_tokens in (0, len(block_tables))
    num_tokens = num_tokens or num_seqs
    buffer = torch.zeros(4 * num_tokens + 2 * num_seqs + 1, dtype=torch.int32, device=block_tables.device)
    batch = _view_attention_buffer(buffer, block_tables)
    batch.kv_lens.fill_(1)
    if decodes:
        batch.query_starts.copy_(torch.arange(num_seqs + 1, dtype=torch.int32))
    else:
        batch.query_starts[1:] = num_tokens
        batch.kv_lens[:1] = num_tokens
    batch.max_query_len = 1 if decodes else num_tokens
    batch.max_kv_len = block_tables.shape[1] * BLOCK_TOKENS
    return batch


def _view_attention_buffer(buffer: Tensor, block_tables: Tensor) -> AttentionBatch:
    num_seqs = len(block_tables)
    num_tokens = (len(buffer) - 2 * num_seqs - 1) // 4
    # The int64 lists come first so that they stay aligned.
    slots, positions, starts, lens = buffer.split([2 * num_tokens, 2 * num_tokens, num_seqs + 1, num_seqs])
    return AttentionBatch(
        buffer=buffer,
        block_tables=block_tables,
        query_starts=starts,
        kv_lens=lens,
        slot_mapping=slots.view(torch.int64),
        positions=positions.view(torch.int64),
        max_query_len=0,
        max_kv_len=0,
        num_seqs=num_seqs,
        num_tokens=num_tokens,
    )

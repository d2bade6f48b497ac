"""The work lists against their definition, token by token."""

import numpy as np
import pytest
import torch
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels.ops import (
    BLOCK_TOKENS,
    build_attention_batch,
    build_lora_batch,
    recordable_attention_batch,
    recordable_lora_batch,
)


@settings(deadline=None, max_examples=examples.of(60))
@given(st.lists(st.integers(-1, 5), min_size=1, max_size=200))
def test_lora_batch_lists_each_adapter_row_once(slots: list[int]) -> None:
    token_slots = np.array(slots)
    batch = build_lora_batch(token_slots, "cpu", np.arange(len(slots), dtype=np.float32))
    expected = [row for row, slot in enumerate(slots) if slot >= 0]
    if not expected:
        assert batch is None
        return
    assert batch is not None
    rows = batch.rows[: batch.num_rows].tolist()
    assert sorted(rows) == expected
    assert batch.row_scales is not None
    assert batch.row_scales[: batch.num_rows].tolist() == rows
    starts = batch.seg_starts.tolist()
    seg_slots = batch.seg_slots[: batch.num_segments].tolist()
    assert seg_slots == sorted(set(slots) - {-1})
    for segment, slot in enumerate(seg_slots):
        segment_rows = rows[starts[segment] : starts[segment + 1]]
        assert segment_rows == [row for row in expected if slots[row] == slot]
    assert (batch.uniform_slot is not None) == (len(seg_slots) == 1 and len(rows) == len(slots))
    assert batch.counts.tolist() == [
        batch.num_rows,
        batch.num_segments,
        batch.num_small_tiles,
        batch.num_large_tiles,
    ]
    for tiles, num_tiles, tile_rows in (
        (batch.small_tiles, batch.num_small_tiles, 16),
        (batch.large_tiles, batch.num_large_tiles, 64),
    ):
        covered = []
        for slot, first, count in tiles[:num_tiles].tolist():
            assert 1 <= count <= tile_rows
            assert {slots[row] for row in rows[first : first + count]} == {slot}
            covered += range(first, first + count)
        assert covered == list(range(batch.num_rows))
        assert not tiles[num_tiles:].any()


def test_lora_batch_layout_depends_on_the_token_count_alone() -> None:
    mixed = build_lora_batch(np.array([0, 4, -1, 4, 2]), "cpu")
    uniform = build_lora_batch(np.array([1, 1, 1, 1, 1]), "cpu")
    assert mixed is not None
    assert uniform is not None
    assert mixed.row_scales is None
    assert mixed.buffer.shape == uniform.buffer.shape
    mixed.buffer.copy_(uniform.buffer)
    assert mixed.counts.tolist() == [5, 1, 1, 1]
    assert mixed.rows.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("lens", [(1, 20, 16), (1, 1, 1), (2, 1, 0)])  # in the last, a sequence is padding
def test_attention_batch_places_each_token_in_its_block(lens: tuple[int, ...]) -> None:
    query_lens, kv_lens = np.array(lens), np.array([17, 33, 16])
    block_tables = np.array([[7, 3, 0], [2, 9, 4], [5, 0, 0]])
    batch = build_attention_batch(query_lens, kv_lens, block_tables, "cpu")
    assert (batch.num_seqs, batch.num_tokens, batch.max_query_len, batch.max_kv_len) == (3, sum(lens), max(lens), 33)
    token = 0
    for seq in range(3):
        assert batch.query_starts[seq] == token
        for position in range(kv_lens[seq] - query_lens[seq], kv_lens[seq]):
            assert batch.positions[token] == position
            block, offset = divmod(int(batch.slot_mapping[token]), BLOCK_TOKENS)
            assert (block, offset) == (block_tables[seq, position // BLOCK_TOKENS], position % BLOCK_TOKENS)
            token += 1
    assert batch.query_starts[3] == token
    assert torch.equal(batch.block_tables, torch.from_numpy(block_tables).int())


@pytest.mark.parametrize("num_tokens", [1, 3, 17])
def test_attention_batch_lists_are_aligned(num_tokens: int) -> None:
    batch = build_attention_batch(np.array([num_tokens]), np.array([num_tokens]), np.array([[0, 1]]), "cpu")
    assert batch.slot_mapping.data_ptr() % 8 == 0
    assert batch.positions.tolist() == list(range(num_tokens))


def test_recordable_batches_take_in_every_step_and_stay_where_they_are() -> None:
    tables = torch.full((3, 5), 8, dtype=torch.int32)
    recorded = recordable_attention_batch(tables)
    assert recorded.kv_lens.tolist() == [1, 1, 1]
    memory = {name: getattr(recorded, name).data_ptr() for name in ("positions", "kv_lens", "block_tables")}
    for kv_lens, num_blocks in (([17, 3, 40], 3), ([1, 2, 3], 1)):
        lens = np.array(kv_lens)
        step = np.arange(3 * num_blocks, dtype=np.int32).reshape(3, num_blocks)
        built = build_attention_batch(np.ones(3, np.int64), lens, step, "cpu")
        assert build_attention_batch(np.ones(3, np.int64), lens, step, "cpu", into=recorded) is recorded
        for name in ("query_starts", "kv_lens", "slot_mapping", "positions"):
            assert torch.equal(getattr(recorded, name), getattr(built, name)), name
        assert torch.equal(recorded.block_tables[:, :num_blocks], built.block_tables)
    assert memory == {name: getattr(recorded, name).data_ptr() for name in memory}
    assert tables[:, 0].tolist() == [0, 1, 2], "the tables may be shared"
    assert (recorded.max_query_len, recorded.max_kv_len) == (1, 80), "what a launch is planned from does not change"


def test_a_recordable_lora_batch_keeps_the_counts_it_was_planned_with() -> None:
    recorded = recordable_lora_batch(4, "cpu")
    slots, scales = np.array([3, -1, 3, 0]), np.array([1, 1, 0.5, 1], np.float32)
    built = build_lora_batch(slots, "cpu", scales)
    assert built is not None
    assert build_lora_batch(slots, "cpu", scales, into=recorded) is recorded
    assert torch.equal(recorded.buffer, built.buffer)
    assert (recorded.num_rows, recorded.num_segments, recorded.uniform_slot) == (4, 4, None)
    assert build_lora_batch(np.full(4, -1), "cpu", into=recorded) is None
    assert torch.equal(recorded.buffer, built.buffer), "nothing is written for a step without adapters"

"""CUDA graphs: which steps are replayed, at which size, and with what padding."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from helpers.factories import make_tiny_model

from gpu_worker.build import load_engine
from gpu_worker.cuda.graphs import StepLists, choose_size, graph_sizes, mixed_sizes
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest, NotFound

SIZES = graph_sizes(40)


def test_sizes_end_at_the_most_sequences_and_waste_little() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 3]
    assert graph_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    for max_num_seqs in (1, 2, 5, 8, 100, 256, 257, 300, 1024):
        sizes = graph_sizes(max_num_seqs)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == max_num_seqs
        assert len(sizes) <= 60
        for num in range(1, max_num_seqs + 1):
            size = next(size for size in sizes if size >= num)
            assert size - num < max(4, min(8, num), num / 8)


@pytest.mark.parametrize(("num_seqs", "size"), [(1, 1), (3, 4), (8, 8), (9, 16), (39, 40), (40, 40), (41, None)])
def test_a_step_of_decodes_takes_the_least_size_that_holds_it(num_seqs: int, size: int | None) -> None:
    ones = np.ones(num_seqs, np.int64)
    assert choose_size(SIZES, ones, ones.astype(bool)) == size


def test_steps_with_prompts_are_not_replayed() -> None:
    complete = np.array([True, True])
    assert choose_size(SIZES, np.array([1, 1]), complete) == 2
    assert choose_size(SIZES, np.array([1, 5]), complete) is None
    assert choose_size(SIZES, np.array([1, 1]), np.array([True, False])) is None, "one token of a longer prompt"


TABLES = np.array([[3, 4], [5, 0]], np.int32)


def test_padding_has_no_adapter_and_lies_in_the_dummy_block() -> None:
    lists = StepLists(
        np.array([7, 8]), np.ones(2, np.int64), np.array([20, 9]), TABLES, np.array([2, -1], np.int32),
        np.array([0.5, 1], np.float32), np.arange(2),
    )  # fmt: skip
    padded = lists.padded_decodes(4, dummy_block=9)
    assert padded.input_ids.tolist() == [7, 8, 0, 0]
    assert padded.query_lens.tolist() == [1] * 4
    assert padded.kv_lens.tolist() == [20, 9, 1, 1]
    assert padded.block_tables.tolist() == [[3, 4], [5, 0], [9, 9], [9, 9]]
    assert padded.slots.tolist() == [2, -1, -1, -1]
    assert padded.scales.tolist() == [0.5, 1, 1, 1]
    assert {name: getattr(padded, name).dtype for name in padded.__slots__} == {
        name: getattr(lists, name).dtype for name in lists.__slots__
    }
    assert lists.padded_decodes(2, dummy_block=9).block_tables.tolist() == TABLES.tolist()


def test_the_padding_of_a_mixed_step_is_one_sequence() -> None:
    slots = np.array([1, 1, 1, 0], np.int32)
    lists = StepLists(
        np.arange(4), np.array([3, 1]), np.array([20, 9]), TABLES, slots, np.ones(4, np.float32), np.array([2, 3])
    )
    padded = lists.padded(40, 5, dummy_block=9)
    assert padded.query_lens.tolist() == [3, 1, 36, 0, 0]
    assert padded.kv_lens.tolist() == [20, 9, 36, 1, 1]
    assert padded.block_tables[2:].tolist() == [[9, 9, 9]] * 3
    assert padded.slots.tolist() == [1, 1, 1, 0, *[-1] * 36]
    assert padded.rows.tolist() == [2, 3, 0, 0, 0]
    assert len(padded.input_ids) == 40


@pytest.mark.parametrize(
    ("slots", "tiles"), [([-1] * 9, "none"), ([0] * 31, "small"), ([0] * 32, "large"), ([0, 1] * 31 + [-1], "small")]
)
def test_tiles_are_those_that_the_kernels_choose(slots: list[int], tiles: str) -> None:
    num = len(slots)
    lists = StepLists(
        np.arange(num), np.array([num]), np.array([num]), TABLES, np.array(slots, np.int32), np.ones(num, np.float32),
        np.array([num - 1]),
    )  # fmt: skip
    assert lists.tiles == tiles


def test_mixed_steps_are_recorded_up_to_where_launches_count() -> None:
    assert mixed_sizes(256, 0) == []
    assert mixed_sizes(4, 24) == [(24, 5)]
    assert mixed_sizes(64, 100) == [(64, 9), (64, 65), (100, 9), (100, 65)]
    assert len(mixed_sizes(256, 2048)) == 12
    assert max(mixed_sizes(256, 2048)) == (512, 257)


def test_graphs_are_refused_where_there_is_no_gpu(tmp_path: Path) -> None:
    def fetch(digest: str) -> NoReturn:
        raise NotFound(digest)

    make_tiny_model(tmp_path / "model")
    settings = Settings(model=str(tmp_path / "model"), device="cpu", cuda_graphs="on", kv_cache_bytes=1 << 24)
    with pytest.raises(BadRequest, match="the device is cpu"):
        load_engine(settings, fetch)

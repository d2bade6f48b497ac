"""Which steps are replayed, at which size, with what padding."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from helpers.factories import make_tiny_model

from gpu_worker.build import load_engine
from gpu_worker.cuda.graphs import DecodeLists, choose_size, graph_sizes
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


def test_padding_has_no_adapter_and_lies_in_the_dummy_block() -> None:
    tables = np.array([[3, 4], [5, 0]], np.int32)
    lists = DecodeLists(
        np.array([7, 8]), np.array([20, 9]), tables, np.array([2, -1], np.int32), np.array([0.5, 1], np.float32)
    )
    padded = lists.padded(4, dummy_block=9)
    assert padded.input_ids.tolist() == [7, 8, 0, 0]
    assert padded.kv_lens.tolist() == [20, 9, 1, 1]
    assert padded.block_tables.tolist() == [[3, 4], [5, 0], [9, 0], [9, 0]]
    assert padded.slots.tolist() == [2, -1, -1, -1]
    assert padded.scales.tolist() == [0.5, 1, 1, 1]
    assert {name: getattr(padded, name).dtype for name in padded.__slots__} == {
        name: getattr(lists, name).dtype for name in lists.__slots__
    }
    assert lists.padded(2, dummy_block=9).block_tables.tolist() == tables.tolist()


def test_graphs_are_refused_where_there_is_no_gpu(tmp_path: Path) -> None:
    def fetch(digest: str) -> NoReturn:
        raise NotFound(digest)

    make_tiny_model(tmp_path / "model")
    settings = Settings(model=str(tmp_path / "model"), device="cpu", cuda_graphs="on", kv_cache_bytes=1 << 24)
    with pytest.raises(BadRequest, match="the device is cpu"):
        load_engine(settings, fetch)

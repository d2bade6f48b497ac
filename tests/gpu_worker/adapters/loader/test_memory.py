"""Files of memory that the loader reuses for its next adapters: which ones it gets, and the limit on kept bytes."""

from __future__ import annotations

import os
from contextlib import closing

import pytest
from helpers.processes import num_open_files

from gpu_worker.adapters.loader.memory import ROUND_BYTES, AnonymousFile, KeptFiles, copy_of


def test_a_file_is_used_again_for_an_adapter_of_about_its_size() -> None:
    kept = KeptFiles()
    first = kept.take(3 * ROUND_BYTES)
    kept.give_back(first)
    with closing(kept.take(ROUND_BYTES // 2)) as small:  # the kept file is much larger than asked for
        assert small is not first
        assert kept.take(2 * ROUND_BYTES) is first
        with closing(kept.take(2 * ROUND_BYTES)) as another:
            assert another is not first
    first.close()


@pytest.mark.parametrize("num_bytes", [0, 1, ROUND_BYTES + 1])
def test_there_is_room_for_any_number_of_bytes(num_bytes: int) -> None:
    kept = KeptFiles()
    with closing(kept.take(num_bytes)) as file:
        assert len(file.view(num_bytes)) == num_bytes


def test_what_is_kept_has_a_limit_and_large_files_drive_out_none() -> None:
    kept = KeptFiles(3 * ROUND_BYTES)
    small, large = [kept.take(ROUND_BYTES) for _ in range(4)], kept.take(4 * ROUND_BYTES)
    before = num_open_files()
    for file in (*small, large):
        kept.give_back(file)
    assert num_open_files() == before - 2 * 2  # a small file and the large one; each mapping has its own descriptor
    assert [kept.take(ROUND_BYTES) for _ in range(3)] == small[1:]
    for file in small[1:]:
        file.close()


def test_a_file_has_the_content_that_is_copied_into_it() -> None:
    file = AnonymousFile(10)
    file.view(10)[:] = b"0123456789"
    fd = copy_of(file.view(7))
    file.close()
    assert os.pread(fd, 100, 0) == b"0123456"
    os.close(fd)

"""Memory in reserve: a size is available after a first request, the total is limited, and adapters load without it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest
from helpers.processes import num_open_files

from gpu_worker.adapters.loader.memory import ROUND_BYTES, copy_of
from gpu_worker.adapters.loader.reserve import NUM_ASKED, MemoryReserve
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the reserve is Linux's alone")

MAX_FILES = 4
PATIENCE_S = 240.0
"""Timeout, s: the process that makes the files runs at idle priority, so a busy machine delays it."""


@pytest.fixture
def reserve() -> Iterator[MemoryReserve]:
    with closing(MemoryReserve(MAX_FILES * ROUND_BYTES)) as started:
        started.start()
        yield started


async def taken(reserve: MemoryReserve, num_bytes: int) -> int:
    """Take a file from the reserve as soon as one is available."""
    text = f"a file for {num_bytes} bytes is in reserve"
    return await wait_until(lambda: reserve.take(num_bytes), text, timeout_s=PATIENCE_S)


async def test_a_file_in_reserve_has_its_memory_and_nothing_in_it(reserve: MemoryReserve) -> None:
    assert reserve.take(ROUND_BYTES + 1) is None, "nobody asked for such a size before"
    fd = await taken(reserve, ROUND_BYTES + 1)
    status = os.fstat(fd)
    assert (status.st_size, 512 * status.st_blocks) == (2 * ROUND_BYTES, 2 * ROUND_BYTES)
    assert os.pread(fd, 3 * ROUND_BYTES, 0) == bytes(2 * ROUND_BYTES)
    os.close(fd)


async def test_what_is_copied_into_a_file_in_reserve_is_all_that_it_has(reserve: MemoryReserve) -> None:
    fd = copy_of(memoryview(b"rows"), await taken(reserve, 4))
    assert os.pread(fd, 100, 0) == b"rows"
    assert os.fstat(fd).st_size == 4
    os.close(fd)


async def test_the_reserve_grows_while_files_are_taken_up_to_its_limit(reserve: MemoryReserve) -> None:
    reserve.take(1)
    assert reserve.num_bytes == NUM_ASKED * ROUND_BYTES
    for _ in range(3 * MAX_FILES):
        os.close(await taken(reserve, 1))
        assert reserve.num_bytes <= MAX_FILES * ROUND_BYTES
    assert reserve.take((MAX_FILES + 1) * ROUND_BYTES) is None
    assert reserve.num_bytes >= (MAX_FILES - 1) * ROUND_BYTES, "what can never be in reserve drives nothing out"


async def test_files_of_other_sizes_give_way(reserve: MemoryReserve) -> None:
    while reserve.num_bytes < (MAX_FILES - 1) * ROUND_BYTES:
        os.close(await taken(reserve, 1))
    held = await wait_until(lambda: come(reserve), "another one of that size has come", timeout_s=PATIENCE_S)
    os.close(await taken(reserve, MAX_FILES * ROUND_BYTES))
    assert reserve.num_bytes == MAX_FILES * ROUND_BYTES, "the next one of that size"
    for fd, inode in held:
        with suppress(OSError):  # it is closed; its number may belong to another file by now
            assert os.fstat(fd).st_ino != inode


def come(reserve: MemoryReserve) -> list[tuple[int, int]]:
    """Return the descriptors and inodes of the files in reserve, without ordering more."""
    assert reserve.take(MAX_FILES * ROUND_BYTES + 1) is None, "more than all that it may have"
    return [(fd, os.fstat(fd).st_ino) for _, fd in reserve._files]


async def test_where_the_process_is_gone_there_is_nothing_in_reserve(reserve: MemoryReserve) -> None:
    os.close(await taken(reserve, 1))
    os.kill(reserve.pid, signal.SIGKILL)
    while (fd := reserve.take(1)) is not None:  # files made before the process died
        os.close(fd)
    await asyncio.to_thread(os.waitid, os.P_PID, reserve.pid, os.WEXITED | os.WNOWAIT)
    assert [reserve.take(1) for _ in range(3)] == [None] * 3
    assert reserve.num_bytes == 0


def test_where_no_process_can_be_started_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    num_open = num_open_files()
    reserve = MemoryReserve()
    reserve.start()
    assert reserve.take(1) is None
    assert reserve.num_bytes == 0
    assert num_open_files() == num_open

"""Memory: budgets, and caches whose pages are not allocated before use."""

from __future__ import annotations

import mmap
import re
import threading
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from gpu_worker.build import usable_bytes
from gpu_worker.host_memory import MemoryBudget, let_go_of_libraries, unchanged_libraries
from gpu_worker.memory import CacheBytes, GiB, MemoryAhead, free_bytes, share_out, zeros
from protocol.runtime.settings import Settings
from protocol.wire.errors import Unavailable

CPU = torch.device("cpu")
MiB = 1 << 20


def test_zeros_take_memory_where_they_are_written() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    tensor = zeros((64, 1024, 1024), torch.bfloat16, CPU)
    assert process.memory_info().rss - before < tensor.nbytes // 4
    assert not tensor[::7, ::13].any()
    tensor[3, 5] = 1
    assert tensor[3].sum() == 1024


def test_nothing_is_zeros_too() -> None:
    assert zeros((0, 5), torch.float32, CPU).shape == (0, 5)


def grown(process: psutil.Process, before: int) -> float:
    """Return the MiB by which a process's memory has grown."""
    return (process.memory_info().rss - before) / MiB


def test_memory_is_provided_ahead_of_use() -> None:
    """A cache of 64 units of 1 MiB gets 8 at first, later as many as are used. Written numbers stay."""
    process = psutil.Process()
    tensors = [zeros((128, 256 * 1024), torch.uint8, CPU) for _ in range(2)]
    tensors[0][5] = 7
    before = process.memory_info().rss
    ahead = MemoryAhead(tensors, rows=2)
    for num_used, wanted in ((0, 8), (3, 11), (20, 40), (10, 40), (60, 64), (64, 64)):
        for tensor in tensors:
            tensor[6 : 2 * num_used, ::4096] = 0
        while ahead.extend(num_used):
            pass
        assert ahead.num_provided == wanted
        assert abs(grown(process, before) - wanted) < 3
    assert tensors[0].sum() == 7 * 256 * 1024
    assert not tensors[1].any()


def test_little_memory_is_provided_at_a_time() -> None:
    small, large = zeros((64, 256 * 1024), torch.uint8, CPU), zeros((4, 3 * MiB), torch.uint8, CPU)
    for tensor, units in ((small, 4), (large, 1)):
        ahead = MemoryAhead([tensor])
        assert ahead.extend(0)
        assert ahead.num_provided == units


def test_no_memory_is_provided_while_little_is_free() -> None:
    free = [64 * MiB - 1]
    ahead = MemoryAhead([zeros((64, MiB), torch.uint8, CPU)], free_bytes=lambda: free[0])
    assert not ahead.extend(8)
    assert ahead.num_provided == 8
    free[0] += 1
    assert ahead.extend(8)
    assert ahead.num_provided == 9


def test_memory_that_the_system_refuses_is_not_asked_for_again() -> None:
    """A file mapped for reading cannot be written to, and older systems refuse every request."""
    pages = np.frombuffer(mmap.mmap(-1, 16 * MiB, access=mmap.ACCESS_READ), np.uint8)
    with warnings.catch_warnings(action="ignore"):  # torch warns that it is not writable
        tensor = torch.from_numpy(pages).view(16, -1)
    asked: list[int] = []

    def free() -> int:
        asked.append(1)
        return GiB

    ahead = MemoryAhead([tensor], free_bytes=free)
    assert not ahead.extend(0)
    assert not ahead.extend(1)
    assert len(asked) == 1


def test_nothing_is_provided_for_caches_without_units() -> None:
    for tensors in ([], [zeros((0, 5), torch.float32, CPU)], [torch.empty(5, 5, device="meta")]):
        ahead = MemoryAhead(tensors)
        assert not ahead.extend(0)
        assert not ahead.extend(3)


def test_caches_of_a_cpu_are_bounded_shares_or_as_given() -> None:
    assert share_out(8000, Settings(), on_cpu=True) == CacheBytes(2000, 2000, 400)
    assert share_out(100 * GiB, Settings(), on_cpu=True) == CacheBytes(2 * GiB, 2 * GiB, 2 * GiB)
    assert share_out(8000, Settings(kv_cache_bytes=5, adapter_extra_bytes=7), on_cpu=True) == CacheBytes(5, 2000, 7)


def test_caches_of_a_gpu_fill_what_there_is() -> None:
    assert share_out(1000, Settings(), on_cpu=False) == CacheBytes(660, 280, 60)
    assert share_out(200 * GiB, Settings(), on_cpu=False) == CacheBytes(176 * GiB, 16 * GiB, 8 * GiB)
    given = Settings(adapter_pool_bytes=100, adapter_extra_bytes=50)
    assert share_out(1000, given, on_cpu=False) == CacheBytes(850, 100, 50)


def test_a_gpu_is_filled_up_to_the_part_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that other processes hold counts: of 100 bytes 60 are free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60, 100))
    for utilization, usable in ((0.75, 35), (1.0, 60), (0.25, 0)):
        assert usable_bytes(torch.device("cuda"), Settings(gpu_memory_utilization=utilization)) == usable


def test_there_is_memory() -> None:
    assert 0 < free_bytes(CPU) <= psutil.virtual_memory().total


def test_large_pieces_are_had_one_after_another_and_small_ones_at_once() -> None:
    budget = MemoryBudget(60.0, small_bytes=10, free_bytes=lambda: 100)
    order: list[str] = []

    def second() -> None:
        with budget.hold(60):
            order.append("second")

    thread = threading.Thread(target=second)
    with budget.hold(60):
        thread.start()
        with budget.hold(10), budget.hold(40):
            order.append("small ones")
        assert thread.is_alive()
        order.append("first ends")
    thread.join()
    assert order == ["small ones", "first ends", "second"]


def test_what_never_has_room_is_refused() -> None:
    budget = MemoryBudget(0.001, small_bytes=10, free_bytes=lambda: 100)
    with pytest.raises(Unavailable, match="needs 101 bytes"), budget.hold(101):
        pass
    with budget.hold(60), pytest.raises(Unavailable), budget.hold(41):
        pass
    with budget.hold(100):
        pass


SMAPS = """\
7f00-7f10 r-xp 00000000 fe:00 1                          /usr/lib/libcode.so.6
Rss:                  40 kB
Anonymous:             {code} kB
Swap:                  0 kB
7f10-7f20 r--p 00000000 fe:00 1                          /usr/lib/libfilled with addresses.so
Anonymous:             8 kB
Swap:                  0 kB
7f20-7f30 r--p 00000000 fe:00 1                          /usr/lib/libswapped.so
Anonymous:             0 kB
Swap:                  4 kB
7f30-7f40 rw-p 00000000 fe:00 1                          /usr/lib/libvariables.so
Anonymous:             0 kB
Swap:                  0 kB
7f40-7f50 r--p 00000000 fe:00 1                          /models/weights.safetensors
Anonymous:             0 kB
Swap:                  0 kB
7f50-7f60 r--p 00000000 00:00 0
Anonymous:             0 kB
Swap:                  0 kB
"""


def test_libraries_with_pages_of_our_own_are_kept() -> None:
    assert unchanged_libraries(SMAPS.format(code=0)) == [(0x7F00, 0x7F10)]
    assert unchanged_libraries(SMAPS.format(code=4)) == []


def test_libraries_that_were_let_go_of_go_on_working() -> None:
    expected = torch.linspace(0, 1, 50).softmax(0)
    let_go_of_libraries()
    torch_code = re.search(r"r-xp .*libtorch_cpu.so(?:\n.*)+?\nRss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    assert torch_code is not None
    assert int(torch_code[1]) < 10_000  # right after an import it is 45 MB
    assert torch.equal(torch.linspace(0, 1, 50).softmax(0), expected)

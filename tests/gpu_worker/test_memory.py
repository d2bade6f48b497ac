"""Memory: budgets, and caches that take none before they are used."""

from __future__ import annotations

import threading

import psutil
import pytest
import torch

from gpu_worker.host_memory import MemoryBudget
from gpu_worker.memory import free_bytes, share, zeros
from protocol.wire.errors import Unavailable

CPU = torch.device("cpu")


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


def test_a_budget_is_as_given_or_a_bounded_share() -> None:
    assert share(123, 1000, 0.5, 10) == 123
    assert share(0, 1000, 0.5, 10_000) == 500
    assert share(0, 1000, 0.5, 10) == 10


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

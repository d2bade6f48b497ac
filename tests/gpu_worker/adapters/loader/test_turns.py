"""Turns: one thread at a time, in the order of requests; a failure does not lose a turn."""

from __future__ import annotations

import asyncio
import threading

import pytest
from helpers.waiting import wait_until

from gpu_worker.adapters.loader.turns import FifoLock


def test_turns_go_to_the_earliest_request_that_waits() -> None:
    turns = FifoLock()
    done: list[int] = []

    def work(number: int) -> None:
        with turns.take(number):
            done.append(number)

    with turns.take(9):
        threads = [threading.Thread(target=work, args=(number,)) for number in (5, 2, 8, 2, 3)]
        for num, thread in enumerate(threads, 1):
            thread.start()
            asyncio.run(wait_until(lambda num=num: turns.num_waiting == num, f"{num} threads wait"))
        assert not done
    for thread in threads:
        thread.join()
    assert done == [2, 2, 3, 5, 8]
    with turns.take(1):
        pass


def test_a_turn_that_fails_is_passed_on() -> None:
    turns = FifoLock()
    with pytest.raises(ValueError, match="a fault"), turns.take(1):
        raise ValueError("a fault")
    with turns.take(2):
        pass

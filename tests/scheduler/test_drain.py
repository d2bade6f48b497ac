"""The measured drain rate is that of a busy fleet, whatever happens while there is little work."""

from __future__ import annotations

import pytest

from scheduler.drain import DrainRate


def test_only_busy_time_counts() -> None:
    drain = DrainRate()
    for second in range(100):
        drain.observe(second, second, False)  # one per second, and no request waits
    assert drain.rate == 0.0
    ended = 100
    for second in range(100, 110):
        drain.observe(second, ended, True)
        ended += 20
    assert drain.rate == pytest.approx(20.0)
    for second in range(110, 200):
        drain.observe(second, ended, False)
    assert drain.rate == pytest.approx(20.0)


def test_requests_that_end_in_waves_give_their_mean() -> None:
    drain = DrainRate()
    rates: list[float] = []
    for second in range(200):
        drain.observe(second, 64 * (second // 10), True)
        if second > 60:
            rates.append(drain.rate)
    assert min(rates) > 4.2
    assert max(rates) < 8.6


def test_a_new_pace_is_learnt_within_its_window() -> None:
    drain = DrainRate()
    ended = 0
    for second in range(100):
        drain.observe(second, ended, True)
        ended += 10 if second < 60 else 2
    assert drain.rate == pytest.approx(2.0)

"""The estimated time that calls take to reach the queue."""

from __future__ import annotations

import pytest

from gateway.overload.inbound import Inbound

CROWD = 128
TICK_S = 0.1


class Clocked:
    """Inbound calls with a scripted clock."""

    def __init__(self) -> None:
        self.inbound = Inbound(CROWD, span_s=1.5)
        self.now_s = 0.0

    def begin(self, num: int) -> None:
        for _ in range(num):
            self.inbound.begin(self.now_s)

    def end(self, num: int, *, reached_queue: bool = True) -> None:
        for _ in range(num):
            self.inbound.end(self.now_s, reached_queue=reached_queue)

    @property
    def wait_s(self) -> float:
        return self.inbound.wait_s(self.now_s)

    def run(self, seconds: float, rate: int) -> None:
        """Let `rate` calls per second reach the queue."""
        for _ in range(round(seconds / TICK_S)):
            self.now_s += TICK_S
            self.end(round(rate * TICK_S))


def test_the_wait_is_the_crowd_over_its_rate() -> None:
    way = Clocked()
    way.begin(1000)
    assert way.wait_s == 0.0  # the rate is unknown
    way.run(2.0, rate=100)
    assert way.inbound.num == 800
    assert way.wait_s == pytest.approx(8.0, rel=0.02)


def test_what_ends_on_its_way_is_no_progress() -> None:
    way = Clocked()
    way.begin(1000)
    for _ in range(20):
        way.run(TICK_S, rate=100)
        way.end(10, reached_queue=False)
    assert way.inbound.num == 600
    assert way.wait_s == pytest.approx(6.0, rel=0.02)


def test_an_idle_gateway_does_not_forget_how_fast_it_is() -> None:
    way = Clocked()
    way.begin(1000)
    way.run(2.0, rate=100)
    way.end(800, reached_queue=False)
    way.now_s += 3600
    way.begin(400)
    assert way.wait_s == pytest.approx(4.0, rel=0.02)
    way.begin(200)
    assert way.wait_s == pytest.approx(6.0, rel=0.02)


def test_a_gateway_where_nothing_gets_through_notices() -> None:
    way = Clocked()
    way.begin(1000)
    way.run(2.0, rate=100)
    way.now_s += 3.0
    assert way.wait_s > 15.0
    way.now_s += 3.0
    assert way.wait_s > 1000.0
    way.end(800 - CROWD, reached_queue=False)
    assert way.wait_s > 100.0
    way.end(1)
    assert way.wait_s == 0.0


def test_a_crowd_is_not_judged_by_how_few_came_before() -> None:
    way = Clocked()
    for _ in range(100):  # one call per 0.1 s, as no more arrived
        way.begin(1)
        way.run(TICK_S, rate=10)
    way.begin(400)
    for _ in range(14):  # neither by the time in which all are read and none can be submitted yet
        way.now_s += TICK_S
        assert way.wait_s == 0.0
    way.end(400)
    way.now_s += TICK_S
    way.begin(1000)
    assert way.wait_s == 0.0


def test_a_clock_that_is_set_back_does_no_harm() -> None:
    way = Clocked()
    way.begin(1000)
    way.now_s -= 3600
    way.end(1, reached_queue=False)
    way.begin(1)
    way.run(2.0, rate=100)
    assert way.wait_s == pytest.approx(8.0, rel=0.02)

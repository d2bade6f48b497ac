"""The fleet's time is that of the queue's server, whatever a service's host has as its time."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from helpers.script_queue import Queue

from protocol.queue.bus import Bus
from protocol.wire.clock import CLOCK, FleetClock, now_ms

HOUR_NS = 3600 * 10**9


def set_clock(wrong_ns: int) -> None:
    """Make this process believe that its time is ahead by `wrong_ns`."""
    now_ns = time.monotonic_ns()
    CLOCK.learn(time.time_ns() + wrong_ns, now_ns, now_ns)


@pytest.fixture(autouse=True)
def right_again() -> Iterator[None]:
    yield
    set_clock(0)


@pytest.mark.parametrize("wrong_ns", [HOUR_NS, -HOUR_NS])
async def test_a_service_on_a_host_with_a_wrong_clock_has_the_fleets_time(queue: Queue, wrong_ns: int) -> None:
    set_clock(wrong_ns)  # as in a process that starts there
    assert abs(now_ms() - time.time() * 1000) > 3_000_000
    bus = Bus(queue.bus.url)
    await bus.memory()  # the first command on this connection
    assert abs(now_ms() - time.time() * 1000) < 60_000
    await bus.close()


async def test_a_server_whose_clock_is_set_is_followed(queue: Queue) -> None:
    await queue.bus.restarted()
    set_clock(HOUR_NS)  # as if the server's clock had been set back
    await queue.bus.restarted()
    assert abs(now_ms() - time.time() * 1000) < 60_000


async def test_workers_are_counted_whatever_the_clock_of_the_gateway(queue: Queue) -> None:
    keys = queue.keys
    await queue.bus.members.beat(keys.worker_beat("w"), keys.workers, "w", b"", 4000)
    set_clock(HOUR_NS)
    gateway = Bus(queue.bus.url, keys)
    await gateway.memory()  # any first command
    assert (await gateway.members.summary(4000)).num_workers == 1
    await gateway.close()


def test_a_jump_of_the_hosts_clock_changes_nothing() -> None:
    walls = [time.time_ns()]
    known = FleetClock(walls.pop)
    assert 0 <= known.ns() - time.time_ns() + 10**9 < 60 * 10**9
    assert not walls, "it was asked, and is not asked again"


def test_a_slow_answer_moves_no_estimate_that_it_allows() -> None:
    known = FleetClock()
    for told, asked_at, heard_at, offset in (
        (1_000, 100, 100, 900),
        (2_000, 600, 1_200, 900),  # read at some time in between: 800 to 1,400 ahead of the monotonic clock
        (2_000, 1_200, 1_300, 800),
        (2_000, 900, 950, 1_050),
    ):
        known.learn(told * HOUR_NS, asked_at * HOUR_NS, heard_at * HOUR_NS)
        assert round((known.ns() - time.monotonic_ns()) / HOUR_NS) == offset

"""Requests while there is no worker: how long they wait for one, and which do not wait."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.queue.bus import Bus
from protocol.wire.error_codec import error_from
from scheduler.config import SchedulerConfig
from scheduler.core import Scheduler
from tests.scheduler.fakes import FakeWorker, becomes, make_submit, running_scheduler, state, submit
from tests.scheduler.test_workers import beat

WAIT_S = 5.0


def scheduler(wait_s: float = WAIT_S) -> Scheduler:
    return Scheduler(SchedulerConfig(wait_for_worker_s=wait_s))


def ask(scheduler: Scheduler, rid: str, submitted_ms: int, **more: Any) -> None:
    scheduler.submit(make_submit(rid, submitted_ms=submitted_ms, **more), 0)


def test_a_request_ends_once_it_and_the_fleet_were_alone_for_long_enough() -> None:
    fleet = scheduler()
    ask(fleet, "old", -60_000)
    ask(fleet, "new", 3000)
    assert fleet.unserved(0) == []  # there may have been a worker until now
    assert fleet.unserved(4999) == []
    assert fleet.unserved(5000) == ["old"]
    fleet.forget("old")
    assert fleet.unserved(7999) == []
    assert fleet.unserved(8000) == ["new"]


def test_a_worker_lets_the_wait_begin_again() -> None:
    fleet = scheduler()
    ask(fleet, "r", 0)
    assert fleet.unserved(0) == []
    fleet.beats({"w": beat("w")}, 0.0)
    assert fleet.unserved(60_000) == []
    fleet.remove_worker("w")
    assert fleet.unserved(61_000) == []
    assert fleet.unserved(65_999) == []
    assert fleet.unserved(66_000) == ["r"]


@pytest.mark.parametrize(
    ("wait_s", "gateway"), [(0.0, "g"), (WAIT_S, "")], ids=["without the setting", "a job, for which nobody waits"]
)
def test_others_wait_until_their_deadline(wait_s: float, gateway: str) -> None:
    fleet = scheduler(wait_s)
    ask(fleet, "r", 0, gateway=gateway)
    assert fleet.unserved(0) == []
    assert fleet.unserved(1e9) == []


async def test_the_end_is_told_and_what_waits_on_is_served(bus: Bus) -> None:
    await submit(bus, make_submit("call"), make_submit("job", gateway=""))
    async with running_scheduler(bus, wait_for_worker_s=0.01):
        await becomes(bus, "call", "failed")
        owned = (await bus.requests(["call"]))[0]
        assert owned is not None
        error = error_from(owned.error)
        assert (error.status, error.code) == (503, "no_worker")
        assert "wait_for_worker_s, 0.01 s" in str(error)
        assert await state(bus, "job") == "queued"
        worker = await FakeWorker(bus, "w1").join()
        await worker.run(lambda: bool(worker.batches) and not worker.held)
        await becomes(bus, "job", "completed", worker)

"""Workers of several versions: what gateways are told of them."""

from __future__ import annotations

from helpers.waiting import wait_until

from protocol.queue.bus import Bus
from protocol.wire import messages as m
from tests.scheduler.fakes import FakeWorker, running_scheduler


async def test_the_status_tells_what_some_worker_knows(bus: Bus) -> None:
    await FakeWorker(bus, "old").join()
    await FakeWorker(bus, "new", knows=["later"]).join()

    async def told() -> bool:
        status = await bus.get(bus.keys.status, m.SchedulerStatus)
        return status is not None and status.knows == ["later"]

    async with running_scheduler(bus):
        await wait_until(told, "the newest worker's fields are told")

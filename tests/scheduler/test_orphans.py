"""A request whose worker is neither there nor registered: found by looking at the requests themselves."""

from __future__ import annotations

import pytest

from protocol.queue.bus import Bus, StepResult, StepRow
from protocol.wire import messages as m
from scheduler.config import SchedulerConfig
from scheduler.core import Scheduler
from scheduler.recovery import Recovery
from tests.scheduler.fakes import make_submit, submit

TOKENS = b"\1\0\0\0\2\0\0\0"


async def assign(bus: Bus, rid: str, wid: str) -> None:
    await bus.streams.create(bus.keys.work(wid), 3600)
    await bus.members.beat(bus.keys.worker_beat(wid), bus.keys.workers, wid, b"", 4000)
    await submit(bus, make_submit(rid))
    assert (await bus.assign(wid, [(m.Assigned(rid, 1, ""), 0)]))[0] == "ok"
    assert not await bus.step(wid, StepResult(rows=[StepRow(rid, 1, 0, TOKENS)]))


@pytest.mark.parametrize("cancelled", [False, True])
async def test_what_is_assigned_to_nobody_is_queued_again_with_its_tokens(bus: Bus, cancelled: bool) -> None:
    await assign(bus, "kept", "w1")
    await assign(bus, "orphan", "w2")
    if cancelled:
        await bus.cancel("orphan")
    await bus.members.leave("w2")
    recovery = Recovery(bus, Scheduler(SchedulerConfig()), 3)
    assert await recovery.find_orphans() == 1
    kept, orphan = await bus.requests(["kept", "orphan"])
    assert kept is not None
    assert orphan is not None
    assert (kept.state, kept.epoch) == ("assigned", 1)
    assert (orphan.state, orphan.num_output_tokens) == ("cancelled" if cancelled else "queued", 2)
    assert await bus._redis.xlen(bus.keys.sub("interactive")) == (0 if cancelled else 1)
    assert await recovery.find_orphans() == 0


async def test_what_has_no_work_entry_is_queued_again(bus: Bus) -> None:
    """One end of an entry is lost with the queue's last second; the next end of the entry deletes it."""
    await assign(bus, "kept", "w1")
    await assign(bus, "orphan", "w2")
    (entry, _), *_ = await bus.streams.entries(bus.keys.work("w2"))
    assert not await bus.step("w2", StepResult(done_entries=[entry]))
    scheduler = Scheduler(SchedulerConfig())
    recovery = Recovery(bus, scheduler, 3)
    await recovery.rebuild()
    assert not scheduler.is_assigned_to("orphan", "w2")
    assert await recovery.find_orphans() == 1
    kept, orphan = await bus.requests(["kept", "orphan"])
    assert kept is not None
    assert orphan is not None
    assert (kept.state, kept.epoch) == ("assigned", 1)
    assert (orphan.state, orphan.num_output_tokens) == ("queued", 2)

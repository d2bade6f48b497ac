"""The scheduler on a real queue learns of bases in time: until then no request goes to a worker of another base."""

from __future__ import annotations

from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from scheduler.fairness import VirtualTokenCounters
from scheduler.session import Lease, Session
from tests.scheduler.fakes import FakeWorker, holds, make_submit, running_scheduler, submit


def served(name: str) -> m.ServedModel:
    return m.ServedModel(
        model=name, name=name, fingerprint="f", model_type="t", vocab_size=9, max_model_len=9, sites=[], weights=name
    )


async def join(bus: Bus, wid: str, base: str) -> FakeWorker:
    beat = m.WorkerBeat(wid=wid, name=wid, capacity=8)
    await bus.members.join(beat, served(base), 60_000, fleet=[base])
    return FakeWorker(bus, wid, base=base)


async def test_a_request_of_a_base_that_has_just_come_waits_for_its_worker(bus: Bus) -> None:
    """Even before the scheduler has read the workers again."""
    await join(bus, "w1", "a")
    leading = Session(bus, Settings(), Lease("", "", 500), VirtualTokenCounters(1.0))
    leading._last_ids = await leading._recovery.rebuild()
    await join(bus, "w2", "b")
    await submit(bus, make_submit("b", base="b"), make_submit("a", base="a"))
    await leading._read()
    plan = leading.scheduler.plan(0.0)
    assert {wid: [request.rid for request in batch] for wid, batch in plan.batches.items()} == {"w1": ["a"]}
    await leading._watch_workers(0.0)
    plan = leading.scheduler.plan(0.0)
    assert {wid: [request.rid for request in batch] for wid, batch in plan.batches.items()} == {"w2": ["b"]}


async def test_a_new_leader_knows_the_bases_before_it_reads_what_is_queued(bus: Bus) -> None:
    first = await (await join(bus, "w1", "a")).join()
    second = await join(bus, "w2", "b")
    await bus.members.leave("w2")
    await submit(bus, *(make_submit(f"b{i}", base="b") for i in range(4)), make_submit("a", base="a"))
    async with running_scheduler(bus):
        await holds(first, "a")
        await second.join()
        await holds(second, "b0", "b1", "b2", "b3")
        assert set(first.held) == {"a"}

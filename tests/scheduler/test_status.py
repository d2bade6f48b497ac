"""What the scheduler publishes of itself, and when."""

from __future__ import annotations

from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from scheduler import session
from scheduler.fairness import VirtualTokenCounters


async def test_that_nothing_runs_any_more_is_told_within_a_pause(bus: Bus) -> None:
    """Whoever has its last answer reads zero from then on, and not what the last round has told."""
    own = session.Session(
        bus, Settings(redis_url=bus.url), session.Lease("t:1", "c", 10_000), VirtualTokenCounters(1e6)
    )  # fmt: skip
    running = m.SchedulerStatus(queued=0, running=1, workers=1, drain_rate=0.0)
    await bus.set(bus.keys.status, running, 60_000)
    own._told_running = True
    await own._pause()
    told = await bus.get(bus.keys.status, m.SchedulerStatus)
    assert told is not None
    assert told.running == 0
    await bus._redis.delete(bus.keys.status)
    await own._pause()  # once is enough
    assert await bus.get(bus.keys.status, m.SchedulerStatus) is None

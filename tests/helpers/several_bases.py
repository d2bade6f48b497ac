"""A gateway of one base, or of three: one that works, one whose worker the scheduler has not met, one that failed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from helpers.scripted_fleet import RunningGateway, make_model_folder, running_gateway
from protocol.queue.bus import Bus
from protocol.wire import messages as m


def base(name: str) -> m.ServedModel:
    """Return what a worker tells of a base."""
    return m.ServedModel(
        model=name, name=name, fingerprint="f", model_type="t", vocab_size=300, max_model_len=256, sites=[]
    )


async def _add_worker(bus: Bus, wid: str, of: str) -> None:
    beat = m.WorkerBeat(wid=wid, name=f"worker-{wid}", base=of, capacity=4)
    await bus.members.beat(bus.keys.worker_beat(wid), bus.keys.workers, wid, m.encode(beat), 60_000)


@asynccontextmanager
async def gateway_of_bases(bus: Bus, root: Path, *, several: bool) -> AsyncIterator[RunningGateway]:
    """Run a gateway of the base `chat`; beside it of `embed` and `bad`, if there are to be several."""
    folders = {name: make_model_folder(root / name) for name in ("chat", "embed", "bad")}
    await bus.set(bus.keys.base, base("chat"))
    await _add_worker(bus, "w1", "chat")
    if several:
        await bus._redis.hset(bus.keys.bases, "embed", m.encode(base("embed")))
        await _add_worker(bus, "w2", "embed")
        await bus.members.note_failure("bad", "no memory")
        loads = {"chat": m.BaseLoad(1, 3, 2), "embed": m.BaseLoad(0, 7, 0)}
        status = m.SchedulerStatus(queued=10, running=2, workers=1, drain_rate=0.0, bases=loads)
        await bus.set(bus.keys.status, status, 60_000)
    further = ",".join(str(folders[name]) for name in ("embed", "bad")) if several else ""
    async with running_gateway(bus, folders["chat"], more_models=further) as gateway:
        yield gateway

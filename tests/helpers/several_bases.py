"""A gateway of one base, or of three: one that works, one whose worker the scheduler has not met, one that failed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from helpers.reported import report
from helpers.scripted_fleet import RunningGateway, make_model_folder, running_gateway
from helpers.waiting import wait_until
from protocol.queue.bus import Bus
from protocol.wire import messages as m


def base(name: str) -> m.ServedModel:
    """Return what a worker reports about a base."""
    return m.ServedModel(
        model=name, name=name, fingerprint="f", model_type="t", vocab_size=300, max_model_len=256, sites=[]
    )


async def _keep_alive(bus: Bus, workers: dict[str, str]) -> None:
    """Send heartbeats of workers, given as id -> name of their base, until cancelled: commands may take long."""
    while True:
        for wid, name in workers.items():
            beat = m.WorkerBeat(wid=wid, name=f"worker-{wid}", base=name, capacity=4)
            await bus.members.beat(bus.keys.worker_beat(wid), bus.keys.workers, wid, m.encode(beat), 3_600_000)
        await asyncio.sleep(0.2)


@asynccontextmanager
async def gateway_of_bases(bus: Bus, root: Path, *, several: bool) -> AsyncIterator[RunningGateway]:
    """Run a gateway of the base `chat`; beside it of `embed` and `bad`, if there are to be several."""
    folders = {name: make_model_folder(root / name) for name in ("chat", "embed", "bad")}
    await report(bus, *map(base, ("chat", "embed") if several else ("chat",)))
    if several:
        await bus.members.note_failure("bad", "no memory")
        loads = {"chat": m.BaseLoad(1, 3, 2), "embed": m.BaseLoad(0, 7, 0)}
        status = m.SchedulerStatus(queued=10, running=2, workers=1, drain_rate=0.0, bases=loads)
        await bus.set(bus.keys.status, status, 3_600_000)
    further = ",".join(str(folders[name]) for name in ("embed", "bad")) if several else ""
    workers = {"w1": "chat"} | ({"w2": "embed"} if several else {})

    async def have_joined() -> bool:
        return {*await bus.members.worker_beats()} == {*workers}

    async with running_gateway(bus, folders["chat"], more_models=further) as gateway, asyncio.TaskGroup() as group:
        beats = group.create_task(_keep_alive(bus, workers))
        await wait_until(have_joined, "the workers are known")
        yield gateway
        beats.cancel()

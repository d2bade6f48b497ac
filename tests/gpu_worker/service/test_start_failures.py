"""Workers of another base than their fleet's may not join, and where there are several the queue knows why one failed.

Calls and adapters of the base depend on it.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import msgspec
import pytest
from helpers.waiting import wait_until

from benchmarks.common.fake_worker import FakeEngine, fake_served
from gpu_worker.service import program
from gpu_worker.service.service import WorkerService
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, Conflict
from tests.gpu_worker.service.fakes import SERVED, VOCAB, running_worker

BEAT = m.WorkerBeat(wid="w", name="w", capacity=1)


async def failures(bus: Bus, more_models: str = "another") -> dict[str, str]:
    settings = Settings(redis_url=bus.url, model="fake", served_name="fake", more_models=more_models, swaps=False)
    with pytest.raises(Exception):  # noqa: B017, PT011  of any kind
        await program.serve(settings, asyncio.Event())
    return (await bus.members.bases())[1]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BadRequest("no such folder"), "no such folder"),
        (MemoryError(), "MemoryError:"),
        (RuntimeError("CUDA out of memory\nat line 1\n"), "RuntimeError: CUDA out of memory"),
    ],
)
async def test_a_model_that_cannot_be_loaded(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def load(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(program, "_load", load)
    assert await failures(bus, "") == {}  # a fleet of one base waits for another worker
    assert await failures(bus) == {"fake": reason}
    await bus.members.forget_failures(["fake"])
    await bus.added_bases.add("fake", "/models/fake", 31)
    assert await failures(bus, "") == {"fake": reason}, "it is one of several that was added"


@pytest.mark.parametrize("weights", ["own", "others"])
async def test_a_base_that_may_not_join(bus: Bus, monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    """Its name is taken, or its weights are there under another one."""
    served = fake_served("fake")
    other = fake_served("fake" if weights == "others" else "copy")
    served, other = (msgspec.structs.replace(one, weights=w) for one, w in ((served, "own"), (other, weights)))
    await bus.members.join(BEAT, other, 60_000, fleet=["fake"])
    monkeypatch.setattr(program, "SWITCH_S", sys.getswitchinterval())
    monkeypatch.setattr(program, "_load", lambda *_: (FakeEngine(vocab_size=9), served))
    [(name, reason)] = (await failures(bus)).items()
    assert name == "fake"
    assert ("serves another base as fake" if weights == "others" else "name a base once") in reason


OTHERS = [
    fake_served("other", vocab_size=17),
    msgspec.structs.replace(fake_served("x", vocab_size=17), name=SERVED.name),
]
"""A model of another name, and one of the name that is served."""


@pytest.mark.parametrize("other", OTHERS, ids=["other name", "same name"])
async def test_workers_of_another_model_may_not_join(bus: Bus, other: m.ServedModel) -> None:
    async with running_worker(bus) as (worker, _):
        stranger = WorkerService(bus, FakeEngine(vocab_size=17), other, Settings())
        with pytest.raises(Conflict, match=r"cannot join it|serves another base as"):
            await stranger.run(asyncio.Event())
        assert await bus.members.ids(bus.keys.workers) == [worker.wid]
        assert not await bus._redis.exists(bus.keys.work(stranger.wid), bus.keys.ctl(stranger.wid))
    async with running_worker(bus, served=other):  # nobody serves the old one any more
        assert await bus.get(bus.keys.base, m.ServedModel) == other


@pytest.mark.parametrize("num_each", [1, 4])
@pytest.mark.parametrize("other", OTHERS, ids=["other name", "same name"])
async def test_of_workers_that_start_together_one_model_joins(bus: Bus, num_each: int, other: m.ServedModel) -> None:
    buses = [Bus(bus.url) for _ in range(2 * num_each)]
    workers = [
        WorkerService(own, FakeEngine(vocab_size=VOCAB), (SERVED, other)[i % 2], Settings())
        for i, own in enumerate(buses)
    ]
    stop = asyncio.Event()
    runs = [asyncio.create_task(worker.run(stop)) for worker in workers]
    try:
        await wait_until(lambda: _num_joined_or_refused(bus, runs, len(workers)), "each has joined or been refused")
        base = await bus.get(bus.keys.base, m.ServedModel)
        assert base is not None
        assert base in (SERVED, other)
        joined = {worker.served.fingerprint for worker, run in zip(workers, runs, strict=True) if not run.done()}
        assert joined == {base.fingerprint}
    finally:
        stop.set()
        outcomes = await asyncio.gather(*runs, return_exceptions=True)
        for own in buses:
            await own.close()
    refused = [outcome for outcome in outcomes if outcome != 0]
    assert len(refused) == num_each
    assert all(isinstance(outcome, Conflict) for outcome in refused)


async def _num_joined_or_refused(bus: Bus, runs: list[asyncio.Task[int]], num: int) -> bool:
    return len(await bus.members.ids(bus.keys.workers)) + sum(run.done() for run in runs) == num

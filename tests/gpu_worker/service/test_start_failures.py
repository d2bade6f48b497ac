"""Workers of a foreign base may not join a fleet; a fleet of several bases records why one did not start.

Calls and adapters of the base depend on that record.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import msgspec
import pytest
from helpers.full_memory import full_memory
from helpers.waiting import wait_until

from benchmarks.common.fake_worker import FakeEngine, fake_served
from gpu_worker.service import program
from gpu_worker.service.service import WorkerService
from protocol.queue.bus import Bus
from protocol.queue.connection.redis_client import DiskFull, MemoryFull
from protocol.queue.members import Members
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
        (FileNotFoundError("no model-00002-of-00003.safetensors"), "FileNotFoundError: no model-00002-of-00003."),
    ],
)
async def test_a_model_that_cannot_be_loaded(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def load(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(program, "_load", load)
    assert await failures(bus, "") == {}  # a fleet of one base waits for another worker and records nothing
    [(name, told)] = (await failures(bus)).items()
    assert (name, told.startswith(reason)) == ("fake", True), told
    await bus.members.forget_failures(["fake"])
    await bus.added_bases.add("fake", "/models/fake", 31)
    assert (await failures(bus, ""))["fake"] == told, "it is one of several that was added"


async def test_a_base_that_does_not_start_while_the_queue_is_full(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason cannot be recorded. The worker ends with the base's error, or starts another base."""

    def load(*_: Any) -> Any:
        raise BadRequest("no such folder")

    monkeypatch.setattr(program, "_load", load)
    started: list[str] = []
    monkeypatch.setattr(program, "start_again", lambda more: started.append(more[program.SWAP_VARIABLE]))
    settings = Settings(redis_url=bus.url, model="fake", served_name="fake", more_models="another")
    async with full_memory(bus):
        with pytest.raises(BadRequest, match="no such folder"):
            await program.serve(settings.model_copy(update={"swaps": False}), asyncio.Event())
        assert await program.serve(settings, asyncio.Event()) == 0
    assert [msgspec.json.decode(one)["base"] for one in started] == ["another"]


async def test_a_worker_joins_once_the_queue_takes_it(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then it keeps the loaded base and tries again."""
    errors = [DiskFull("MISCONF the log cannot be written"), ConnectionError("refused"), MemoryFull("OOM")]
    join = Members.join

    async def later(self: Members, *args: Any, **more: Any) -> str:
        if errors:
            raise errors.pop()
        return await join(self, *args, **more)

    monkeypatch.setattr(Members, "join", later)
    async with running_worker(bus) as (worker, _):
        assert errors == []
        assert await bus.members.ids(bus.keys.workers) == [worker.wid]


async def test_a_worker_that_may_not_join_yet_ends_when_it_is_stopped(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, engine = asyncio.Event(), FakeEngine(vocab_size=VOCAB)

    async def never(self: Members, *_: Any, **__: Any) -> str:
        asyncio.get_running_loop().call_soon(stop.set)
        raise DiskFull("MISCONF the log cannot be written")

    monkeypatch.setattr(Members, "join", never)
    worker = WorkerService(bus, engine, SERVED, Settings())
    assert await worker.run(stop) == 0
    assert await bus.members.ids(bus.keys.workers) == []


@pytest.mark.parametrize("weights", ["own", "others"])
async def test_a_base_that_may_not_join(bus: Bus, monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    """Another base has its name, or its weights are served under another name."""
    served = fake_served("fake")
    other = fake_served("fake" if weights == "others" else "copy")
    served, other = (msgspec.structs.replace(one, weights=w) for one, w in ((served, "own"), (other, weights)))
    await bus.members.join(BEAT, other, 60_000, fleet=["fake"])
    monkeypatch.setattr(program, "SWITCH_S", sys.getswitchinterval())
    monkeypatch.setattr(program, "_load", lambda *_: (FakeEngine(vocab_size=9), served))
    [(name, reason)] = (await failures(bus)).items()
    assert name == "fake"
    assert ("serves another base as fake" if weights == "others" else "name each base model once") in reason


OTHERS = [
    fake_served("other", vocab_size=17),
    msgspec.structs.replace(fake_served("x", vocab_size=17), name=SERVED.name),
]
"""A model of another name, and one with the served name."""


@pytest.mark.parametrize("other", OTHERS, ids=["other name", "same name"])
async def test_workers_of_another_model_may_not_join(bus: Bus, other: m.ServedModel) -> None:
    async with running_worker(bus) as (worker, _):
        stranger = WorkerService(bus, FakeEngine(vocab_size=17), other, Settings())
        with pytest.raises(Conflict, match=r"cannot join it|serves another base as"):
            await stranger.run(asyncio.Event())
        assert await bus.members.ids(bus.keys.workers) == [worker.wid]
        assert not await bus._redis.exists(bus.keys.work(stranger.wid), bus.keys.ctl(stranger.wid))
    async with running_worker(bus, served=other):  # no worker serves the old model any more
        assert (await bus.members.bases())[0] == [other]


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
        (base,), _ = await bus.members.bases()
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

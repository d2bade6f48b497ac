"""A worker restarts itself to serve another base: which orders it obeys, what survives, and how failed starts end.

The process is real; its engine has no model.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest
from helpers.waiting import wait_until

from benchmarks.common.fake_worker import FakeEngine, fake_served
from chaos.fleet import free_port
from gpu_worker.service import bases, program
from gpu_worker.service.program import BaseStart
from gpu_worker.service.service import WorkerService
from lorafleet.launcher.embedded import EmbeddedServer
from protocol.queue.added_bases import AddedBaseRecord
from protocol.queue.bus import Bus
from protocol.queue.members import Members
from protocol.runtime import again
from protocol.runtime.again import SWAP_VARIABLE
from protocol.runtime.model_files import base_settings, worker_bases
from protocol.runtime.settings import DRAFT_TOKENS, Settings
from protocol.wire import messages as m
from protocol.wire.clock import now_ms
from protocol.wire.errors import BadRequest, NewerRecord
from tests.gpu_worker.service.fakes import assign, expected, log, running_worker, state, submit

PROGRAM = """
import os, sys, time
from types import SimpleNamespace

from protocol.runtime.again import note_start
note_start()
os.environ["LEAK"] = "of the process before"
from benchmarks.common.fake_worker import FakeEngine, fake_served
from gpu_worker.service import program
from protocol.runtime.service import run, set_up_logging
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

def load(settings, loader):
    print("loading", settings.served_name, flush=True)
    if settings.served_name == "slow":
        time.sleep(600)
    if settings.served_name.startswith("broken"):
        raise BadRequest("no such file")
    os.set_inheritable(os.open("/dev/null", os.O_RDONLY), True)  # as libraries do
    return FakeEngine(), fake_served(settings.served_name)

program.Loader = lambda bearer: SimpleNamespace(close=lambda: None, set_urls=lambda urls: None)
program._load = load
set_up_logging("worker", "info")
settings = Settings(redis_url=sys.argv[1], worker_name="w", model=sys.argv[2], more_models=sys.argv[3])
settings = settings.model_copy(update={"metrics_port": int(sys.argv[4])})
sys.exit(run(lambda stop: program.serve(settings, stop)))
"""


class RunningProgram:
    """A worker process, seen through the queue, its output and `/proc`."""

    def __init__(self, bus: Bus, process: asyncio.subprocess.Process, output: Path, port: int) -> None:
        self.bus, self.process, self.output, self.port = bus, process, output, port

    async def beat_of(self, base: str, other_than: str = "") -> m.WorkerBeat:
        """Wait for a heartbeat of a worker on `base` whose id is not `other_than`; return it."""

        async def found() -> m.WorkerBeat | None:
            assert self.process.returncode is None, self.output.read_text()
            beats = (await self.bus.members.worker_beats()).values()
            return next((one for one in beats if one and one.base == base and one.wid != other_than), None)

        return await wait_until(found, lambda: f"it serves {base}; it has said: {self.output.read_text()}")

    async def offers(self, wid: str, *bases: str) -> m.WorkerBeat:
        """Wait until the worker offers to become exactly these bases; return its heartbeat."""

        async def found() -> m.WorkerBeat | None:
            beat = (await self.bus.members.worker_beats()).get(wid)
            return beat if beat is not None and beat.may_become == list(bases) else None

        return await wait_until(found, lambda: f"it may become {bases}; it has said: {self.output.read_text()}")

    async def order(self, wid: str, base: str) -> None:
        await self.bus.streams.tell([(wid, m.Control(kind="serve", base=base))])

    async def says(self, text: str, times: int = 1) -> None:
        await wait_until(lambda: self.output.read_text().count(text) >= times, f"it says {text}")

    def descriptors(self) -> dict[int, str]:
        folder = Path(f"/proc/{self.process.pid}/fd")
        found: dict[int, str] = {}
        for one in folder.iterdir():
            try:
                found[int(one.name)] = os.readlink(one)
            except OSError:  # closed in the meantime
                continue
        return found

    def signals(self) -> dict[str, str]:
        """Return which signals the process blocks, ignores and catches."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return dict(line.split(":\t", 1) for line in lines if line.startswith(("SigBlk", "SigIgn", "SigCgt")))


@asynccontextmanager
async def running(bus: Bus, folder: Path, first: str, *others: str, **more: str) -> AsyncIterator[RunningProgram]:
    output, port = folder / "output.txt", free_port()
    with output.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, bus.url, first, ",".join(others), str(port),
            stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out, cwd=Path(__file__).parents[3],
            env={**os.environ, **more},
        )  # fmt: skip
    try:
        yield RunningProgram(bus, process, output, port)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_worker_becomes_another_base_and_nothing_of_it_is_left(bus: Bus, tmp_path: Path) -> None:
    async with running(bus, tmp_path, "a", "b", "broken") as worker:
        first = await worker.beat_of("a")
        assert (first.name, first.may_become, first.becoming) == ("w", ["b", "broken"], "")
        assert first.start_s > 0
        pid, signals = worker.process.pid, worker.signals()
        leaked = [fd for fd, path in worker.descriptors().items() if path == "/dev/null" and fd > 2]
        assert leaked
        for base in ("a", "stranger"):  # its own base, and an unknown one
            await worker.order(first.wid, base)
        await submit(bus, "r", max_new=400)
        assert await assign(bus, first.wid, "r") == "ok"
        await wait_until(lambda: log(bus, "r"), "it has begun to answer")
        before = worker.descriptors()  # including all its connections to the queue
        await worker.order(first.wid, "b")
        await worker.order(first.wid, "broken")  # ignored: the first order counts
        second = await worker.beat_of("b")
        assert (second.name, second.may_become) == ("w", ["a", "broken"])
        assert second.wid != first.wid
        assert await state(bus, "r") == "queued"
        assert await log(bus, "r") == expected(len(await log(bus, "r")))
        process = psutil.Process(pid)
        assert process.environ()[SWAP_VARIABLE]
        assert "LEAK" not in process.environ()
        assert (process.children(), worker.signals()) == ([], signals)
        # The number of open queue connections varies by one or two; descriptors kept across exec would double it.
        assert len(worker.descriptors()) <= len(before) + 2, (before, worker.descriptors())
        assert [fd for fd, path in worker.descriptors().items() if path == "/dev/null" and fd > 2] == leaked
        with await asyncio.to_thread(urlopen, f"http://127.0.0.1:{worker.port}/metrics") as answer:
            assert answer.status == 200
        assert await bus.members.ids(bus.keys.workers) == [second.wid]
        assert [one.name for one in (await bus.members.bases())[0]] == ["a", "b"]
        await worker.order(second.wid, "broken")
        await worker.beat_of("b", other_than=second.wid)
        assert (await bus.members.bases())[1] == {"broken": "no such file"}
        worker.process.terminate()
        assert await worker.process.wait() == 0
        assert worker.process.pid == pid
    said = [line for line in worker.output.read_text().splitlines() if line.startswith("loading")]
    assert said == ["loading a", "loading b", "loading broken", "loading b"]


@pytest.mark.thorough  # tests/e2e/test_added_bases.py covers a swap to an added base and back
async def test_a_worker_becomes_a_base_that_was_added_and_comes_back(bus: Bus, tmp_path: Path) -> None:
    """The worker need not know the base at its start, but the base's files must be on its machine."""
    (tmp_path / "b").mkdir()
    async with running(bus, tmp_path, "a") as worker:
        first = await worker.beat_of("a")
        assert first.may_become == []
        await bus.added_bases.add("elsewhere", str(tmp_path / "elsewhere"), 31)
        await bus.added_bases.add("b", str(tmp_path / "b"), 31)
        await worker.order(first.wid, "b")
        (tmp_path / "b/config.json").write_text("{}")
        assert (await worker.offers(first.wid, "b")).base == "a", "what came before it could is not obeyed"
        await worker.order(first.wid, "b")
        second = await worker.beat_of("b")
        assert (await worker.offers(second.wid, "a")).may_become == ["a"]
        await bus.added_bases.remove("b")
        await worker.order(second.wid, "a")
        third = await worker.beat_of("a")
        await worker.offers(third.wid)
        assert [one.name for one in (await bus.members.bases())[0]] == ["a", "b"]
    assert worker.output.read_text().count("loading b") == 1


@pytest.mark.thorough
async def test_starts_that_fail_come_to_an_end(bus: Bus, tmp_path: Path) -> None:
    async with running(bus, tmp_path, "broken", "broken2", "broken3") as worker:
        assert await worker.process.wait() == 1
        assert worker.output.read_text().count("loading") == 3
        assert set((await bus.members.bases())[1]) == {"broken", "broken2", "broken3"}


@pytest.mark.thorough
async def test_a_first_base_that_fails_leaves_its_worker_to_the_others(bus: Bus, tmp_path: Path) -> None:
    async with running(bus, tmp_path, "broken", "a") as worker:
        beat = await worker.beat_of("a")
        assert beat.may_become == ["broken"]


@pytest.mark.parametrize("when", ["first start", "swap"])
async def test_a_signal_ends_a_start_at_once(bus: Bus, tmp_path: Path, when: str) -> None:
    async with running(bus, tmp_path, *(("slow", "a") if when == "first start" else ("a", "slow"))) as worker:
        if when == "swap":
            await worker.order((await worker.beat_of("a")).wid, "slow")
        await worker.says("loading slow")
        worker.process.terminate()
        assert await worker.process.wait() == -signal.SIGTERM
        assert await bus.members.ids(bus.keys.workers) == []


async def test_a_signal_while_it_leaves_ends_it_without_another_start(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = asyncio.Event()
    started = _fake_exec(monkeypatch, on_hand_over=stop.set)
    task = asyncio.create_task(program.serve(_settings(bus), stop))
    (beat,) = await wait_until(lambda: _beats(bus), "it has joined")
    await bus.streams.tell([(beat.wid, m.Control(kind="serve", base="b"))])
    assert await task == 0
    assert started == []
    assert await bus.members.ids(bus.keys.workers) == []


async def test_the_order_of_a_swap_names_the_way_back(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    started = _fake_exec(monkeypatch)
    task = asyncio.create_task(program.serve(_settings(bus), asyncio.Event()))
    (beat,) = await wait_until(lambda: _beats(bus), "it has joined")
    await bus.streams.tell([(beat.wid, m.Control(kind="serve", base="b"))])
    with pytest.raises(_Executed):
        await task
    (environment,) = started
    start = json.loads(environment[SWAP_VARIABLE])
    assert (start["base"], start["fallbacks"]) == ("b", ["a"])


async def test_a_base_that_is_taken_away_meanwhile_is_not_begun(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The base is removed while the worker drains in order to swap to it."""
    (tmp_path / "config.json").write_text("{}")
    await bus.added_bases.add("b", str(tmp_path), 31)
    started = _fake_exec(monkeypatch)
    drain = WorkerService._drain

    async def drain_slowly(self: WorkerService) -> None:
        await drain(self)
        await bus.added_bases.remove("b")
        await self.bases.look(bus)

    monkeypatch.setattr(WorkerService, "_drain", drain_slowly)
    settings = _settings(bus).model_copy(update={"more_models": ""})
    task = asyncio.create_task(program.serve(settings, asyncio.Event()))
    (beat,) = await wait_until(lambda: _beats_with(bus, "b"), "it may become it")
    await bus.streams.tell([(beat.wid, m.Control(kind="serve", base="b"))])
    with pytest.raises(_Executed):
        await task
    (environment,) = started
    start = json.loads(environment[SWAP_VARIABLE])
    assert (start["base"], start["fallbacks"]) == ("a", [])
    monkeypatch.setenv(SWAP_VARIABLE, environment[SWAP_VARIABLE])
    assert BaseStart.of(settings, worker_bases(settings)).base == "a"


async def test_a_queue_that_is_away_when_the_base_is_loaded_ends_no_worker(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [ConnectionError("refused")]
    urls = Members.store_urls

    async def later(self: Members) -> tuple[str, ...]:
        if errors:
            raise errors.pop()
        return await urls(self)

    _fake_exec(monkeypatch)
    monkeypatch.setattr(Members, "store_urls", later)
    stop = asyncio.Event()
    task = asyncio.create_task(program.serve(_settings(bus), stop))
    await wait_until(lambda: task.done() or _beats(bus), "it has joined, or has ended")
    stop.set()
    assert await task == 0
    assert errors == []


@pytest.mark.parametrize("what", ["taken away", "no queue", "a record that cannot be read"])
async def test_a_worker_comes_back_from_an_added_base_that_does_not_start(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Its record is gone or unreadable: the previous process has passed on that it is an added base."""
    settings = _settings(bus).model_copy(update={"more_models": ""})
    started = _fake_exec(monkeypatch)
    start = {"base": "b", "fallbacks": ["a"], "began_ms": 1, "added": {"b": "/models/b"}}
    monkeypatch.setenv(SWAP_VARIABLE, json.dumps(start))
    await bus.added_bases.add("b", "/models/b", 31)
    if what == "taken away":
        await bus.added_bases.remove("b")
    else:

        def load(*_: Any) -> Any:
            raise BadRequest("no such folder")

        async def get(*_: Any) -> m.AddedBases:
            raise ConnectionError("refused") if what == "no queue" else NewerRecord("newer")

        monkeypatch.setattr(program, "_load", load)
        monkeypatch.setattr(AddedBaseRecord, "get", get)
        if what != "no queue":
            await bus._redis.set(bus.keys.added_bases, b"\xc1")
    with pytest.raises(_Executed):
        await program.serve(settings, asyncio.Event())
    (environment,) = started
    start = json.loads(environment[SWAP_VARIABLE])
    assert (start["base"], start["fallbacks"]) == ("a", [])


async def test_time_in_which_there_was_no_queue_is_none_of_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Counted as start time, it would make swaps look minutes long, and the scheduler would order none."""
    _fake_exec(monkeypatch)
    server = EmbeddedServer(tmp_path, durable=False, guarded=False)
    bus, stop = Bus(server.url), asyncio.Event()
    began_ms = now_ms()
    monkeypatch.setenv(SWAP_VARIABLE, json.dumps({"base": "a", "fallbacks": ["b"], "began_ms": began_ms}))
    serving = asyncio.create_task(program.serve(_settings(bus), stop))
    await wait_until(lambda: "the queue cannot be reached" in caplog.text, "it waits")
    waits_ms = now_ms()
    await asyncio.to_thread(server.start)
    waited_ms = now_ms() - waits_ms
    try:
        await wait_until(lambda: _beats(bus), "it has joined")
        (beat,) = await _beats(bus)
        assert 1000 * beat.start_s < beat.joined_ms - began_ms - waited_ms / 2
        stop.set()
        assert await serving == 0
    finally:
        await bus.close()
        await asyncio.to_thread(server.stop)


async def test_files_that_do_not_answer_silence_no_worker(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example on a network file system whose server is down."""
    asked, answered = threading.Event(), threading.Event()

    def hang(_: str) -> bool:
        asked.set()
        return answered.wait()

    monkeypatch.setattr(bases, "is_here", hang)
    await bus.added_bases.add("b", "/models/b", 31)
    try:
        async with running_worker(bus) as (worker, _):
            await wait_until(asked.is_set, "it looks for the files")
            await bus.streams.tell([(worker.wid, m.Control(kind="drain"))])

            async def draining() -> bool:
                beats = (await bus.members.worker_beats()).values()
                return any(beat is not None and beat.draining for beat in beats)

            await wait_until(draining, "its heartbeat says that it drains")
    finally:
        answered.set()


@pytest.mark.parametrize("fleet", [{"more_models": ""}, {"swaps": False}, {"model": "fake", "more_models": "fake"}])
async def test_who_may_become_nothing_ignores_orders(bus: Bus, fleet: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"more_models": "b", **fleet}
    async with running_worker(bus, **settings) as (worker, _):
        for base in ("b", "fake", ""):
            await bus.streams.tell([(worker.wid, m.Control(kind="serve", base=base))])
        await bus.streams.tell([(worker.wid, m.Control(kind="drain"))])
        await wait_until(lambda: worker.draining, "all orders have been read")
        assert worker.becomes == ""
        (beat,) = await _beats(bus)
        assert beat.may_become == []


def test_what_a_process_begins_with(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(model="a", more_models="b,a,c", served_name="first")
    bases = worker_bases(settings)
    assert {name: one.model for name, one in bases.items()} == {"first": "a", "b": "b", "a": "a", "c": "c"}
    start = BaseStart.of(settings, bases)
    assert (start.base, start.fallbacks) == ("first", ("b", "a", "c"))
    start = BaseStart.of(settings.model_copy(update={"base": "b", "swaps": False}), bases)
    assert (start.base, start.fallbacks) == ("b", ())
    with pytest.raises(BadRequest, match="--base: d is none of this worker's bases, first, b, a, c"):
        BaseStart.of(settings.model_copy(update={"base": "d"}), bases)
    monkeypatch.setenv(SWAP_VARIABLE, '{"base": "d", "fallbacks": [], "began_ms": 1}')
    with pytest.raises(BadRequest):
        BaseStart.of(settings, bases)
    assert SWAP_VARIABLE not in os.environ


def test_the_draft_model_is_of_the_base_of_model_alone() -> None:
    settings = Settings(model="a", more_models="b", draft_model="small")
    found = bases.WorkerBases(settings, "a", {"added": "c"})
    assert [found.settings(name).draft_model for name in ("a", "b", "added")] == ["small", "", ""]
    assert [found.settings(name).draft_tokens for name in ("a", "b")] == [DRAFT_TOKENS, 0]
    assert [one.draft_model for one in base_settings(settings).values()] == ["small", ""]
    assert settings.model_copy(update={"max_draft_tokens": 3}).draft_tokens == 3


class _Executed(BaseException):
    """Stands for the end of a process that has called exec."""


def _fake_exec(
    monkeypatch: pytest.MonkeyPatch, on_hand_over: Callable[[], object] = lambda: None
) -> list[dict[str, str]]:
    started: list[dict[str, str]] = []

    def execve(path: str, words: list[str], environment: dict[str, str]) -> None:
        assert path == words[0] == sys.executable
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        started.append(environment)
        raise _Executed

    class Engine(FakeEngine):
        def hand_over(self) -> Future[list[str]]:
            on_hand_over()
            return super().hand_over()

    class NoLoader:
        def __init__(self, bearer: str) -> None: ...
        def close(self) -> None: ...
        def set_urls(self, urls: tuple[str, ...]) -> None: ...

    def load(settings: Settings, loader: Any) -> tuple[FakeEngine, m.ServedModel]:
        return Engine(), fake_served(settings.served_name)

    monkeypatch.setattr(again.os, "execve", execve)
    monkeypatch.setattr(program, "SWITCH_S", sys.getswitchinterval())
    monkeypatch.setattr(program, "Loader", NoLoader)
    monkeypatch.setattr(program, "_load", load)
    return started


def _settings(bus: Bus) -> Settings:
    return Settings(redis_url=bus.url, model="a", more_models="b", worker_name="w")


async def _beats_with(bus: Bus, base: str) -> list[m.WorkerBeat]:
    return [beat for beat in await _beats(bus) if base in beat.may_become]


async def _beats(bus: Bus) -> list[m.WorkerBeat]:
    return [beat for beat in (await bus.members.worker_beats()).values() if beat is not None]

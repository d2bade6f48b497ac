"""The engine's thread, with an engine without a model: every caller that waits for it gets an answer or an error."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn, Protocol

import numpy as np
import pytest
from helpers.adapter_loading import Loading

from gpu_worker.engine.base import BaseEngine
from gpu_worker.engine.engine_thread import EngineThread
from gpu_worker.planning.request import EngineRequest, TokenOutput
from protocol.wire import messages as m
from protocol.wire.errors import LorafleetError
from protocol.wire.messages import Sampling

WAIT_S = 30.0


class IdleEngine(BaseEngine):
    """An engine that holds its requests and never outputs a token."""

    def __init__(self) -> None:
        super().__init__(Loading(1, []).cache)
        self.held: list[str] = []
        self.wake: Callable[[], object] = lambda: None
        self.stepping = threading.Event()  # set once a step has begun
        self.go = threading.Event()  # while cleared, a step does not end
        self.go.set()
        self.num_steps = 0
        self.held_at_start: list[str] | None = None
        self.wants_memory = False
        self.num_pieces = 0  # of memory provided

    def extend_memory(self) -> bool:
        self.num_pieces += self.wants_memory
        return self.wants_memory

    def finish_start(self) -> None:
        self.held_at_start = self.held.copy()

    def wake_with(self, wake: Callable[[], object]) -> None:
        self.wake = wake

    def add(self, request: EngineRequest) -> None:
        self.held.append(request.rid)

    def step(self) -> list[TokenOutput]:
        self.num_steps += 1
        self.stepping.set()
        assert self.go.wait(WAIT_S)
        return []

    def stats(self) -> m.WorkerBeat:
        return m.WorkerBeat(wid="", name="", capacity=1)

    def _held(self) -> list[str]:
        return self.held

    def _drop(self, rid: str) -> None:
        self.held.remove(rid)

    def _waiting(self) -> list[EngineRequest]:
        return []

    def _fail_waiting(self, rid: str, error: LorafleetError) -> None:
        raise AssertionError(f"{rid} waits for no adapter")


class Running:
    """A started engine thread, and the errors with which it died."""

    def __init__(self, engine: IdleEngine, max_commands: int) -> None:
        self.engine = engine
        self.deaths: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self.thread = EngineThread(engine, max_commands=max_commands)
        self.thread.start(lambda outputs: None, self.deaths.put)

    def hold(self) -> None:
        """Keep the thread inside a step."""
        self.engine.go.clear()
        self.engine.stepping.clear()
        self.engine.wake()
        assert self.engine.stepping.wait(WAIT_S)


class Run(Protocol):
    def __call__(self, engine: IdleEngine, max_commands: int = 100) -> Running: ...


@pytest.fixture
def run() -> Iterator[Run]:
    started: list[Running] = []

    def start(engine: IdleEngine, max_commands: int = 100) -> Running:
        started.append(Running(engine, max_commands))
        return started[-1]

    yield start
    for running in started:
        running.engine.go.set()
        running.thread.stop()


def eventually(is_true: Callable[[], bool]) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def request(rid: str) -> EngineRequest:
    return EngineRequest(rid, 1, "", np.array([1], np.int32), Sampling(), 1)


class Panic(BaseException):
    """A panic of a Rust library, which is not an `Exception`."""


def broken(*_args: object, **_options: object) -> NoReturn:
    raise RuntimeError("out of luck")


def panicking(*_args: object, **_options: object) -> NoReturn:
    raise Panic("out of luck")


def test_the_start_is_finished_before_the_first_request(run: Run) -> None:
    engine = IdleEngine()
    running = run(engine)
    running.hold()
    running.thread.finish_start()
    running.thread.submit(request("a"))
    engine.go.set()
    eventually(lambda: engine.held == ["a"])
    assert engine.held_at_start == []


def test_memory_is_provided_while_there_is_no_work(run: Run) -> None:
    """This engine always wants more, so a thread that did not look for work between pieces would never take any."""
    engine = IdleEngine()
    engine.wants_memory = True
    running = run(engine)
    engine.wake()
    eventually(lambda: engine.num_pieces > 10)
    running.thread.submit(request("a"))
    eventually(lambda: engine.held == ["a"])
    running.hold()
    num_pieces, num_steps = engine.num_pieces, engine.num_steps
    engine.go.set()
    engine.wake()
    eventually(lambda: engine.num_steps > num_steps)
    running.hold()
    assert engine.num_pieces == num_pieces


@pytest.mark.parametrize("crash", [broken, panicking])
@pytest.mark.parametrize("method", ["hand_over", "add"])
def test_a_crash_before_or_in_a_hand_over_leaves_nobody_waiting(
    run: Run, method: str, crash: Callable[..., NoReturn]
) -> None:
    engine = IdleEngine()
    running = run(engine)
    running.hold()
    setattr(engine, method, crash)
    running.thread.submit(request("x"))
    handed_over = [running.thread.hand_over() for _ in range(2)]
    engine.go.set()
    assert [future.result(WAIT_S) for future in handed_over] == [[], []]
    assert str(running.deaths.get(timeout=WAIT_S)) == "out of luck"
    assert running.thread.has_ended


def test_a_death_is_told_even_if_the_end_fails_too(run: Run) -> None:
    engine = IdleEngine()
    running = run(engine)
    running.hold()
    engine.step, engine.close = panicking, broken
    engine.go.set()
    running.thread.submit(request("x"))
    assert isinstance(running.deaths.get(timeout=WAIT_S), Panic)


def test_an_idle_engine_goes_round_and_one_in_a_step_does_not(run: Run) -> None:
    running = run(IdleEngine())
    before = running.thread.num_turns
    eventually(lambda: running.thread.num_turns > before + 1)
    running.hold()
    before, num_steps = running.thread.num_turns, running.engine.num_steps
    running.thread.submit(request("x"))
    assert (running.thread.num_turns, running.engine.num_steps) == (before, num_steps)
    assert not running.thread.has_ended


def test_a_hand_over_nobody_waits_for_any_more_harms_nothing(run: Run) -> None:
    engine = IdleEngine()
    running = run(engine)
    running.hold()
    assert running.thread.hand_over().cancel()
    running.thread.submit(request("x"))
    engine.go.set()
    assert running.thread.hand_over().result(WAIT_S) in ([], ["x"])
    running.thread.submit(request("y"))
    assert "y" in running.thread.hand_over().result(WAIT_S)
    assert running.deaths.empty()


def test_what_has_arrived_wakes_the_engine_once(run: Run) -> None:
    engine = IdleEngine()
    running = run(engine)
    running.hold()
    num_steps = engine.num_steps
    for _ in range(5000):
        engine.wake()
    first = running.thread.hand_over()  # before the engine runs again, which may then be done with the others
    engine.go.set()
    first.result(WAIT_S)
    running.thread.hand_over().result(WAIT_S)
    assert engine.num_steps <= num_steps + 2
    assert running.thread.num_commands == 0


def test_a_full_inbox_has_no_room_until_the_engine_takes_its_commands(run: Run) -> None:
    engine = IdleEngine()
    running = run(engine, max_commands=3)
    running.hold()
    assert running.thread.room().done()
    for rid in "abc":
        running.thread.submit(request(rid))
    room, given_up = running.thread.room(), running.thread.room()
    assert not room.done()
    assert given_up.cancel()
    engine.go.set()
    assert room.result(WAIT_S) is None
    assert running.thread.hand_over().result(WAIT_S) == ["a", "b", "c"]


def test_an_engine_that_died_has_room_for_what_it_ignores(run: Run) -> None:
    engine = IdleEngine()
    running = run(engine, max_commands=1)
    running.hold()
    engine.add = broken
    running.thread.submit(request("x"))
    room = running.thread.room()
    engine.go.set()
    assert room.result(WAIT_S) is None
    running.deaths.get(timeout=WAIT_S)
    running.thread.submit(request("y"))
    assert running.thread.room().done()
    assert running.thread.num_commands == 0

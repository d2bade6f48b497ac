"""Loops and units of work that fail are retried with increasing pauses, logged once, counted, and finally given up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
from helpers.waiting import wait_until
from prometheus_client import REGISTRY

from protocol.runtime.backoff import Backoff
from protocol.runtime.guarded import LOG_AGAIN_S, MAX_CAUSES, Failures, Items, Loop, guarded
from protocol.wire.errors import Unavailable

SOON = Backoff(0.001, 0.002)


class PanicException(BaseException):
    """Equivalent of a panic in a Rust library."""


class Fenced(Exception):
    """An error that the loop's owner must see."""


@asynccontextmanager
async def running(loop: Loop) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(guarded(loop))
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def failures_of(name: str) -> float:
    return REGISTRY.get_sample_value("lorafleet_loop_failures_total", {"loop": name}) or 0.0


async def cancel_itself() -> None:
    raise asyncio.CancelledError


async def end() -> None:
    pass


async def panic() -> None:
    raise PanicException("index out of bounds")


async def fall() -> None:
    raise KeyError("field")


@pytest.mark.parametrize("fails", [cancel_itself, end, panic, fall])
async def test_a_loop_that_fails_is_begun_again(fails: Callable[[], Awaitable[None]]) -> None:
    begun = 0

    async def work() -> None:
        nonlocal begun
        begun += 1
        if begun < 4:
            await fails()
        else:
            await asyncio.Event().wait()

    before = failures_of("again")
    async with running(Loop("again", work, backoff=SOON)) as task:
        await wait_until(lambda: begun == 4, "the loop runs again")
        assert not task.done()
    assert failures_of("again") - before == 3


async def test_turns_go_on_after_failures_and_a_good_turn_forgets_them() -> None:
    """Only failures in a row count towards the limit."""
    turns = 0

    async def work() -> None:
        nonlocal turns
        turns += 1
        if turns % 3:
            raise ValueError("bad turn")

    async with running(Loop("turns", work, pause_s=0.001, backoff=SOON, max_failures=3)) as task:
        await wait_until(lambda: turns > 12, "turns go on")
        assert not task.done()


async def test_a_loop_whose_work_never_waits_leaves_turns_to_others() -> None:
    turns = 0

    async def work() -> None:
        nonlocal turns
        turns += 1

    async with running(Loop("busy", work, pause_s=0.0)) as task:
        await wait_until(lambda: turns > 100, "others have turns meanwhile")
        assert not task.done()


async def test_a_loop_ends_by_what_its_owner_is_to_see_alone() -> None:
    async def in_a_group() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(fenced())

    async def fenced() -> None:
        raise Fenced

    for work in (in_a_group, fenced):
        with pytest.raises((ExceptionGroup, Fenced)):
            await guarded(Loop("fenced", work, backoff=SOON, ends=(Fenced,)))
    with pytest.raises(KeyError):
        await guarded(Loop("given up", fall, backoff=SOON, max_failures=3))
    assert failures_of("given up") == 3


async def test_a_loop_that_is_cancelled_is_cancelled() -> None:
    async def wait() -> None:
        await asyncio.Event().wait()

    async with running(Loop("waits", wait)) as task:
        await asyncio.sleep(0)
    assert task.cancelled()
    async with running(Loop("rests", fall, backoff=Backoff(1000, 1000))) as task:
        await wait_until(lambda: failures_of("rests") == 1, "it has failed")
    assert task.cancelled()


async def test_pauses_double_and_a_calm_hour_is_forgotten() -> None:
    now, pauses, lives = 0.0, list[float](), iter([0.0, 0.0, 0.0, 3600.0, 0.0])

    async def work() -> None:
        nonlocal now
        now += next(lives)
        raise ValueError

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)

    loop = Loop("pauses", work, backoff=Backoff(1, 60), ends=(RuntimeError,))
    with pytest.raises(RuntimeError):  # all rounds are used up
        await guarded(loop, clock=lambda: now, sleep=sleep)
    assert pauses == [1, 2, 4, 1, 2]


def fail_in(name: str, failed: Failures, error: BaseException) -> None:
    try:
        raise error
    except (ValueError, Unavailable) as raised:
        failed.note(name, raised)


def test_a_cause_is_logged_once_and_again_after_ten_minutes(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    failed = Failures(lambda: now)
    with caplog.at_level(logging.WARNING):
        for second in range(int(2 * LOG_AGAIN_S)):
            now = float(second)
            fail_in("x", failed, ValueError(f"differs each time: {second}"))
            fail_in("x", failed, Unavailable("the disk is full"))
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 4
    assert f"({LOG_AGAIN_S - 1:.0f} more since the last report)" in texts[2]
    assert all(bool(record.exc_info) == ("differs" in record.getMessage()) for record in caplog.records)


def test_causes_that_are_remembered_are_bounded() -> None:
    failed = Failures(lambda: 0.0)
    for number in range(4 * MAX_CAUSES):
        failed.note(f"loop {number}", ValueError())
    assert len(failed._told) <= MAX_CAUSES


class World:
    """Items with their own clock, and a list of those given up."""

    def __init__(self, max_tries: int, max_keys: int = 10_000) -> None:
        self.now = 0.0
        self.ended: list[tuple[str, str]] = []
        self.broken_end = False
        self.items = Items(
            "units", max_tries=max_tries, backoff=Backoff(1, 60), max_keys=max_keys, clock=lambda: self.now
        )

    async def fail(self, key: str, error: BaseException | None = None) -> float:
        async def work() -> None:
            raise error or ValueError("poison")

        async def give_up(why: BaseException) -> None:
            if self.broken_end:
                raise OSError(28, "No space left on device")
            self.ended.append((key, str(why)))

        return await self.items.run(key, work, give_up)


async def test_a_unit_is_tried_ever_later_and_then_given_up_once() -> None:
    world, tried = World(max_tries=4), list[float]()
    while not world.ended:
        if world.items.is_due("a"):
            tried.append(world.now)
            await world.fail("a")
        assert await world.items.run("b", end) == 0, "neighbours go on"
        world.now += 0.5
    assert tried == [0, 1, 3, 7]
    assert world.ended == [("a", "poison")]
    assert world.items.is_due("a"), "what was given up is forgotten"


async def test_a_unit_whose_end_cannot_be_written_ends_later() -> None:
    world = World(max_tries=1)
    world.broken_end = True
    for _ in range(3):
        assert await world.fail("a") > 0
        assert not world.items.is_due("a")
        world.now += 100
    world.broken_end = False
    assert await world.fail("a") == 0
    assert world.ended == [("a", "poison")]


async def test_a_queue_that_is_away_counts_against_no_unit() -> None:
    world = World(max_tries=1)
    for error in (ConnectionError("gone"), TimeoutError()):
        with pytest.raises(type(error)):
            await world.fail("a", error)
    assert not world.ended
    assert world.items.is_due("a")
    assert await world.fail("a", PermissionError(13, "Permission denied")) == 0, "a disk is no queue"


async def test_units_that_are_remembered_are_bounded() -> None:
    world = World(max_tries=100, max_keys=10)
    for number in range(1000):
        await world.fail(str(number))
    assert len(world.items._tries) == 10

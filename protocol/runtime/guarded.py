"""Loops and units of work with isolated failures: logged once per cause, counted, retried with backoff.

A loop is restarted as long as its process lives, except after errors that it declares as final. A unit of work with a
key (a batch, a file, a conversation) is given up after a maximum number of tries, and its end is written for its owner.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import cast

from protocol.metrics.series import FAILURES, GIVEN_UP
from protocol.runtime.backoff import TROUBLE, Backoff
from protocol.runtime.service import wait_any
from protocol.wire.errors import LorafleetError

logger = logging.getLogger(__name__)

Clock = Callable[[], float]

CALM_S = 60.0
"""If a loop has run for this many seconds before a failure, earlier failures no longer count."""

LOG_AGAIN_S = 600.0
"""Seconds before the same cause is logged again."""

MAX_CAUSES = 256
"""Maximum number of remembered causes; the oldest are dropped."""

QUEUE_AWAY: set[type[BaseException]] = set()
"""Errors which mean that the queue is unreachable or full; the queue's client adds the errors that it raises."""

MAX_UNPAUSED = 32
"""Maximum consecutive iterations without a pause, so that other tasks run even if the loop's work never waits."""

BRISK = Backoff(0.05, 2.0)
"""For loops that calls wait for."""


def is_failure(error: BaseException) -> bool:
    """Return whether an error is a failure: panics in Rust are; the end of a task or of the process is not."""
    return not isinstance(error, (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit))


def is_queue_away(error: BaseException) -> bool:
    """Return whether an error means that the queue is unreachable or full, which affects every unit of work."""
    if isinstance(error, OSError):  # other OSErrors come from disks
        return isinstance(error, (ConnectionError, TimeoutError))
    return isinstance(error, tuple(QUEUE_AWAY))


class Failures:
    """Counts failures, and logs each cause, a type of error from one line of code, once in LOG_AGAIN_S."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._told: OrderedDict[tuple[object, ...], tuple[float, int]] = OrderedDict()  # by cause: logged at, count

    def note(self, name: str, error: BaseException, what: str = "") -> None:
        """Count a failure of a loop. what: the failed unit of work, for the log."""
        FAILURES.labels(name).inc()
        cause = (name, type(error), _raised_at(error))
        told_s, num = self._told.pop(cause, (-LOG_AGAIN_S, 0))
        is_told = self._clock() - told_s < LOG_AGAIN_S
        self._told[cause] = (told_s, num + 1) if is_told else (self._clock(), 0)
        if len(self._told) > MAX_CAUSES:
            self._told.popitem(last=False)
        if is_told:
            return
        is_known = is_queue_away(error) or isinstance(error, LorafleetError)
        text = f"{name} has failed{' with ' + what if what else ''}: {error or type(error).__name__}"
        text += f" ({num} more since the last report)" if num else ""
        logger.warning("%s", text, exc_info=None if is_known else (type(error), error, error.__traceback__))


def _raised_at(error: BaseException) -> tuple[object, int] | None:
    """Return the innermost line of code that failed outside of the queue's client, which has several code paths."""
    frames: list[TracebackType] = []
    frame = error.__traceback__
    while frame is not None:
        frames.append(frame)
        frame = frame.tb_next
    frames.reverse()
    of_the_queue = ("protocol.queue.", "redis.")
    outside = (one for one in frames if not one.tb_frame.f_globals.get("__name__", "").startswith(of_the_queue))
    found = next(outside, frames[0] if frames else None)
    return (found.tb_frame.f_code, found.tb_lineno) if found is not None else None


FAILED = Failures()
"""The failures of this process."""


@dataclass(frozen=True, slots=True)
class Loop:
    """A background loop of a service."""

    name: str  # name in the log and the metric
    work: Callable[[], Awaitable[object]]
    # seconds between two calls of `work`; 0: `work` itself waits; None: `work` never returns
    pause_s: float | None = None
    wake: asyncio.Event | None = None  # ends a pause early
    backoff: Backoff = TROUBLE  # pause after a failure
    ends: tuple[type[BaseException], ...] = ()  # errors that are raised to the loop's owner
    max_failures: int = 0  # maximum consecutive failures, without queue outages; then the last is raised; 0: no limit


async def guarded(
    loop: Loop,
    failed: Failures = FAILED,
    clock: Clock = time.monotonic,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> None:
    """Run a loop until its task is cancelled. Raises errors in `loop.ends`, and the last of `loop.max_failures`."""
    FAILURES.labels(loop.name)  # show the series from the start: a rate misses the failure with which a series begins
    num = num_own = num_unpaused = 0
    while True:
        begun_s, pause_s = clock(), loop.pause_s or 0.0
        try:
            await loop.work()
            if loop.pause_s is None:
                raise RuntimeError(f"a loop has ended: {loop.name}")
            num = num_own = 0
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and not (task is not None and task.cancelling()):
                # A library has cancelled the task from within; a task group would treat the task as finished.
                failure: BaseException = RuntimeError(f"a loop was cancelled from within: {loop.name}")
            elif not is_failure(error) or _is_any(error, loop.ends):
                raise
            else:
                failure = error
            if clock() - begun_s > CALM_S:
                num = num_own = 0
            num, num_own = num + 1, num_own + (not is_queue_away(failure))
            failed.note(loop.name, failure)
            if loop.max_failures and num_own >= loop.max_failures:
                raise failure from error.__cause__
            pause_s = loop.backoff.pause_s(num)
        if loop.wake is not None and num == 0:
            await wait_any(loop.wake, pause_s)
            loop.wake.clear()
        elif pause_s or num_unpaused >= MAX_UNPAUSED:
            num_unpaused = 0
            await sleep(pause_s)
        else:  # even a pause of 0 costs an iteration of the event loop, as much as a short turn
            num_unpaused += 1


def _is_any(error: BaseException, kinds: tuple[type[BaseException], ...]) -> bool:
    """Return whether an error is of these types, or a group that contains one."""
    if isinstance(error, BaseExceptionGroup):
        return any(_is_any(one, kinds) for one in cast("BaseExceptionGroup[BaseException]", error).exceptions)
    return isinstance(error, kinds)


class Items:
    """Units of work of one loop, by key: a failed one is retried with backoff, and finally given up."""

    def __init__(
        self, name: str, *, max_tries: int = 8, backoff: Backoff = TROUBLE, max_keys: int = 10_000,
        clock: Clock = time.monotonic,
    ) -> None:  # fmt: skip
        """max_tries: 0: no limit. max_keys: maximum number of remembered keys; beyond it, the oldest start over."""
        self._name = name
        self._max_tries = max_tries
        self._backoff = backoff
        self._max_keys = max_keys
        self._clock = clock
        self._tries: OrderedDict[str, tuple[int, float]] = OrderedDict()  # key -> (tries, time when the next is due)

    def is_due(self, key: str) -> bool:
        """Return whether a unit may be processed now."""
        return key not in self._tries or self._clock() >= self._tries[key][1]

    async def run(
        self,
        key: str,
        work: Callable[[], Awaitable[object]],
        give_up: Callable[[BaseException], Awaitable[object]] | None = None,
    ) -> float:
        """Process a unit that is due. Returns the seconds until it is due again, 0 if it is done.

        give_up: writes the end of a unit that has failed `max_tries` times; if this fails too, it is retried later.
        Raises errors which mean that the queue is away: they concern the loop, and do not count against a unit.
        """
        if not self.is_due(key):
            return self._tries[key][1] - self._clock()
        try:
            await work()
        except BaseException as error:
            if not is_failure(error) or is_queue_away(error):
                raise
            return await self._note(key, error, give_up)
        self._tries.pop(key, None)
        return 0.0

    async def _note(
        self, key: str, error: BaseException, give_up: Callable[[BaseException], Awaitable[object]] | None
    ) -> float:
        """Record a failure; see `run`."""
        num = self._tries.pop(key, (0, 0.0))[0] + 1
        FAILED.note(self._name, error, key)
        pause_s = self._backoff.pause_s(num)
        self._tries[key] = (num, self._clock() + pause_s)
        if len(self._tries) > self._max_keys:
            self._tries.popitem(last=False)
        if not self._max_tries or num < self._max_tries:
            return pause_s
        try:
            if give_up is not None:
                await give_up(error)
        except Exception as second:
            if is_queue_away(second):
                raise
            FAILED.note(self._name, second, f"the end of {key}")
            return pause_s
        del self._tries[key]
        GIVEN_UP.labels(self._name).inc()
        logger.error("%s has given up %s after %d tries: %s", self._name, key, num, error)
        return 0.0

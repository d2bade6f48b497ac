"""Readers that wait for jobs: all streams of a job share its reads of the queue, and reads per second are limited.

Each event is read once for all streams. Recent events are cached for slightly slower readers; a slower or later one
catches up by itself. A reader that is behind its log reads some tokens at a time, round-robin by tenant: so a thousand
late readers of long answers take no more of the event loop than one.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext

from gateway.jobs.job_events import JobEvent, JobEvents
from gateway.overload.cost import held, hold, own_cost, shared
from protocol.runtime.fair_slots import FairSlots
from protocol.runtime.guarded import is_failure

POLL_S, WAITING_POLL_S = 0.1, 0.5
"""Minimum seconds between reads of the logs: while tokens arrive, and before the first."""

END_POLL_S = 0.2
"""Minimum seconds between checks whether a job has ended."""

PER_S = 1000
"""Maximum notifications and reads per second for one tenant's readers on one gateway: 10 to 20 percent of a core. With
more readers, each waits longer."""

KEPT_BYTES = 256 << 10
"""Maximum bytes of a job's cached events: about a thousand tokens."""

Opening = Callable[[], Awaitable[JobEvents]]
"""Opens a job for reading from its first token."""


class SharedReader:
    """The events of one job, read at the speed of its fastest reader."""

    def __init__(
        self,
        opening: Opening,
        pause_s: Callable[[float], float],
        keepalive_s: float,
        kept_bytes: int,
        turn: Callable[[], AbstractAsyncContextManager[None]],
    ) -> None:
        """Start opening the job; errors of `opening` are raised by `open`.

        pause_s: returns the actual pause for a minimum pause. keepalive_s: interval at which readers are told what the
        job waits for. kept_bytes: size of the event cache. turn: context in which a backlog of the log is read.
        """
        self.num_readers = 0
        self.waiting_for = ""
        self._opening = opening
        self._pause_s = pause_s
        self._keepalive_s = keepalive_s
        self._kept_bytes = kept_bytes
        self._turn = turn
        self._charge = shared()
        self._kept: list[JobEvent] = []
        self._num_bytes = 0
        self._num_dropped = 0
        self._num_end = 0  # number of final events in the cache
        self._wanted = asyncio.Event()  # a reader has consumed everything
        self._news = asyncio.get_running_loop().create_future()
        self._opened: asyncio.Task[JobEvents] = asyncio.create_task(self._open())
        self._reading: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None

    @property
    def num_made(self) -> int:
        """Number of events made so far."""
        return self._num_dropped + len(self._kept)

    @property
    def is_over(self) -> bool:
        """Whether the last event has been made."""
        return self._opened.result().is_over

    @property
    def places(self) -> list[int]:
        """The position up to which the job has been read."""
        return self._opened.result().places

    async def open(self) -> None:
        """Wait until the job is open, once for all concurrent callers. Raises its error."""
        await asyncio.wait([self._opened])
        self._opened.result()
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())

    @property
    def num_told(self) -> int:
        """Number of events made so far, without the final ones, which only this reader sends."""
        return self.num_made - self._num_end

    def since(self, number: int) -> list[JobEvent] | None:
        """Return the events from `number` on; None if some of them are no longer cached."""
        return None if number < self._num_dropped else self._kept[number - self._num_dropped :]

    async def more(self, number: int, timeout_s: float) -> None:
        """Wait up to `timeout_s` for the event with this number. Raises the error that stopped the reading."""
        if self.num_made <= number and self._failure is None:
            self._wanted.set()
            await asyncio.wait([self._news], timeout=timeout_s)
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Stop reading and release the charge, without notifying readers."""
        for task in (self._opened, self._reading):
            if task is not None:
                task.cancel()
        if self._charge is not None:
            self._charge.close()

    async def _open(self) -> JobEvents:
        with own_cost(self._charge):
            events = await self._opening()
            hold(held() + self._kept_bytes)
        self._keep(events.first())
        return events

    async def _read(self) -> None:
        """Read until the job has ended, but only while a reader wants more."""
        events, loop = self._opened.result(), asyncio.get_running_loop()
        asked_s = loop.time()
        try:
            while not events.is_over:
                await self._wanted.wait()
                async with self._turn() if events.is_behind else nullcontext():
                    made = await events.advance()
                if made:
                    self._wanted.clear()
                    self._num_end = events.num_end
                    self._keep(made)
                    self._tell()
                elif not events.has_begun and loop.time() - asked_s >= self._keepalive_s / 2:
                    asked_s = loop.time()
                    self.waiting_for = await events.waiting_for()
                if not events.is_behind and not events.is_over:
                    await asyncio.sleep(self._pause_s(POLL_S if events.has_begun else WAITING_POLL_S))
        except BaseException as error:  # all readers of the job get the error, also a panic of a Rust library
            if not is_failure(error):
                raise
            self._failure = error
            self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.get_running_loop().create_future()
        news.set_result(None)

    def _keep(self, made: list[JobEvent]) -> None:
        self._kept += made
        self._num_bytes += sum(event.num_bytes for event in made)
        num = 0
        while self._num_bytes > self._kept_bytes and num < len(self._kept) - max(self._num_end, 1):
            self._num_bytes -= self._kept[num].num_bytes
            num += 1
        del self._kept[:num]
        self._num_dropped += num


class _Ending:
    """The shared wait for a job's end."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self.task = task
        self.num_readers = 0


class JobReaders:
    """The jobs that clients of this gateway stream, or whose end they wait for."""

    def __init__(self, keepalive_s: float, kept_bytes: int = KEPT_BYTES, per_s: int = PER_S) -> None:
        """kept_bytes: size of a job's event cache; per_s: notifications per second for one tenant's readers."""
        self.keepalive_s = keepalive_s
        self._kept_bytes = kept_bytes
        self._per_s = per_s
        self._streams: dict[str, SharedReader] = {}
        self._endings: dict[str, _Ending] = {}
        self._num_of: Counter[str] = Counter()  # number of readers per tenant
        self._behind = FairSlots(1)

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a tenant's turn to read a backlog of a log."""
        await self._behind.take(tenant)
        try:
            yield
        finally:
            self._behind.give(tenant)

    def pause_s(self, tenant: str, least_s: float) -> float:
        """Return the seconds that a tenant's readers wait between two reads."""
        return max(least_s, self._num_of[tenant] / self._per_s)

    @asynccontextmanager
    async def stream(self, jid: str, tenant: str, opening: Opening) -> AsyncIterator[SharedReader]:
        """Yield a job's shared reader, which is closed by the last of its users. Raises as `opening`."""
        reader = self._streams.get(jid)
        if reader is None:
            reader = self._streams[jid] = SharedReader(
                opening,
                lambda least_s: self.pause_s(tenant, least_s),
                self.keepalive_s,
                self._kept_bytes,
                lambda: self.turn(tenant),
            )
        with self._among(tenant, reader):
            try:
                await reader.open()
                yield reader
            finally:
                if reader.num_readers == 1:
                    del self._streams[jid]
                    reader.close()

    async def end(self, jid: str, tenant: str, waiting: Callable[[Callable[[], float]], Awaitable[None]]) -> None:
        """Wait for a job's end; `waiting`, which is passed its pauses, runs once for all concurrent callers."""
        ending = self._endings.get(jid)
        if ending is None:
            task = asyncio.create_task(_await(waiting(lambda: self.pause_s(tenant, END_POLL_S))))
            ending = self._endings[jid] = _Ending(task)
        with self._among(tenant, ending):
            try:
                await asyncio.wait([ending.task])
                ending.task.result()
            finally:
                if ending.num_readers == 1:
                    del self._endings[jid]
                    ending.task.cancel()

    @contextmanager
    def _among(self, tenant: str, shared: SharedReader | _Ending) -> Iterator[None]:
        """Count the block as one of a tenant's readers, and as a user of a shared object."""
        self._num_of[tenant] += 1
        shared.num_readers += 1
        try:
            yield
        finally:
            shared.num_readers -= 1
            self._num_of[tenant] -= 1
            if not self._num_of[tenant]:
                del self._num_of[tenant]


async def _await(what: Awaitable[None]) -> None:
    await what

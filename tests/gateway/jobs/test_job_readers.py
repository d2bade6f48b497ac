"""Clients that stream a job or wait for its end share reads, miss no events, and don't delay each other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import httpx2
import pytest
from helpers.openai_events import events_of, text_of
from helpers.scripted_fleet import Script, ScriptedFleet
from helpers.waiting import wait_until
from starlette.responses import Response

from gateway.answers.respond import Answers
from gateway.jobs.job_events import JobEvent
from gateway.jobs.job_readers import KEPT_BYTES, JobReaders
from gateway.jobs.job_stream import JobStream
from protocol.queue.bus import Bus
from protocol.wire.errors import NotFound

NUM = 40

END = b"data: [DONE]\n\n"
"""Event of the end of a job; jobs here have two."""


class Told:
    """Events of one choice with a letter each, which appear when the test allows."""

    def __init__(self, num: int, known: Callable[[], int]) -> None:
        self.choices = [object()]
        self.num, self.known = num, known
        self.next = self.num_looks = self.num_end = 0
        self.is_behind = False

    @property
    def is_over(self) -> bool:
        return self.next >= self.num

    @property
    def has_begun(self) -> bool:
        return self.next > 0

    @property
    def places(self) -> list[int]:
        return [self.next]

    def first(self) -> list[JobEvent]:
        return [JobEvent(0, place, [f"data: {place}\n\n".encode()]) for place in (-1, 0)]

    def has_reached(self, goal: Sequence[int]) -> bool:
        return self.next >= goal[0]

    async def advance(self) -> list[JobEvent]:
        self.num_looks += 1
        made = await self.catch_up([min(self.known(), self.next + 4)])
        self.num_end = 2 * self.is_over
        return [*made, *[JobEvent(0, None, [END])] * self.num_end]

    async def catch_up(self, goal: Sequence[int]) -> list[JobEvent]:
        await asyncio.sleep(0)
        begin, self.next = self.next, min(self.next + 4, goal[0])
        return [JobEvent(0, place, [f"data: {place}\n\n".encode()]) for place in range(begin + 1, self.next + 1)]

    async def waiting_for(self) -> str:
        return "a test"


class Job:
    """A job of `num` events, `known` of which exist, which records how often it was opened."""

    def __init__(self, num: int, known: int) -> None:
        self.num, self.known = num, known
        self.opened: list[Told] = []

    async def open(self) -> Any:
        await asyncio.sleep(0)
        self.opened.append(Told(self.num, lambda: self.known))
        return self.opened[-1]


async def never() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


def shown(stream: JobStream) -> Response:
    """Return the response that sends a job's stream."""
    return Answers(10.0).show(stream)


async def streamed(
    readers: JobReaders, job: Job, after: int = 0, pause: Callable[[int], asyncio.Event | None] = lambda num: None
) -> list[str]:
    """Return the lines sent to a client; `pause` maps the number of sends to an event to await before the next."""
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        gate = pause(len(sent))
        if gate is not None:
            await gate.wait()

    stream = JobStream(readers, "job_1", "a", job.open, lambda num: [after] * num)
    await shown(stream)({"type": "http"}, never, send)
    return b"".join(sent).decode().split("\n")


def places(lines: list[str]) -> list[int]:
    """Return the positions of events, which must equal their ids."""
    assert [line for line in lines if line][-2:] == 2 * [END.decode().strip()], "the end was not told"
    found = [int(line.removeprefix("data: ")) for line in lines if line.startswith("data: ") and line[-1].isdecimal()]
    assert [int(line.removeprefix("id: ")) for line in lines if line.startswith("id: ")] == found
    return found


async def test_all_who_stream_a_job_share_its_reader() -> None:
    readers, job = JobReaders(10.0, per_s=10_000), Job(30, 10)
    alone = asyncio.create_task(streamed(readers, job))
    await wait_until(lambda: bool(job.opened) and job.opened[0].next == 10, "what is known was read")
    others = [asyncio.create_task(streamed(readers, job, after)) for after in (0, 3, 9, 10)]
    await asyncio.sleep(0)
    job.known = 30
    found = [places(lines) for lines in await asyncio.gather(alone, *others)]
    assert found == [list(range(1 + after, 31)) for after in (0, 0, 3, 9, 10)]
    assert len(job.opened) == 1
    assert readers._streams == {}
    assert not readers._num_of


async def test_first_events_larger_than_the_cache_are_sent() -> None:
    readers, job = JobReaders(10.0, kept_bytes=5, per_s=10_000), Job(4, 0)
    client = asyncio.create_task(streamed(readers, job, after=-2))
    await wait_until(lambda: len(job.opened) == 2, "the client's own reader has opened the job")
    job.known = 4
    assert places(await client) == [-1, 0, 1, 2, 3, 4]


async def test_a_client_that_falls_behind_misses_nothing_and_holds_up_nobody() -> None:
    readers, job = JobReaders(10.0, kept_bytes=100, per_s=10_000), Job(60, 60)
    gate = asyncio.Event()
    slow = asyncio.create_task(streamed(readers, job, pause=lambda num: gate if num == 3 else None))
    await wait_until(lambda: bool(job.opened) and job.opened[0].next > 4, "the slow client was told something")
    assert places(await streamed(readers, job)) == list(range(1, 61))
    gate.set()
    assert places(await slow) == list(range(1, 61))
    assert 2 <= len(job.opened) <= 3  # the late client and the slow one have read by themselves


async def test_who_streams_a_large_job_that_has_ended_is_told_its_end(
    http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    fleet.script = lambda submit, body: Script(text="a" * 62, finish="length", eos=False, chunk=62)
    body = {"model": "base", "prompt": "hi", "max_tokens": 62, "n": 64, "background": True}
    job = (await http.post("/v1/completions", json=body)).json()
    ended = (await http.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=30"})).json()
    assert ended["status"] == "completed"
    told = (await http.get(f"/v1/jobs/{job['id']}/stream")).text
    assert len(told) > KEPT_BYTES, "what is made at once is more than is kept"
    assert told.count('"finish_reason":"length"') == 64
    assert told.endswith("data: [DONE]\n\n")


async def test_a_job_is_read_no_further_than_the_fastest_client_reads() -> None:
    readers, job = JobReaders(10.0, kept_bytes=100, per_s=10_000), Job(60, 60)
    gate = asyncio.Event()
    slow = asyncio.create_task(streamed(readers, job, pause=lambda num: gate if num == 3 else None))
    await wait_until(lambda: bool(job.opened) and job.opened[0].next >= 8, "the client was told something")
    for _ in range(50):
        await asyncio.sleep(0)
    assert job.opened[0].next <= 12
    gate.set()
    assert places(await slow) == list(range(1, 61))


class Behind(Told):
    """Events that all exist, which record the tenant that reads them."""

    def __init__(self, num: int, tenant: str, order: list[str], reading: set[int]) -> None:
        super().__init__(num, lambda: num)
        self.tenant, self.order, self.reading = tenant, order, reading
        self.is_behind = True

    async def catch_up(self, goal: Sequence[int]) -> list[JobEvent]:
        assert not self.reading, "another one reads"
        self.reading.add(id(self))
        self.order.append(self.tenant)
        try:
            return await super().catch_up(goal)
        finally:
            self.reading.remove(id(self))


async def test_who_is_behind_reads_in_turns_of_tenants() -> None:
    """Only one of a hundred late readers, of one answer or many, reads at a time; another tenant waits for few."""
    readers, num, order, reading = JobReaders(10.0, kept_bytes=100, per_s=10_000), 40, list[str](), set[int]()

    async def ask(tenant: str, jid: str) -> list[int]:
        async def opening() -> Any:
            return Behind(num, tenant, order, reading)

        sent: list[bytes] = []

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))

        stream = JobStream(readers, jid, tenant, opening, lambda num: [0] * num)
        await shown(stream)({"type": "http"}, never, send)
        return places(b"".join(sent).decode().split("\n"))

    many = [asyncio.create_task(ask("a", f"job_{i}")) for i in range(100)]
    many += [asyncio.create_task(ask("a", "job_late")) for _ in range(100)]
    await wait_until(lambda: len(order) > 20, "the first read")
    begun = len(order)
    assert await ask("b", "job_b") == list(range(1, num + 1))
    between = order[begun:]
    assert between.count("b") == num // 4
    assert len(between) <= 8 * (num // 4), "of two hundred others few were before it each time"
    for found in await asyncio.gather(*many):
        assert found == list(range(1, num + 1))


async def test_the_first_client_may_leave_without_the_others() -> None:
    readers, job = JobReaders(10.0, per_s=10_000), Job(30, 10)
    first = asyncio.create_task(streamed(readers, job))
    second = asyncio.create_task(streamed(readers, job))
    await wait_until(lambda: bool(job.opened) and job.opened[0].next == 10, "what is known was read")
    first.cancel()
    job.known = 30
    assert places(await second) == list(range(1, 31))
    with pytest.raises(asyncio.CancelledError):
        await first
    assert readers._streams == {}


async def test_what_is_wrong_with_a_job_is_told_to_all_and_forgotten() -> None:
    readers, calls = JobReaders(10.0), 0

    async def opening() -> Any:
        nonlocal calls
        calls += 1
        raise NotFound("the result has expired")

    async def send(_: Any) -> None:
        raise AssertionError("nothing may be sent")

    def stream() -> Any:
        return shown(JobStream(readers, "job_1", "a", opening, lambda num: [0] * num))({"type": "http"}, never, send)

    found = await asyncio.gather(*(stream() for _ in range(5)), return_exceptions=True)
    assert [type(error) for error in found] == [NotFound] * 5
    assert calls == 1
    assert readers._streams == {}


class PanicException(BaseException):
    """What a panic of a library in Rust looks like."""


class Panicking(Told):
    async def advance(self) -> list[JobEvent]:
        if self.num_looks:
            raise PanicException
        return await super().advance()


async def test_a_panic_while_a_job_is_read_ends_all_who_stream_it() -> None:
    readers, job = JobReaders(10.0, per_s=10_000), Job(30, 4)

    async def opening() -> Any:
        return Panicking(job.num, lambda: job.known)

    job.open = opening  # type: ignore[method-assign]
    for lines in await asyncio.gather(*(streamed(readers, job) for _ in range(3))):
        assert "internal_error" in "".join(lines)
    assert readers._streams == {}


async def test_the_end_is_waited_for_once_and_not_after_all_have_left() -> None:
    readers, begun, ended = JobReaders(10.0), list[str](), asyncio.Event()

    async def waiting(pause_s: Callable[[], float]) -> None:
        assert pause_s() > 0
        begun.append("")
        try:
            await ended.wait()
        finally:
            begun[-1] = "over"

    tasks = [asyncio.create_task(readers.end("job_1", "a", waiting)) for _ in range(5)]
    await wait_until(lambda: bool(begun), "somebody waits")
    tasks[0].cancel()
    ended.set()
    await asyncio.gather(*tasks[1:])
    assert begun == ["over"]
    ended.clear()
    last = asyncio.create_task(readers.end("job_1", "a", waiting))
    await wait_until(lambda: len(begun) == 2, "somebody waits again")
    last.cancel()
    await wait_until(lambda: begun == ["over", "over"], "nobody waits any more")
    assert readers._endings == {}


async def test_many_readers_of_a_tenant_look_no_more_often_than_few() -> None:
    readers = JobReaders(10.0, per_s=1000)
    forever = asyncio.Event()

    async def waiting(pause_s: Callable[[], float]) -> None:
        await forever.wait()

    tasks = [asyncio.create_task(readers.end(f"job_{i}", "many", waiting)) for i in range(600)]
    await asyncio.sleep(0)
    assert readers.pause_s("many", 0.1) == 0.6
    assert readers.pause_s("few", 0.1) == 0.1
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert readers.pause_s("many", 0.1) == 0.1


async def test_forty_streams_of_a_job_read_its_log_as_often_as_one(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, bus: Bus
) -> None:
    fleet.script = lambda submit, body: Script(text="abc " * 20, hold_after=3, chunk=2)
    body = {"model": "base", "prompt": "hi", "max_tokens": 100, "background": True}
    job = (await http.post("/v1/completions", json=body)).json()
    path = f"/v1/jobs/{job['id']}/stream"
    await wait_until(lambda: bool(fleet.seen), "the job runs")

    async def reads(num: int) -> int:
        """Return how often logs are read while `num` clients stream the rest of the job."""
        await bus._redis.config_resetstat()
        streams = [asyncio.create_task(http.get(path)) for _ in range(num)]
        answers = await asyncio.gather(*streams)
        texts = {text_of(events_of(answer)) for answer in answers}
        assert texts == {"abc " * 20}
        return (await bus._redis.info("commandstats")).get("cmdstat_getrange", {"calls": 0})["calls"]

    fleet.go.set()
    many = await reads(NUM)
    one = await reads(1)
    assert many <= 3 * one + NUM, "those that come at different times may read it again, but not each"


async def test_forty_who_wait_for_a_job_look_as_often_as_one(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, bus: Bus
) -> None:
    fleet.assigning.clear()
    body = {"model": "base", "prompt": "hi", "max_tokens": 3, "background": True}
    job = (await http.post("/v1/completions", json=body)).json()

    async def looks(num: int) -> int:
        await bus._redis.config_resetstat()
        waits = [http.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=2"}) for _ in range(num)]
        assert {answer.json()["status"] for answer in await asyncio.gather(*waits)} == {"queued"}
        return (await bus._redis.info("commandstats"))["cmdstat_hmget"]["calls"]

    one, many = await looks(1), await looks(NUM)
    assert many < NUM * one / 2, "beside the first and the last look of each, one looks for all"

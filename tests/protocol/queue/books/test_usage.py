"""Usage: each request counts once, when it ends, however it ends and whichever service died before."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from helpers.script_queue import Queue, make_body, make_submit, row

from protocol.queue.books.usage import DAY_S, MAX_RESIDENT, OTHERS, CountedFor, UsageRow, usage_of
from protocol.queue.bus import Bus, StepResult, now_ms
from protocol.wire import messages as m
from protocol.wire.errors import WorkerLost

ACME = CountedFor("acme", "sql", "d1", "tiny", False, 3)


@pytest.fixture
def queue(bus: Bus) -> Queue:
    return Queue(bus)


def today() -> int:
    return now_ms() // (DAY_S * 1000)


async def submit(
    queue: Queue, *rids: str, counted: CountedFor = ACME, has_output: bool = True, waits: bool = False
) -> None:
    """Submit the choices of one prompt, assigned to worker `w` unless `waits`."""
    usages = [
        usage_of(counted, calls=int(i == 0), prompt_tokens=3 if i == 0 else 0, has_output=has_output)
        for i in range(len(rids))
    ]
    pairs = [(make_submit(rid), make_body()) for rid in rids]
    assert (await queue.bus.submit("interactive", pairs, max_queued=9999, usages=usages))[0] == "ok"
    if not waits:
        await queue.bus.streams.create(queue.keys.work("w"), 60)
        assert (await queue.assign(*rids))[0] == "ok"


async def counts(queue: Queue, tenant: str = "acme") -> list[tuple[int, int, int, int]]:
    rows = await queue.bus.usage.rows(today(), tenant)
    return [(row.requests, row.prompt_tokens, row.cached_tokens, row.output_tokens) for row in rows]


async def test_a_request_counts_with_its_end(queue: Queue) -> None:
    await submit(queue, "a")
    await queue.write(row("a", 0, 5, 6))
    assert await counts(queue) == []
    end = msgspec.structs.replace(row("a", 2, 7, finish="stop"), num_cached=2)
    assert not await queue.write(end)
    assert await queue.bus.usage.rows(today(), "acme") == [UsageRow("acme", "sql", "d1", "tiny", False, 1, 3, 2, 3)]
    assert await queue.bus.usage.tenants(today()) == ["acme"]
    assert await queue.write(end)  # a repetition after a lost reply is refused
    assert await counts(queue) == [(1, 3, 2, 3)]
    for key in (queue.keys.usage_tenants(today()), queue.keys.usage(today(), "acme")):
        assert 2 * DAY_S < await queue.ttl_s(key) <= 4 * DAY_S


async def test_choices_of_a_prompt_count_it_once(queue: Queue) -> None:
    await submit(queue, "a-0", "a-1")
    ends = [
        msgspec.structs.replace(row(rid, 0, 5, finish="stop"), num_cached=num) for rid, num in (("a-0", 1), ("a-1", 3))
    ]
    await queue.write(*ends)
    assert await counts(queue) == [(1, 3, 1, 2)]


async def test_numbers_are_no_output_tokens(queue: Queue) -> None:
    await submit(queue, "a", has_output=False)
    await queue.write(row("a", 0, 5, 6, finish="stop"))
    assert await counts(queue) == [(1, 3, 0, 0)]


async def test_a_request_that_was_run_again_counts_once(queue: Queue) -> None:
    await submit(queue, "a")
    await queue.write(row("a", 0, 5, 6))
    assert await queue.requeue("a") == {"a": "requeued"}
    await queue.bus.streams.create(queue.keys.work("v"), 60)
    assert (await queue.assign("a", wid="v", epoch=2))[0] == "ok"
    assert await queue.write(row("a", 2, 7, finish="stop"))  # its previous owner resumes
    await queue.bus.step("v", StepResult(rows=[row("a", 2, 7, 8, epoch=3, finish="stop")]))
    assert await counts(queue) == [(1, 3, 0, 4)]


async def test_cancelled_and_failed_requests_count_what_they_made(queue: Queue) -> None:
    await submit(queue, "waits", waits=True)
    assert await queue.bus.cancel("waits") == "cancelled"
    await submit(queue, "read")
    assert await queue.bus.finish("read", "failed", "error", WorkerLost("read"))
    assert await counts(queue) == []  # nothing was computed for them
    await submit(queue, "runs")
    await queue.write(row("runs", 0, 5, 6))
    await queue.bus.cancel("runs")
    await queue.write(row("runs", 2, finish="cancelled"))
    assert await counts(queue) == [(1, 3, 0, 2)]
    await submit(queue, "late")
    await queue.write(row("late", 0, 5))
    assert await queue.bus.finish("late", "failed", "error", WorkerLost("late"))
    assert not await queue.bus.finish("late", "failed", "error", WorkerLost("late"))
    assert await counts(queue) == [(2, 6, 0, 3)]


@pytest.mark.parametrize("has_begun", [True, False])
async def test_a_retried_dead_letter_counts_the_rest(queue: Queue, has_begun: bool) -> None:
    await submit(queue, "a")
    made = (5, 6) if has_begun else ()
    await queue.write(row("a", 0, *made))
    letter = m.DeadLetter(reason="poison", submit=make_submit("a"), attempts=3, num_output_tokens=2, ms=now_ms())
    assert await queue.bus.finish("a", "failed", "error", WorkerLost("poison"), dead_letter=letter)
    assert await counts(queue) == ([(1, 3, 0, 2)] if has_begun else [])
    ((letter_id, _),) = await queue.bus.dead_letters.newest(1)
    await queue.bus.dead_letters.retry(letter_id, 60)
    ((_, epoch),) = await queue.queued()
    assert (await queue.assign("a", epoch=epoch))[0] == "ok"
    await queue.write(row("a", len(made), 7, epoch=epoch + 1, finish="stop"))
    assert await counts(queue) == [(1, 3, 0, len(made) + 1)]


async def test_rows_of_a_day_are_bounded_and_sums_exact(queue: Queue) -> None:
    for rid in ("a", "b", "c", "d"):
        await submit(queue, rid, counted=replace(ACME, model=rid))
        await queue.write(row(rid, 0, 5, finish="stop"))
        if rid == "a":
            fields = {f'["m{i}","","",0]': "1 1 0 1" for i in range(998)}
            await queue.bus._redis.hset(queue.keys.usage(today(), "acme"), mapping=fields)
    rows = await queue.bus.usage.rows(today(), "acme")
    assert len(rows) == 1001
    assert [(row.requests, row.output_tokens) for row in rows if not row.model] == [(2, 2)]
    assert sum(row.requests for row in rows) == 998 + 4


async def test_long_names_are_cut_and_tenants_apart(queue: Queue) -> None:
    await submit(queue, "a", counted=replace(ACME, model="x" * 1000))
    await submit(queue, "b", counted=replace(ACME, tenant="other", batch=True))
    await queue.write(row("a", 0, 5, finish="stop"), row("b", 0, 5, 6, finish="length"))
    assert [len(row.model) for row in await queue.bus.usage.rows(today(), "acme")] == [128]
    assert [(row.batch, row.output_tokens) for row in await queue.bus.usage.rows(today(), "other")] == [(True, 2)]
    assert await queue.bus.usage.tenants(today()) == ["acme", "other"]


async def test_time_in_pools_is_added_up(queue: Queue) -> None:
    for ms in ({"d1": 1500, "d2": 20}, {"d1": 500}):
        await queue.bus.usage.note_residency(ms, 3)
    assert await queue.bus.usage.residency(today()) == {"d1": 2.0, "d2": 0.02}
    assert 3 * DAY_S < await queue.ttl_s(queue.keys.residency(today())) <= 4 * DAY_S


async def test_adapters_told_apart_in_pools_are_bounded(queue: Queue) -> None:
    usage = queue.bus.usage
    await usage.note_residency({f"d{number}": 1 for number in range(MAX_RESIDENT - 1)}, 3)
    for _ in range(2):
        await usage.note_residency({"new": 10, "late": 20, "later": 300, "d0": 1000}, 3)
    seconds = await usage.residency(today())
    assert len(seconds) == MAX_RESIDENT + 1
    assert (seconds["new"], seconds["d0"], seconds[OTHERS]) == (0.02, 2.001, 0.64)

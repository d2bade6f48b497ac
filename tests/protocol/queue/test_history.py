"""The history of requests in the queue: limits on an entry and on all tenants together, and expiry."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.script_queue import Queue, make_body, make_submit
from helpers.waiting import wait_until
from redis.asyncio.client import Pipeline

from protocol.queue.books.usage import CountedFor, usage_of
from protocol.queue.history import MAX_ALL_REFUSALS, kept_for
from protocol.wire import messages as m
from protocol.wire.codec import decode
from protocol.wire.error_codec import error_from
from protocol.wire.errors import AdapterRefused, LorafleetError

KEEP_S, NUM = 60.0, 100
MAX_ALL = 200_000
"""Maximum number of ends kept for all tenants, `history_entries` in `lua/common.lua`."""


async def end(queue: Queue, *rids: str, tenant: str = "t", error: LorafleetError | None = None) -> None:
    """Submit requests whose ends are recorded in the history, and end them."""
    counted = CountedFor(tenant, "base", "", "base", batch=False, days=1)
    usage = usage_of(counted, calls=1, prompt_tokens=3, has_output=True)
    for rid in rids:
        pairs = [(make_submit(rid, tenant=tenant), make_body())]
        sent = await queue.bus.submit(
            "interactive", pairs, max_queued=1000, usages=[usage], history=kept_for(KEEP_S, NUM)
        )
        assert sent == ("ok", None)
        assert await queue.bus.finish(rid, "failed", "error", error)


async def last(queue: Queue) -> bytes:
    [(_, fields)] = await queue.bus._redis.xrevrange(queue.keys.history("t"), count=1)
    return fields[b"b"]


async def make_tenants(queue: Queue, num: int) -> None:
    """Give `num` other tenants a history."""
    others = {f"other-{number}": float(await now_ms(queue)) for number in range(num)}
    await queue.bus._redis.zadd(queue.keys.histories, others)
    await queue.bus._redis.expire(queue.keys.histories, 60)


async def now_ms(queue: Queue) -> int:
    seconds, _ = await queue.bus._redis.time()
    return 1000 * seconds


async def test_a_long_error_is_cut_and_still_read(queue: Queue) -> None:
    for number, text in enumerate(("x" * 25_000, "é" * 25_000, "x" + "é" * 25_000, "€" * 25_000, "x😀" * 9_000)):
        await end(queue, f"a{number}", error=AdapterRefused([text, "more"]))
        entry = await last(queue)
        assert len(entry) < 1000
        found = error_from(decode(entry, m.HistoryEntry).error)
        assert isinstance(found, AdapterRefused)
        whole = AdapterRefused([text, "more"])
        assert found.code == whole.code
        assert whole.message.startswith(found.message)
        assert 296 < len(found.message.encode()) <= 300
    await end(queue, "b", error=LorafleetError("short", code="odd", param="p"))
    found = error_from(decode(await last(queue), m.HistoryEntry).error)
    assert (found.message, found.code, found.param) == ("short", "odd", "p")


@pytest.mark.thorough
async def test_tenants_share_what_the_fleet_keeps(queue: Queue) -> None:
    key = queue.keys.history("t")
    await end(queue, *(f"a{number}" for number in range(NUM)))
    assert await queue.bus._redis.xlen(key) == NUM
    await make_tenants(queue, MAX_ALL // 10)
    await queue.bus._redis.zadd(queue.keys.histories, {"t": 0.0})  # as ten seconds later
    await end(queue, "b")
    assert 10 <= await queue.bus._redis.xlen(key) < 30, "whole nodes are trimmed"
    refused = m.HistoryEntry("r", "r", "", "", "refused", "error", "", "", 0, 0, 0, 0, 1, 0, await now_ms(queue))
    await queue.bus.history.add_refusals([("t", refused)] * NUM, 60_000)
    share = MAX_ALL_REFUSALS * 10 // MAX_ALL
    assert share <= await queue.bus._redis.xlen(queue.keys.refusals("t")) < NUM


async def test_refused_calls_are_written_a_few_at_a_time(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sending a thousand commands at once, for a second with refusals of many tenants, would block the gateway."""
    sizes: list[int] = []
    execute = Pipeline.execute

    async def noted(pipe: Any) -> Any:
        sizes.append(len(pipe.command_stack))
        return await execute(pipe)

    monkeypatch.setattr(Pipeline, "execute", noted)
    refused = m.HistoryEntry("r", "r", "", "", "refused", "error", "", "", 0, 0, 0, 0, 1, 0, await now_ms(queue))
    found = [(f"t{number % 50}", refused) for number in range(1000)]
    await queue.bus.history.add_refusals(found, 60_000)
    assert [await queue.bus._redis.xlen(queue.keys.refusals(f"t{number}")) for number in range(50)] == [20] * 50
    assert max(sizes) <= 30
    assert await queue.bus._redis.zcard(queue.keys.histories) == 50


async def test_who_is_silent_keeps_no_more_than_its_share(queue: Queue) -> None:
    """A tenant that has filled its history and ends nothing more is trimmed while others continue."""
    redis, keys = queue.bus._redis, queue.keys
    await make_tenants(queue, 1)
    for key in (keys.history("other-0"), keys.refusals("other-0")):
        pipe = redis.pipeline(transaction=False)
        for _ in range(3000):
            pipe.xadd(key, {"b": b"x"})
        pipe.expire(key, 60)
        await pipe.execute()
    number = 0

    async def are_trimmed() -> bool:
        nonlocal number
        number += 1
        await redis.zadd(keys.histories, {"t": 0.0})  # as ten seconds later
        await end(queue, f"a{number}")
        refused = m.HistoryEntry("r", "r", "", "", "refused", "error", "", "", 0, 0, 0, 0, 1, 0, await now_ms(queue))
        await queue.bus.history.add_refusals([("t", refused)], 60_000)
        ends, refusals = await redis.xlen(keys.history("other-0")), await redis.xlen(keys.refusals("other-0"))
        return ends < 2 * NUM and refusals < 2000

    await wait_until(are_trimmed, "the silent tenant's history is trimmed")


async def test_a_history_has_an_end_whatever_a_gateway_s_clock_says(queue: Queue) -> None:
    """A refusal recorded by a gateway with a fast clock must not make the tenant's first end skip the expiry."""
    await queue.bus._redis.zadd(queue.keys.histories, {"t": float(await now_ms(queue) + 30_000)})
    await queue.bus._redis.expire(queue.keys.histories, 60)
    await end(queue, "a")
    assert 0 < await queue.ttl_s(queue.keys.history("t")) <= KEEP_S
    for ahead_ms in (3000, 12_000, 19_000, 25_000):
        soon_ms = await now_ms(queue) + ahead_ms
        refused = m.HistoryEntry("r", "r", "", "", "refused", "error", "", "", 0, 0, 0, 0, 1, 0, soon_ms)
        await queue.bus._redis.delete(queue.keys.histories, queue.keys.history("t"))
        await queue.bus.history.add_refusals([("t", refused)], 60_000)
        await end(queue, f"b{ahead_ms}")
        assert 0 < await queue.ttl_s(queue.keys.history("t")) <= KEEP_S, ahead_ms

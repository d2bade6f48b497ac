"""The queue's data for a copy of the history: each new entry once, and texts only for their own tenant."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from helpers.full_memory import full_memory
from helpers.script_queue import GATEWAY, Queue, ids, make_body, make_job, make_submit, row

from protocol.queue.archive import LEASE_MS, NewPast, TextFound
from protocol.queue.books.quota import Quota
from protocol.queue.books.usage import CountedFor, usage_of
from protocol.queue.bus import Bus, now_ms
from protocol.queue.history import kept_for
from protocol.runtime.fleet_secret import FleetSecret
from protocol.runtime.sealing import MARK, Seal
from protocol.wire import messages as m
from protocol.wire.errors import ProtocolError, Unavailable

PROMPT = make_body().prompt
KEEP_MS = 60_000


async def submit(queue: Queue, *rids: str, tenant: str = "t", text: int = 2, stored: bool = False) -> None:
    usage = usage_of(
        CountedFor(tenant, "base", "", "base", batch=False, days=1), calls=1, prompt_tokens=3, has_output=True
    )
    pairs = [(make_submit(rid, tenant=tenant, stored=stored), make_body()) for rid in rids]
    sent = await queue.bus.submit(
        "interactive", pairs, max_queued=1000, usages=[usage] * len(rids), history=kept_for(KEEP_MS / 1000, 1000),
        text=text,
    )  # fmt: skip
    assert sent == ("ok", None)


async def end(queue: Queue, *rids: str, tenant: str = "t") -> None:
    for rid in rids:
        await submit(queue, rid, tenant=tenant)
        assert await queue.bus.finish(rid, "failed", "error")


async def new(queue: Queue, *tenants: str, num: int = 100) -> list[NewPast]:
    return await queue.bus.archive.new(tenants or ("t",), num, now_ms() - KEEP_MS)


def rids_of(found: list[NewPast]) -> list[str]:
    return [one.entry.rid for part in found for one in part.found if one.entry is not None]


async def kept_bytes(bus: Bus, tenant: str) -> int:
    return -int(await bus._redis.zscore(bus.keys.kept(tenant), "sum") or 0)


async def test_what_is_new_is_found_until_it_is_copied(queue: Queue) -> None:
    await end(queue, "a", "b")
    refused = m.HistoryEntry("r", "r", "", "", "refused", "error", "", "", 0, 0, 0, 0, 0, 0, now_ms())
    await queue.bus.history.add_refusals([("t", refused)], KEEP_MS)
    await end(queue, "o", tenant="other")
    assert sorted(await queue.bus.archive.tenants(0)) == ["other", "t"]
    assert await queue.bus.archive.tenants(now_ms() + KEEP_MS) == []
    found = await new(queue, "t", "other", "nobody")
    assert rids_of(found) == rids_of(await new(queue, "t", "other")) == ["a", "b", "r", "o"]
    assert not any(one.has_more or one.has_gap for one in found)
    places = [place async for place, _, _ in queue.bus.history.walk(["t"], 0, 0, None)]
    assert sorted(one.place for one in found[0].found) == sorted(places), "as the list in the queue has them"
    await queue.bus.archive.copied(found, KEEP_MS)
    assert await new(queue, "t", "other") == []
    await end(queue, "c")
    assert rids_of(await new(queue)) == ["c"]
    assert 0 < await queue.bus._redis.pttl(queue.keys.copied("t")) <= 2 * KEEP_MS


async def test_a_busy_tenants_ends_come_some_at_a_time(queue: Queue) -> None:
    await end(queue, *(f"a{number}" for number in range(5)))
    await end(queue, "o", tenant="other")
    seen: list[str] = []
    for has_more in (True, True, False):
        found = await new(queue, "t", "other", num=2)
        assert found[0].has_more == has_more
        await queue.bus.archive.copied(found, KEEP_MS)
        seen += rids_of(found)
    assert seen == ["a0", "a1", "o", "a2", "a3", "a4"]


async def test_ends_that_left_the_queue_before_they_were_copied_are_a_gap(queue: Queue) -> None:
    await end(queue, *(f"a{number}" for number in range(6)))
    await queue.bus.archive.copied(await new(queue, num=2), KEEP_MS)
    key = queue.keys.history("t")
    assert [one.has_gap for one in await new(queue, num=2)] == [False]
    await queue.bus._redis.xtrim(key, maxlen=2, approximate=False)
    assert [one.has_gap for one in await new(queue, num=2)] == [True]


async def test_an_entry_that_cannot_be_read_holds_up_nothing(queue: Queue) -> None:
    await end(queue, "a")
    await queue.bus._redis.xadd(queue.keys.history("t"), {"b": b"\xc1 of another release"})
    await end(queue, "b")
    [found] = await new(queue)
    assert [one.entry.rid if one.entry is not None else None for one in found.found] == ["a", None, "b"]


@pytest.mark.parametrize("raw", [b"", b"5-0", b"1-0 1-0 1-0", b"x y", b"\xff", b"-1-0 0-0", b"9" * 30 + b"-0 0-0"])
async def test_a_note_that_cannot_be_read_holds_up_no_tenant(queue: Queue, raw: bytes) -> None:
    """What is copied once more changes nothing."""
    await end(queue, "a")
    await end(queue, "o", tenant="other")
    await queue.bus._redis.set(queue.keys.copied("t"), raw, px=KEEP_MS)
    assert rids_of(await new(queue, "t", "other")) == ["a", "o"]


async def test_facts_that_cannot_be_read_hold_up_no_text(queue: Queue) -> None:
    for rid in ("a", "b", "c"):
        await submit(queue, rid)
        await queue.bus.finish(rid, "failed", "error")
    await queue.bus._redis.hset(queue.keys.req("a"), mapping={"text": b"many"})
    await queue.bus._redis.hset(queue.keys.req("b"), mapping={"call": b"\xff"})
    found = await queue.bus.archive.texts([("t", rid) for rid in ("a", "b", "c")])
    assert [one.text is not None for one in found] == [False, False, True]


async def test_a_text_is_the_end_of_the_prompt_and_the_beginning_of_the_output(queue: Queue) -> None:
    await submit(queue, "a")
    await queue.assign("a")
    await queue.write(row("a", 0, 5, 6, 7, finish="stop"))
    assert await queue.bus.archive.texts([("t", "a")]) == [TextFound(m.KeptText(PROMPT[-8:], ids(5, 6), "", ""))]


async def test_texts_of_others_and_of_those_who_keep_none_are_not_found(queue: Queue) -> None:
    await end(queue, "a")
    await submit(queue, "plain", text=0)
    await queue.bus.finish("plain", "failed", "error")
    wanted = [("other", "a"), ("t", "plain"), ("", "a"), ("t", "a"), ("t", "nobody")]
    found = await queue.bus.archive.texts(wanted)
    assert [one.text is not None for one in found] == [False, False, False, True, False]
    assert [one.is_lost for one in found] == [False, False, False, False, True]


async def test_a_prompt_counts_for_its_tenant_as_long_as_it_is_there(bus: Bus, queue: Queue) -> None:
    kept: list[int] = []
    for text in (0, 2):
        usage = usage_of(
            CountedFor("t", "base", "", "b", batch=False, days=1), calls=1, prompt_tokens=3, has_output=True
        )
        rid, body = f"r{text}", m.Body(prompt=b"\1\0\0\0" * 1000, sampling=m.Sampling(), max_new_tokens=8)
        await bus.submit(
            "interactive", [(make_submit(rid), body)], max_queued=9, usages=[usage], text=text,
            history=kept_for(60, 100), quota=Quota("t", max_bytes=1 << 20),
        )  # fmt: skip
        before = await kept_bytes(bus, "t")
        assert await bus.finish(rid, "failed", "error")
        kept.append(await kept_bytes(bus, "t") - (kept[0] if kept else 0))
        assert kept[-1] < before
        assert bool(await bus._redis.exists(bus.keys.body(rid))) == bool(text)
    assert kept[1] - kept[0] >= 4000
    assert 0 < await bus._redis.ttl(bus.keys.body("r2")) <= 120


async def test_what_is_deleted_is_noted_at_once_whatever_the_memory(queue: Queue) -> None:
    await submit(queue, "a", stored=True)
    await submit(queue, "plain", text=0, stored=True)
    await queue.bus.finish("a", "failed", "error")
    await queue.bus.finish("plain", "failed", "error")
    async with full_memory(queue.bus):
        await queue.bus.jobs.forget(make_job("j", "a", "plain"))
    archive = queue.bus.archive
    assert await archive.deletions(9) == [("t", "a")]
    assert await archive.is_deleted("t", "a")
    assert not await archive.is_deleted("other", "a")
    assert await archive.texts([("t", "a")]) == [TextFound()], "deleted, and not lost"
    assert 0 < await queue.bus._redis.pttl(queue.keys.history_deleted) <= KEEP_MS
    await archive.deleted([("t", "a")])
    assert await archive.deletions(9) == []


async def test_what_is_deleted_after_its_record_is_gone_is_noted_too(queue: Queue) -> None:
    await submit(queue, "a", stored=True)
    await submit(queue, "plain", text=0, stored=True)
    for rid in ("a", "plain"):
        await queue.bus.finish(rid, "failed", "error")
    await queue.bus._redis.delete(queue.keys.req("a"))  # as after a day
    await queue.bus.jobs.forget(make_job("j", "a", "plain"))
    assert await queue.bus.archive.deletions(9) == [], "the history has no texts"
    await queue.bus.jobs.forget(make_job("j", "a"), KEEP_MS)
    await queue.bus.jobs.forget(make_job("k", "plain"), KEEP_MS)
    assert [rid for _, rid in await queue.bus.archive.deletions(9)] == ["a", "plain"]


async def test_a_deletion_is_refused_before_too_many_wait(queue: Queue) -> None:
    await submit(queue, "a", stored=True)
    await queue.bus.finish("a", "failed", "error")
    many = {f"t:{number}": 1.0 for number in range(100_000)}
    await queue.bus._redis.zadd(queue.keys.history_deleted, many)
    await queue.bus._redis.expire(queue.keys.history_deleted, 60)
    with pytest.raises(Unavailable, match="too many deletions"):
        await queue.bus.jobs.forget(make_job("j", "a"))
    assert await queue.bus.record("a") is not None, "nothing was deleted"
    await queue.bus.jobs.forget(make_job("j", "nobody"))


async def test_one_gateway_copies_at_a_time(queue: Queue) -> None:
    archive = queue.bus.archive
    assert await archive.lead("one")
    assert not await archive.lead("two")
    assert await archive.lead("one")
    assert 0 < await queue.bus._redis.pttl(queue.keys.history_writer) <= LEASE_MS
    await archive.leave("two")
    assert not await archive.lead("two")
    await archive.leave("one")
    assert await archive.lead("two")


@pytest_asyncio.fixture
async def sealed(bus: Bus) -> AsyncIterator[Queue]:
    client = Bus(bus.url, seal=Seal(FleetSecret("a secret of the fleet").bodies_key))
    for stream in (bus.keys.out(GATEWAY), bus.keys.work("w"), bus.keys.ctl("w")):
        await bus.streams.create(stream, 300)
    yield Queue(client)
    await client.close()


async def test_with_a_seal_a_copy_has_no_readable_text(bus: Bus, sealed: Queue) -> None:
    await submit(sealed, "a")
    await sealed.assign("a")
    await sealed.write(row("a", 0, 5, 6, finish="stop"))
    [found] = await sealed.bus.archive.texts([("t", "a")])
    text = m.KeptText(PROMPT[-8:], ids(5, 6), "", "")
    assert found.text == text
    raw = sealed.bus.archive.sealed("t", "a", text)
    assert raw.startswith(MARK)
    assert ids(5, 6) not in raw
    assert sealed.bus.archive.opened("t", "a", raw) == text
    for other in (("t", "b"), ("u", "a")):
        with pytest.raises(ProtocolError, match="another secret, or modified"):
            sealed.bus.archive.opened(*other, raw)
    assert (await bus.archive.texts([("t", "a")]))[0] == TextFound(is_lost=True), "without the secret"

"""The requests of a call share its bodies, which are stored once, until the last of them has ended."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from helpers.script_queue import DEADLINE_MS, Queue, ids, make_body, make_job, make_submit, row

from protocol.queue.books.quota import Quota, Standing
from protocol.queue.bus import StepResult, now_ms
from protocol.queue.calls import packed_bodies
from protocol.queue.kept.jobs import NewJob
from protocol.wire import messages as m
from protocol.wire.errors import ProtocolError

ACME = Quota("acme", max_bytes=1 << 20)


async def submit_call(queue: Queue, bodies: list[m.Body], quota: Quota | None = None) -> list[m.RequestHead]:
    """Submit a call of requests a0, a1, … with these bodies; return its requests as the scheduler reads them."""
    pairs = [(make_submit(f"a{i}", choice=i), body) for i, body in enumerate(bodies)]
    assert (await queue.bus.submit("interactive", pairs, max_queued=1000, quota=quota))[0] == "ok"
    return await queue.submitted()


async def call_bytes(queue: Queue) -> int:
    return await queue.bus._redis.memory_usage(queue.keys.body("a0"), samples=0) or 0


async def kept(queue: Queue, tenant: str = "acme") -> int:
    """Return the bytes counted for a tenant; assert that they are the sum of its entries."""
    found = dict(await queue.bus._redis.zrange(queue.keys.kept(tenant), 0, -1, withscores=True))
    total = -int(found.pop(b"sum", 0))
    assert total == sum(int(entry.rpartition(b":")[2]) for entry in found)
    return total


async def test_the_choices_of_a_prompt_share_a_body(queue: Queue) -> None:
    body = msgspec.structs.replace(make_body(), stop_token_ids=list(range(1000, 51_000)))
    await submit_call(queue, [body])
    one = await call_bytes(queue)
    assert one > 150_000
    await queue.bus._redis.flushall()
    subs = await submit_call(queue, [body] * 64)
    assert await call_bytes(queue) < 1.01 * one
    assert [read.body() for read in await queue.bus.inputs(subs)] == [body] * 64
    assert [sub.choice for sub in subs] == list(range(64))
    seeds = {read.sampling.of_choice(sub.choice).seed for sub in subs for read in [body]}
    assert len(seeds) == 64


async def test_prompts_share_what_they_have_in_common(queue: Queue) -> None:
    stops = ["x" * 1000] * 20
    bodies = [
        msgspec.structs.replace(make_body(), prompt=ids(i), stop=stops, lora_scale=1.0 + i % 2) for i in range(50)
    ]
    subs = await submit_call(queue, [body for body in bodies for _ in range(2)])
    assert await call_bytes(queue) < 50_000
    assert [read.body() for read in await queue.bus.inputs(subs)] == [body for body in bodies for _ in range(2)]
    assert [read.body() for read in await queue.bus.inputs(subs[7:8])] == [bodies[3]]


def test_a_call_of_one_prompt_is_kept_as_it_is() -> None:
    body = make_body()
    assert packed_bodies([body, body]) == ([0, 0], {"0": m.encode(body)})


async def test_a_body_that_cannot_be_read_is_said(queue: Queue) -> None:
    subs = await submit_call(queue, [make_body(), msgspec.structs.replace(make_body(), salt="s")])
    await queue.bus._redis.hset(queue.keys.body("a0"), "1", m.encode({"salt": 3}))
    readable, unreadable = await queue.bus.inputs(subs)
    assert readable.body() == make_body()
    with pytest.raises(ProtocolError, match="salt"):
        unreadable.body()
    await queue.bus._redis.delete(queue.keys.body("a0"))
    assert [read.body() for read in await queue.bus.inputs(subs)] == [None, None]


async def test_bodies_go_with_the_last_end_of_their_call(queue: Queue) -> None:
    await submit_call(queue, [make_body()] * 4)
    for key in (queue.keys.call("a0"), queue.keys.body("a0")):
        assert 3600 < await queue.ttl_s(key) <= 3600 + DEADLINE_MS / 1000
    await queue.assign("a0", "a1", "a2")
    steps = [row("a0", 0, 1, finish="stop")]
    for _ in range(2):  # the second time after a lost reply
        await queue.bus.step("w", StepResult(steps))
    await queue.requeue("a1")
    await queue.bus.finish("a1", "failed", "error")
    await queue.bus.cancel("a3")
    await queue.bus.cancel("a3")
    assert await queue.bus._redis.hget(queue.keys.call("a0"), "open") == b"1"
    await queue.write(row("a2", 0, 1, finish="stop"))
    assert not await queue.bus._redis.exists(queue.keys.call("a0"), queue.keys.body("a0"))


async def test_a_call_is_known_while_any_of_its_requests_runs(queue: Queue) -> None:
    """Submitted again by a gateway after a restart of the queue, long after its first request ended and expired."""
    subs = await submit_call(queue, [make_body()] * 2)
    await queue.assign("a0", "a1")
    await queue.write(row("a0", 0, 1, finish="stop"), row("a1", 0, 2))
    await queue.bus._redis.delete(queue.keys.req("a0"), queue.keys.tok("a0"))
    await submit_call(queue, [make_body()] * 2)
    assert (await queue.fields("a1"))["state"] == "assigned"
    assert subs
    assert await queue.queued() == []


async def test_a_dead_letter_keeps_its_body_until_its_retry_has_ended(queue: Queue) -> None:
    await submit_call(queue, [make_body()] * 2, quota=ACME)
    letter = m.DeadLetter(reason="poison", submit=(await queue.submitted())[1])
    assert await queue.bus.finish("a1", "failed", "error", dead_letter=letter)
    await queue.bus.cancel("a0")
    for key in (queue.keys.call("a0"), queue.keys.body("a0")):
        assert 604_000 < await queue.ttl_s(key) <= 604_800
    assert 604_000 < await queue.ttl_s(queue.keys.kept("acme")) <= 604_860
    before = await kept(queue)
    ((letter_id, _),) = await queue.bus.dead_letters.newest(1)
    await queue.bus.dead_letters.retry(letter_id, 60)
    ((again, epoch),) = [
        (sub, epoch) for sub, (_, epoch) in zip(await queue.submitted(), await queue.queued(), strict=True)
    ]
    assert [read.body() for read in await queue.bus.inputs([again])] == [make_body()]
    await queue.assign("a1", epoch=epoch)
    await queue.write(row("a1", 0, 1, epoch=epoch + 1, finish="stop"))
    assert 0 < await kept(queue) < before
    assert not await queue.bus._redis.exists(queue.keys.body("a0"))


# ---------------------------------------------------------------- a tenant's bytes


async def test_what_a_tenant_keeps_is_bounded_and_said(queue: Queue) -> None:
    body = msgspec.structs.replace(make_body(), prompt=bytes(4 * 50_000))
    taken = 0
    while True:
        pairs = [(make_submit(f"r{taken}"), body)]
        outcome, standing = await queue.bus.submit("interactive", pairs, max_queued=1000, quota=ACME)
        if outcome != "ok":
            break
        taken += 1
    assert isinstance(standing, Standing)
    assert (taken, outcome, standing.over) == (5, "limit", "bytes")
    assert standing.kept_bytes == await kept(queue)
    assert standing.kept_bytes + standing.added_bytes > ACME.max_bytes
    assert 200_000 < standing.added_bytes < 205_000
    assert not await queue.bus._redis.exists(queue.keys.req("r5"), queue.keys.call("r5"), queue.keys.body("r5"))
    other = await queue.bus.submit("interactive", pairs, max_queued=1000, quota=replace(ACME, tenant="other"))
    assert other[0] == "ok"
    await queue.bus.cancel("r2")
    assert (await queue.bus.submit("interactive", pairs, max_queued=1000, quota=ACME))[0] == "ok"
    assert (await queue.bus.submit("interactive", [(make_submit("f"), body)], max_queued=99, quota=ACME, forced=True))[
        0
    ] == "ok"


async def test_a_tenant_that_keeps_nothing_any_more_is_served(queue: Queue) -> None:
    for rid in ("r1", "r2"):
        pairs = [(make_submit(rid, stored=True), make_body())]
        assert (await queue.bus.submit("interactive", pairs, max_queued=99, quota=ACME))[0] == "ok"
        await queue.bus.cancel(rid)
        await queue.bus.forget_call("", [rid])
        assert await kept(queue) == 0


async def test_an_end_leaves_what_its_logs_hold(queue: Queue) -> None:
    body = msgspec.structs.replace(make_body(), max_new_tokens=1000, sampling=m.Sampling(num_logprobs=2))
    await submit_call(queue, [body] * 3, quota=ACME)
    reserved = await kept(queue)
    assert reserved > 3 * 1000 * 24
    await queue.assign("a0", "a1", "a2")
    await queue.write(row("a0", 0, 1, 2, finish="stop", logprobs=bytes(40)), row("a1", 0, 1))
    assert await kept(queue) == reserved  # until the call has ended
    await queue.bus.cancel("a1")
    await queue.write(row("a1", 1, finish="cancelled"), row("a2", 0, 7, finish="stop"))
    left = await kept(queue)
    assert left == 3 * 2048 + (8 + 40) + 4 + 4
    ((_, to),) = [
        (entry, score)
        for entry, score in await queue.bus._redis.zrange(queue.keys.kept("acme"), 0, -1, withscores=True)
        if entry != b"sum"
    ]
    assert 0 < to - now_ms() <= 120_000


async def test_what_has_expired_counts_no_more(queue: Queue) -> None:
    for i in range(200):
        assert (
            await queue.bus.submit("interactive", [(make_submit(f"r{i}"), make_body())], max_queued=999, quota=ACME)
        )[0] == "ok"
    everything = await kept(queue)
    key = queue.keys.kept("acme")
    entries = [entry for entry in await queue.bus._redis.zrange(key, 0, -1) if entry != b"sum"]
    await queue.bus._redis.zadd(key, dict.fromkeys(entries, now_ms() - 1))
    await submit_call(queue, [make_body()], quota=ACME)
    assert 0 < await kept(queue) < everything
    await submit_call(queue, [make_body()], quota=ACME)  # a known call
    pairs = [(make_submit("last"), make_body())]
    await queue.bus.submit("interactive", pairs, max_queued=999, quota=ACME)
    assert await kept(queue) == pytest.approx(everything / 100, rel=0.01)
    for rid in ("r0", "last", "a0"):
        await queue.bus.cancel(rid)
    assert await kept(queue) == 3 * 2048


def job(key: str = "") -> NewJob:
    return NewJob(make_job("job_a0", "a0", "a1", key=key), b'{"n":2}', 90_000_000)


async def test_a_job_is_written_with_its_requests_or_not_at_all(queue: Queue) -> None:
    new = job()
    pairs = [(make_submit(f"a{i}", stored=True), make_body()) for i in range(2)]
    outcome, _ = await queue.bus.submit("interactive", pairs, max_queued=1, job=new, quota=ACME)
    assert outcome == "full"
    assert await queue.bus.jobs.get("job_a0") is None
    assert await queue.bus.jobs.newest("acme", 0, 9) == []
    await queue.bus.submit("interactive", pairs, max_queued=9, job=new, quota=ACME)
    assert await queue.bus.jobs.get("job_a0") == new.job
    assert await queue.bus.jobs.request("job_a0") == b'{"n":2}'
    assert await queue.bus.jobs.newest("acme", 0, 9) == ["job_a0"]
    for key in (queue.keys.job("job_a0"), queue.keys.jobs("acme")):
        assert 89_000 < await queue.ttl_s(key) <= 90_000


@pytest.mark.parametrize("ended", [False, True])
async def test_forgetting_a_job_leaves_nothing(queue: Queue, ended: bool) -> None:
    new = job(key="mine")
    pairs = [(make_submit(f"a{i}", stored=True, gateway=""), make_body()) for i in range(2)]
    await queue.bus.submit(
        "interactive", pairs, max_queued=9, job=new, quota=ACME, idem_key=queue.keys.idem("acme", "mine"),
        idem_value=new.job.jid.encode(),
    )  # fmt: skip
    await queue.assign("a0", "a1")
    await queue.write(row("a0", 0, 1, finish="stop"), row("a1", 0, 1, finish="stop" if ended else ""))
    assert await kept(queue) > 2048
    if ended:
        assert 86_000 < await queue.ttl_s(queue.keys.call("a0")) <= 90_000
    for rid in new.job.rids:
        await queue.bus.finish(rid, "cancelled", "cancelled")
    assert await queue.bus.jobs.forget(new.job)
    assert not await queue.bus.jobs.forget(new.job)
    assert await kept(queue) == 0
    left = await queue.bus._redis.keys("*a0*") + await queue.bus._redis.keys("*a1*")
    assert left == []
    assert await queue.bus.jobs.newest("acme", 0, 9) == []
    assert not await queue.bus._redis.exists(queue.keys.idem("acme", "mine"))
    if not ended:
        assert [(await queue.write(row("a1", 1, 2)))[0].code] == ["missing"]


async def test_a_request_whose_end_the_queue_has_lost_is_forgotten_whole(queue: Queue) -> None:
    """A failover may lose an end that was already read; nothing of that request may wait for a worker forever."""
    await queue.submit("a")
    await queue.running("b")
    await queue.bus.forget_call("", ["a"])
    await queue.bus.forget_call("", ["b"])
    assert await queue.bus.streams.length(queue.keys.sub("interactive")) == 0
    assert await queue.assign("a") == ("stale", ["a"])
    (refused,) = await queue.write(row("b", 0, 1))
    assert refused.rid == "b"

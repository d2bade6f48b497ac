"""A tenant's limits in the queue's scripts: reserved by submit, released by whatever ends a request, never leaked."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from helpers.script_queue import DEADLINE_MS, Queue, ids, make_body, make_submit, row

from protocol.queue.books.quota import Quota, Standing
from protocol.queue.bus import StepResult, now_ms
from protocol.wire.errors import WorkerLost

NO_LIMIT = Quota("acme")


class Tenant:
    """A tenant's calls: requests with 3 prompt tokens and at most 8 output tokens."""

    def __init__(self, queue: Queue, quota: Quota) -> None:
        self.queue = queue
        self.quota = quota

    async def send(self, *rids: str, forced: bool = False, max_queued: int = 100) -> tuple[str, object]:
        pairs = [(make_submit(rid), make_body()) for rid in rids]
        return await self.queue.bus.submit("interactive", pairs, max_queued=max_queued, quota=self.quota, forced=forced)

    async def submit(self, *rids: str, forced: bool = False) -> tuple[str, Standing]:
        """Send a new call for which the queue has space, so that only the tenant's limits decide."""
        outcome, standing = await self.send(*rids, forced=forced)
        assert isinstance(standing, Standing)
        return outcome, standing

    async def running(self) -> set[str]:
        key = self.queue.keys.running(self.quota.tenant)
        return {rid.decode() for rid in await self.queue.bus._redis.zrange(key, 0, -1)}

    async def used_tokens(self) -> float:
        raw = await self.queue.bus._redis.hget(self.queue.keys.quota(self.quota.tenant), "tokens")
        return float(raw or 0)

    async def later(self, ms: int) -> None:
        """Let time pass for the usage so far."""
        key = self.queue.keys.quota(self.quota.tenant)
        await self.queue.bus._redis.hincrby(key, "ms", -ms)


async def test_choices_at_once_are_limited_until_one_ends(queue: Queue) -> None:
    acme = Tenant(queue, replace(NO_LIMIT, concurrency=3))
    assert (await acme.submit("a-0", "a-1"))[0] == "ok"
    outcome, standing = await acme.submit("b-0", "b-1")
    assert (outcome, standing.over, standing.running) == ("limit", "concurrency", 2)
    assert not await queue.bus._redis.exists(queue.keys.req("b-0"), queue.keys.call("b-0"))
    assert (await Tenant(queue, Quota("other", concurrency=3)).submit("o"))[0] == "ok"
    await queue.bus.cancel("a-1")
    assert (await acme.submit("b-0", "b-1"))[0] == "ok"
    assert await acme.running() == {"a-0", "b-0", "b-1"}


async def test_of_many_calls_at_the_same_moment_just_as_many_get_in_as_may(queue: Queue) -> None:
    acme = Tenant(queue, replace(NO_LIMIT, concurrency=5))
    outcomes = await asyncio.gather(*(acme.submit(f"r{i}") for i in range(20)))
    assert sum(outcome == "ok" for outcome, _ in outcomes) == 5
    assert len(await acme.running()) == 5


async def test_calls_a_minute_are_limited_and_come_back_evenly(queue: Queue) -> None:
    acme = Tenant(queue, replace(NO_LIMIT, requests_per_minute=2))
    _, standing = await acme.submit("a-0", "a-1", "a-2")  # a call counts once, regardless of its number of choices
    assert standing.requests is not None
    assert (standing.requests.limit, standing.requests.remaining, standing.tokens) == (2, 1, None)
    assert 29_000 < standing.requests.reset_ms <= 30_000
    assert (await acme.submit("b"))[0] == "ok"
    outcome, standing = await acme.submit("c")
    assert (outcome, standing.over) == ("limit", "requests")
    assert 0 < standing.retry_ms <= 30_000
    await acme.later(standing.retry_ms)
    assert (await acme.submit("c"))[0] == "ok"
    assert 60 < await queue.ttl_s(queue.keys.quota("acme")) <= 121


async def test_tokens_are_reserved_and_what_was_not_made_is_given_back(queue: Queue) -> None:
    acme = Tenant(queue, replace(NO_LIMIT, tokens_per_minute=30))
    assert (await acme.submit("a"))[0] == "ok"
    _, standing = await acme.submit("b")
    assert standing.tokens is not None
    assert (standing.tokens.limit, standing.tokens.remaining) == (30, 8)
    assert (await acme.submit("c"))[1].over == "tokens"
    used = await acme.used_tokens()
    await queue.assign("a")
    assert await queue.bus.step("w", StepResult([row("a", 0, 5, 6, finish="stop")])) == []
    assert await acme.used_tokens() == pytest.approx(used - 6)  # two of the eight tokens were generated
    assert (await acme.submit("c"))[0] == "ok"


async def test_virtual_tokens_are_reserved_like_a_prompt(queue: Queue) -> None:
    """And released like one, to a request that never left the queue. The request's own facts are its prompt's alone."""
    acme = Tenant(queue, replace(NO_LIMIT, tokens_per_minute=1000))

    async def send(rid: str) -> Standing:
        pair = make_submit(rid, num_virtual=500), make_body()
        _, standing = await queue.bus.submit("interactive", [pair], max_queued=9, quota=acme.quota)
        assert isinstance(standing, Standing)
        return standing

    tokens = (await send("a")).tokens
    assert tokens is not None
    assert tokens.remaining == 1000 - 511
    assert (await send("b")).over == "tokens"
    used = await acme.used_tokens()
    await queue.bus.cancel("a")
    assert await acme.used_tokens() == pytest.approx(used - 511)
    await send("b")
    used = await acme.used_tokens()
    await queue.assign("b")
    assert await queue.bus.step("w", StepResult([row("b", 0, 5, 6, finish="stop")])) == []
    assert await acme.used_tokens() == pytest.approx(used - 6)
    assert (await queue.fields("b"))["n_prompt"] == "3"


@pytest.mark.parametrize("end", ["cancelled in the queue", "cancelled", "failed", "worker lost"])
async def test_whatever_ends_a_request_settles_it_once(queue: Queue, end: str) -> None:
    acme = Tenant(queue, replace(NO_LIMIT, tokens_per_minute=1000, concurrency=9))
    await acme.submit("a")
    used, made = await acme.used_tokens(), 0
    if end != "cancelled in the queue":
        await queue.assign("a")
        await queue.bus.step("w", StepResult([row("a", 0, 5, 6, 7)]))
        made = 3
    if end == "worker lost":
        assert await queue.requeue("a") == {"a": "requeued"}
        assert await acme.running() == {"a"}  # it continues elsewhere: nothing has ended
        assert await acme.used_tokens() == used
    for _ in range(2):
        if end == "failed":
            await queue.bus.step("w", StepResult([row("a", 3, finish="error")]))
        elif end == "worker lost":
            await queue.bus.finish("a", "failed", "error", WorkerLost("gone"))
        else:
            await queue.bus.cancel("a")
            if made:
                await queue.bus.step("w", StepResult([row("a", 3, finish="cancelled")]))
        assert await acme.running() == set()
        # Nothing was computed for a request that never left the queue.
        assert await acme.used_tokens() == pytest.approx(used - (8 - made if made else 11))
    assert "quota" not in await queue.fields("a")


async def test_a_submit_whose_reply_was_lost_counts_once(queue: Queue) -> None:
    acme = Tenant(queue, replace(NO_LIMIT, requests_per_minute=10, concurrency=9))
    await acme.submit("a")
    assert await acme.send("a") == ("ok", None)
    await acme.submit("b")
    _, standing = await acme.submit("c")
    assert standing.requests is not None
    assert standing.requests.remaining == 7


async def test_a_full_queue_takes_nothing_from_a_tenant(queue: Queue) -> None:
    acme = Tenant(queue, replace(NO_LIMIT, requests_per_minute=10, concurrency=9))
    assert (await acme.send("a", max_queued=0))[0] == "full"
    assert await queue.bus._redis.keys("lf:*:q:*") == []


async def test_what_was_accepted_before_is_counted_but_never_refused(queue: Queue) -> None:
    acme = Tenant(queue, replace(NO_LIMIT, requests_per_minute=1, tokens_per_minute=11, concurrency=1))
    await acme.submit("a")
    assert (await acme.submit("b", forced=True))[0] == "ok"
    assert await acme.running() == {"a", "b"}
    _, standing = await acme.submit("c")
    assert standing.over == "concurrency"


async def test_what_nobody_ever_ended_stops_counting_after_its_deadline(queue: Queue) -> None:
    acme = Tenant(queue, replace(NO_LIMIT, concurrency=1))
    await acme.submit("a")
    key = queue.keys.running("acme")
    assert await queue.bus._redis.zscore(key, "a") > now_ms() + DEADLINE_MS - 60_000
    assert 50 < await queue.ttl_s(key) - DEADLINE_MS / 1000 <= 61
    await queue.bus._redis.zadd(key, {"a": now_ms() - 1})
    assert (await acme.submit("b"))[0] == "ok"
    assert await acme.running() == {"b"}


async def test_an_end_after_a_bucket_has_run_out_leaves_nothing_behind(queue: Queue) -> None:
    acme = Tenant(queue, replace(NO_LIMIT, tokens_per_minute=100))
    await acme.submit("a")
    await queue.bus._redis.delete(queue.keys.quota("acme"))
    await queue.bus.cancel("a")
    assert not await queue.bus._redis.exists(queue.keys.quota("acme"), queue.keys.running("acme"))


async def test_limits_may_be_set_and_taken_away_while_requests_run(queue: Queue) -> None:
    free, limited = Tenant(queue, NO_LIMIT), Tenant(queue, replace(NO_LIMIT, tokens_per_minute=12))
    for i in range(5):
        await free.submit(f"r{i}")
    assert (await limited.submit("a"))[0] == "ok"  # usage while there was no limit does not count
    assert (await limited.submit("b"))[1].over == "tokens"
    assert (await free.submit("b"))[0] == "ok"
    assert await queue.log("a") == ids()

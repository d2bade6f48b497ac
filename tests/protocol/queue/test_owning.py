"""What a worker may write, and that a step which may not be written leaves nothing."""

from __future__ import annotations

import pytest
from script_queue import GATEWAY, Queue, ids, row

from protocol.queue.bus import Refused, Step
from protocol.wire import messages as m


async def test_a_step_that_meets_another_log_takes_back_what_it_appended(queue: Queue) -> None:
    await queue.running("old", "new", "other", "empty")
    await queue.bus.step("w", Step(rows=[row("old", 0, 1, 2)]))
    ttl_s = await queue.ttl_s(queue.keys.tok("old"))
    rows = [row("old", 2, 3), row("new", 0, 4, logprobs=b"1234"), row("other", 1, 5), row("empty", 0, 6)]
    step = Step(rows=rows, outs={GATEWAY: [m.Delta("old", 1, 2, ids(3))]})
    assert await queue.bus.step("w", step) == [Refused("other", "length", 1, 0)]
    assert await queue.log("old") == ids(1, 2)
    assert ttl_s - 60 < await queue.ttl_s(queue.keys.tok("old")) <= ttl_s
    logs = [kind(rid) for kind in (queue.keys.tok, queue.keys.lp) for rid in ("new", "other", "empty")]
    assert await queue.bus.redis.exists(*logs) == 0
    assert await queue.deltas() == []
    assert await queue.bus.step("w", Step(rows=[row("old", 2, 3), row("new", 0, 4)])) == []


async def _owned(queue: Queue, wid: str = "w") -> dict[bytes, bytes]:
    owned = await queue.bus.redis.hgetall(queue.keys.own(wid))
    assert owned.pop(b"")  # its version
    return owned


@pytest.mark.parametrize(("outside", "code"), [("finish", "terminal"), ("cancel", "cancelled"), ("requeue", "stale")])
async def test_what_a_worker_owns_follows_every_change_from_outside(queue: Queue, outside: str, code: str) -> None:
    await queue.running("a", "b")
    assert await _owned(queue) == {b"a": b"1", b"b": b"1"}
    assert await queue.bus.step("w", Step(rows=[row("a", 0, 1), row("b", 0, 1)])) == []  # they are known from now on
    change = {
        "finish": lambda: queue.bus.finish("a", "failed", "error"),
        "cancel": lambda: queue.bus.cancel("a"),
        "requeue": lambda: queue.requeue("a"),
    }[outside]
    await change()
    assert await _owned(queue) == {b"b": b"1"}
    assert [r.code for r in await queue.bus.step("w", Step(rows=[row("b", 1, 1), row("a", 1, 1)]))] == [code]
    assert await queue.bus.step("w", Step(rows=[row("b", 1, 1, finish="stop")])) == []
    assert await _owned(queue) == {}


async def test_a_worker_whose_list_of_what_it_owns_is_gone_writes_as_before(queue: Queue) -> None:
    await queue.running("a")
    assert 0 < await queue.ttl_s(queue.keys.own("w")) <= 3600
    await queue.bus.redis.delete(queue.keys.own("w"))
    assert await queue.bus.step("w", Step(rows=[row("a", 0, 1)])) == []
    assert [r.code for r in await queue.bus.step("w", Step(rows=[row("a", 1, 1, epoch=2)]))] == ["stale"]


async def test_a_request_that_expired_before_its_first_token_leaves_no_log(queue: Queue) -> None:
    await queue.running("a")
    await queue.bus.redis.delete(queue.keys.req("a"))
    assert await queue.bus.step("w", Step(rows=[row("a", 0, 1)])) == [Refused("a", "missing", 0, 0)]
    assert await queue.log("a") == b""


async def test_a_known_row_is_looked_at_again_once_something_was_taken_away_or_the_server_is_another(
    queue: Queue,
) -> None:
    await queue.running("a", "b")

    async def try_token(position: int) -> list[str]:
        return [refused.code for refused in await queue.bus.step("w", Step(rows=[row("a", position, 1)]))]

    assert await try_token(0) == []
    for key, field in ((queue.keys.own("w"), "a"), (queue.keys.req("a"), "epoch")):
        await queue.bus.redis.hset(key, field, 9)  # no script does that; it shows who looks
    assert await try_token(1) == []
    await queue.bus.redis.script_flush()
    assert await try_token(2) == ["stale"]

    for key, field in ((queue.keys.own("w"), "a"), (queue.keys.req("a"), "epoch")):
        await queue.bus.redis.hset(key, field, 1)
    assert await try_token(2) == []
    for key, field in ((queue.keys.own("w"), "a"), (queue.keys.req("a"), "epoch")):
        await queue.bus.redis.hset(key, field, 9)
    assert await try_token(3) == []
    await queue.bus.cancel("b")
    assert await try_token(4) == ["stale"]


async def test_an_end_without_tokens_is_written_once(queue: Queue) -> None:
    await queue.running("a")
    assert await queue.bus.step("w", Step(rows=[row("a", 0, 1)])) == []
    end = Step(rows=[row("a", 1, finish="stop")])
    assert await queue.bus.step("w", end) == []
    assert [refused.code for refused in await queue.bus.step("w", end)] == ["terminal"]

"""Which requests a worker may write; a refused step leaves no trace."""

from __future__ import annotations

import pytest
from helpers.script_queue import GATEWAY, Queue, ids, row
from redis.exceptions import ResponseError

from protocol.queue.bus import Refused, StepResult
from protocol.wire import messages as m


async def test_a_step_that_meets_another_log_takes_back_what_it_appended(queue: Queue) -> None:
    await queue.running("old", "new", "other", "empty")
    await queue.bus.step("w", StepResult(rows=[row("old", 0, 1, 2)]))
    ttl_s = await queue.ttl_s(queue.keys.tok("old"))
    rows = [row("old", 2, 3), row("new", 0, 4, logprobs=b"1234"), row("other", 1, 5), row("empty", 0, 6)]
    step = StepResult(rows=rows, outs={GATEWAY: [m.Delta("old", 1, 2, ids(3))]})
    assert await queue.bus.step("w", step) == [Refused("other", "length", 1, 0)]
    assert await queue.log("old") == ids(1, 2)
    assert ttl_s - 60 < await queue.ttl_s(queue.keys.tok("old")) <= ttl_s
    logs = [kind(rid) for kind in (queue.keys.tok, queue.keys.lp) for rid in ("new", "other", "empty")]
    assert await queue.bus._redis.exists(*logs) == 0
    assert await queue.deltas() == []
    assert await queue.bus.step("w", StepResult(rows=[row("old", 2, 3), row("new", 0, 4)])) == []


async def _owned(queue: Queue, wid: str = "w") -> dict[bytes, bytes]:
    return await queue.bus._redis.hgetall(queue.keys.own(wid))


@pytest.mark.parametrize(("outside", "code"), [("finish", "terminal"), ("cancel", "cancelled"), ("requeue", "stale")])
async def test_what_a_worker_owns_follows_every_change_from_outside(queue: Queue, outside: str, code: str) -> None:
    await queue.running("a", "b")
    assert await _owned(queue) == {b"a": b"1", b"b": b"1"}
    assert (
        await queue.bus.step("w", StepResult(rows=[row("a", 0, 1), row("b", 0, 1)])) == []
    )  # makes the requests known to the script
    change = {
        "finish": lambda: queue.bus.finish("a", "failed", "error"),
        "cancel": lambda: queue.bus.cancel("a"),
        "requeue": lambda: queue.requeue("a"),
    }[outside]
    await change()
    assert await _owned(queue) == {b"b": b"1"}
    assert [r.code for r in await queue.bus.step("w", StepResult(rows=[row("b", 1, 1), row("a", 1, 1)]))] == [code]
    assert await queue.bus.step("w", StepResult(rows=[row("b", 1, 1, finish="stop")])) == []
    assert await _owned(queue) == {}


async def test_a_worker_whose_list_of_what_it_owns_is_gone_writes_as_before(queue: Queue) -> None:
    await queue.running("a")
    assert 0 < await queue.ttl_s(queue.keys.own("w")) <= 3600
    await queue.bus._redis.delete(queue.keys.own("w"))
    assert await queue.bus.step("w", StepResult(rows=[row("a", 0, 1)])) == []
    assert [r.code for r in await queue.bus.step("w", StepResult(rows=[row("a", 1, 1, epoch=2)]))] == ["stale"]


async def test_a_request_that_expired_before_its_first_token_leaves_no_log(queue: Queue) -> None:
    await queue.running("a")
    await queue.bus._redis.delete(queue.keys.req("a"))
    assert await queue.bus.step("w", StepResult(rows=[row("a", 0, 1)])) == [Refused("a", "missing", 0, 0)]
    assert await queue.log("a") == b""


async def test_a_log_that_has_expired_does_not_come_back(queue: Queue) -> None:
    await queue.running("a")
    for position in range(3):
        assert await queue.write(row("a", position, position)) == []
    await queue.bus._redis.delete(queue.keys.tok("a"))
    assert await queue.write(row("a", 3, 3)) == [Refused("a", "length", 1, 0)]
    assert not await queue.bus._redis.exists(queue.keys.tok("a"))


async def test_a_step_whose_reply_was_lost_is_found_by_its_repetition(queue: Queue) -> None:
    await queue.running("a")
    assert await queue.write(row("a", 0, 0)) == []
    assert await queue.write(row("a", 0, 0)) == [Refused("a", "length", 1, 1)]
    assert await queue.write(row("a", 1, 1)) == []
    assert await queue.log("a") == ids(0, 1)


@pytest.mark.parametrize("ending", ["finish", "requeue"])
async def test_who_takes_a_request_away_leaves_its_log_whole(queue: Queue, ending: str) -> None:
    await queue.running("a", "b")
    for position in range(2):
        assert await queue.write(row("a", position, position), row("b", position, position)) == []
    await (queue.bus.finish("a", "failed", "error") if ending == "finish" else queue.requeue("a"))
    assert [refused.code for refused in await queue.write(row("a", 2, 3), row("b", 2, 3))] != []
    assert await queue.write(row("b", 2, 3)) == []
    assert (await queue.log("a"), await queue.log("b")) == (ids(0, 1), ids(0, 1, 3))


async def test_a_log_that_a_gateway_has_mended_refuses_what_its_owner_believes(queue: Queue) -> None:
    await queue.running("a")
    for position in range(3):
        assert await queue.write(row("a", position, position)) == []
    assert await queue.bus.repair("a", 0, ids(0, 1), b"", 0) == 3
    assert await queue.write(row("a", 3, 3)) == []
    assert await queue.bus.repair("a", 0, ids(0, 1, 2, 3, 7), b"", 0) == 5
    assert await queue.write(row("a", 4, 4)) == [Refused("a", "length", 1, 5)]


async def test_a_row_that_does_not_begin_at_its_logs_end_is_refused(queue: Queue) -> None:
    await queue.running("a")
    for position in (0, 1):
        assert await queue.write(row("a", position, position)) == []
    for position in (1, 3):
        assert await queue.write(row("a", position, 9)) == [Refused("a", "length", 1, 2)]
    assert await queue.write(row("a", 2, 2)) == []
    assert await queue.log("a") == ids(0, 1, 2)


async def test_rows_that_contradict_each_other_are_an_error_and_leave_nothing(queue: Queue) -> None:
    await queue.running("a")
    with pytest.raises(ResponseError, match="contradict"):
        await queue.write(row("a", 0, 1), row("a", 0, 1))
    assert await queue.log("a") == b""
    assert await queue.write(row("a", 0, 1)) == []


async def test_a_step_looks_at_no_request_that_only_goes_on(queue: Queue) -> None:
    await queue.running("a")
    assert await queue.write(row("a", 0, 1)) == []
    await queue.bus._redis.hset(queue.keys.req("a"), "epoch", 9)  # no script does that; it shows which values are read
    assert await queue.write(row("a", 1, 1)) == []
    await queue.bus._redis.hset(queue.keys.own("w"), "a", 9)
    assert [refused.code for refused in await queue.write(row("a", 2, 1))] == ["stale"]


async def test_an_end_without_tokens_is_written_once(queue: Queue) -> None:
    await queue.running("a")
    assert await queue.bus.step("w", StepResult(rows=[row("a", 0, 1)])) == []
    end = StepResult(rows=[row("a", 1, finish="stop")])
    assert await queue.bus.step("w", end) == []
    assert [refused.code for refused in await queue.bus.step("w", end)] == ["terminal"]

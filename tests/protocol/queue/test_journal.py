"""A worker's journal: steps that only go on with requests touch no log, and nobody who reads can tell."""

from __future__ import annotations

import pytest
from script_queue import Queue, ids, row

from protocol.queue.bus import Step, StepRow
from protocol.queue.verified import FLUSH_EVERY


async def _write(queue: Queue, *rows: StepRow) -> None:
    assert await queue.bus.step("w", Step(rows=list(rows))) == []


async def _raw_log(queue: Queue, rid: str) -> bytes:
    return await queue.bus.redis.get(queue.keys.tok(rid)) or b""


async def _num_journaled(queue: Queue) -> int:
    return await queue.bus.redis.llen(queue.keys.journal("w")) // 2


async def test_going_on_is_journaled_and_an_end_brings_its_own_log_up_to_date(queue: Queue) -> None:
    await queue.running("a", "b")
    await _write(queue, row("a", 0, 1), row("b", 0, 9))
    for position in (1, 2, 3):
        await _write(queue, row("a", position, position + 1), row("b", position, 9 - position))
    assert (await _raw_log(queue, "a"), await _raw_log(queue, "b")) == (ids(1), ids(9))
    assert await _num_journaled(queue) == 3
    assert 0 < await queue.ttl_s(queue.keys.journal("w")) <= 3600
    await _write(queue, row("a", 4, 5, finish="stop"), row("b", 4, 5))
    assert (await _raw_log(queue, "a"), await _raw_log(queue, "b")) == (ids(1, 2, 3, 4, 5), ids(9))
    delta = await queue.bus.read_log("b", 2)
    assert delta is not None
    assert delta.ids == ids(7, 6, 5)
    assert await _num_journaled(queue) == 0
    assert await _raw_log(queue, "a") == ids(1, 2, 3, 4, 5)


async def test_a_journal_is_emptied_in_time(queue: Queue) -> None:
    await queue.running("a")
    await _write(queue, row("a", 0, 0))
    for position in range(1, 3 * FLUSH_EVERY):
        await _write(queue, row("a", position, position))
        assert await _num_journaled(queue) <= FLUSH_EVERY
    assert len(await _raw_log(queue, "a")) // 4 == 2 * FLUSH_EVERY + 1
    assert await queue.log("a") == ids(*range(3 * FLUSH_EVERY))
    (facts,) = await queue.bus.requests(["a"])
    assert facts is not None
    assert facts.num_output_tokens == 3 * FLUSH_EVERY


async def test_rows_that_write_their_log_leave_gaps_in_the_journal(queue: Queue) -> None:
    await queue.running("a")
    for position in range(6):
        await _write(queue, row("a", position, position, logprobs=b"1234" if position in (0, 2, 3) else b""))
    assert await _raw_log(queue, "a") == ids(0, 1, 2, 3)
    delta = await queue.bus.read_log("a", 0)
    assert delta is not None
    assert delta.ids == ids(0, 1, 2, 3, 4, 5)


async def test_a_log_that_has_expired_does_not_come_back(queue: Queue) -> None:
    await queue.running("a")
    for position in range(3):
        await _write(queue, row("a", position, position))
    await queue.bus.redis.delete(queue.keys.tok("a"))
    await queue.bus.requests(["a"])
    assert not await queue.bus.redis.exists(queue.keys.tok("a"), queue.keys.journal("w"))


async def test_a_step_whose_reply_was_lost_is_found_by_its_repetition(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    await queue.running("a")
    await _write(queue, row("a", 0, 0))
    send = queue.bus.redis.evalsha

    async def lose_reply(*args: object) -> object:
        await send(*args)
        raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(queue.bus.redis, "evalsha", lose_reply)
        with pytest.raises(ConnectionError):
            await queue.bus.step("w", Step(rows=[row("a", 1, 1)]))
    (refused,) = await queue.bus.step("w", Step(rows=[row("a", 1, 1)]))
    assert (refused.code, refused.length) == ("length", 2)
    await _write(queue, row("a", 2, 2))
    assert await queue.log("a") == ids(0, 1, 2)


@pytest.mark.parametrize("ending", ["finish", "requeue"])
async def test_who_takes_a_request_away_leaves_its_log_whole(queue: Queue, ending: str) -> None:
    await queue.running("a", "b")
    await _write(queue, row("a", 0, 1), row("b", 0, 1))
    await _write(queue, row("a", 1, 2), row("b", 1, 2))
    await (queue.bus.finish("a", "failed", "error") if ending == "finish" else queue.requeue("a"))
    assert await _raw_log(queue, "a") == ids(1, 2)
    assert [refused.code for refused in await queue.bus.step("w", Step(rows=[row("a", 2, 3)]))] != []
    await _write(queue, row("b", 2, 3))
    assert await queue.log("b") == ids(1, 2, 3)


async def test_a_log_that_a_gateway_mends_is_looked_at_again(queue: Queue) -> None:
    await queue.running("a")
    for position in range(3):
        await _write(queue, row("a", position, position))
    assert await queue.bus.repair("a", 0, ids(0, 1), b"", 0) == 3
    await _write(queue, row("a", 3, 3))
    assert await queue.bus.repair("a", 0, ids(0, 1, 2, 3, 7), b"", 0) == 5
    (refused,) = await queue.bus.step("w", Step(rows=[row("a", 4, 4)]))
    assert (refused.code, refused.length) == ("length", 5)


async def test_a_row_that_does_not_go_on_from_the_journal_is_refused(queue: Queue) -> None:
    await queue.running("a")
    await _write(queue, row("a", 0, 0))
    await _write(queue, row("a", 1, 1))
    for position in (1, 3):
        (refused,) = await queue.bus.step("w", Step(rows=[row("a", position, 9)]))
        assert (refused.code, refused.length) == ("length", 2)
    await _write(queue, row("a", 2, 2))
    assert await queue.log("a") == ids(0, 1, 2)

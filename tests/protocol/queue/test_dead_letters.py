"""Dead letters: listed, shown, and their requests retried once."""

from __future__ import annotations

from functools import partial

import pytest
from helpers.script_queue import GATEWAY, make_body, make_submit

from protocol.queue.bus import Bus, StepResult, StepRow, decode, now_ms
from protocol.queue.dead_letters import MAX_LETTERS, MAX_RAW_BYTES
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, Conflict, NotFound, WorkerLost

TOKENS = b"\1\0\0\0\2\0\0\0"


async def give_up(bus: Bus, rid: str) -> str:
    """Submit a request, let its worker die, give it up; return the id of its dead letter."""
    await bus.streams.create(bus.keys.work("w"), 3600)
    sub = make_submit(rid)
    await bus.submit("interactive", [(sub, make_body())], max_queued=10)
    await bus.assign("w", [(m.Assigned(rid, 1, ""), 0)])
    await bus.step("w", StepResult(rows=[StepRow(rid, 1, 0, TOKENS)]))
    assert await bus.requeue("w", [rid], counts=True, max_attempts=0, name="worker-0") == {rid: "exhausted"}
    (owned,) = await bus.owned([rid])
    assert owned is not None
    letter = m.DeadLetter(
        reason="poison", submit=sub, attempts=1, num_output_tokens=2, deaths=owned.deaths, ms=now_ms()
    )
    assert await bus.finish(rid, "failed", "error", WorkerLost("poison"), dead_letter=letter)
    return (await bus.streams.last_id(bus.keys.dlq)).decode()


async def test_letters_come_newest_first(bus: Bus) -> None:
    letters = bus.dead_letters
    assert await letters.newest(10) == []
    ids = [await give_up(bus, rid) for rid in ("a", "b", "c")]
    found = await letters.newest(2)
    assert [letter_id for letter_id, _ in found] == ids[:0:-1]
    assert [letter.submit.rid for _, letter in found if letter.submit] == ["c", "b"]
    (death,) = (await letters.get(ids[0])).deaths
    assert (death.wid, death.name, death.num_at_start, death.num_output_tokens) == ("w", "worker-0", 0, 2)


async def test_a_retried_request_is_queued_with_its_tokens(bus: Bus) -> None:
    letters = bus.dead_letters
    letter_id = await give_up(bus, "a")
    for key in (bus.keys.req("a"), bus.keys.call("a"), bus.keys.body("a"), bus.keys.tok("a")):
        assert 604_000 < await bus._redis.ttl(key) <= 604_800  # as long as the letter
    assert await letters.retry(letter_id, 60) == "a"
    assert await letters.newest(10) == []
    ((_, fields),) = await bus.streams.entries(bus.keys.sub("interactive"))
    sub, epoch = decode(fields[b"b"], m.RequestHead), int(fields[b"e"])
    assert (sub.rid, sub.gateway, sub.stored) == ("a", "", True)
    assert abs(sub.deadline_ms - now_ms() - 60_000) < 30_000
    status, _ = await bus.assign("w", [(m.Assigned("a", epoch + 1, ""), epoch)])
    assert status == "ok"
    (owned,) = await bus.owned(["a"])
    assert owned is not None
    assert (owned.attempts, owned.deaths, owned.num_output_tokens) == (0, [], 2)
    row = StepRow("a", epoch + 1, 2, TOKENS, state="completed", finish="length")
    assert await bus.step("w", StepResult(rows=[row])) == []
    assert 80_000 < await bus._redis.ttl(bus.keys.tok("a")) <= 86_400
    assert await bus._redis.xlen(bus.keys.out(GATEWAY)) == 0  # no gateway waits for it any more


async def test_a_letter_is_retried_once(bus: Bus) -> None:
    letters = bus.dead_letters
    letter_id = await give_up(bus, "a")
    await letters.retry(letter_id, 60)
    with pytest.raises(NotFound, match="was retried"):
        await letters.retry(letter_id, 60)
    assert await bus._redis.xlen(bus.keys.sub("interactive")) == 1


async def test_what_cannot_be_retried_is_said(bus: Bus) -> None:
    letters = bus.dead_letters
    letter_id = await give_up(bus, "a")
    await bus._redis.delete(bus.keys.body("a"))
    with pytest.raises(Conflict, match="expired"):
        await letters.retry(letter_id, 60)
    entry = await bus._redis.xadd(bus.keys.sub("interactive"), {"b": b"\xc1"})
    await bus.streams.reject(bus.keys.sub("interactive"), (entry, {b"b": b"\xc1"}), "unreadable")
    (newest, letter), _ = await letters.newest(10)
    assert letter.raw == b"\xc1"
    with pytest.raises(Conflict, match="could not be read"):
        await letters.retry(newest, 60)
    with pytest.raises(BadRequest, match="not a dead letter's id"):
        await letters.get("latest")


async def test_a_letter_that_cannot_be_read_hides_no_other(bus: Bus) -> None:
    letter_id = await give_up(bus, "a")
    await bus._redis.xadd(bus.keys.dlq, {"b": b"\xc1"})
    (_, broken), (good, _) = await bus.dead_letters.newest(10)
    assert "cannot be read" in broken.reason
    assert good == letter_id


async def test_letters_are_bounded_in_number_and_size(bus: Bus) -> None:
    stream = bus.keys.sub("batch")
    reject = partial(bus.streams.reject, stream, reason="it is too long")
    await reject((b"1-0", {b"b": b"x" * (1 << 20)}))
    [(first, letter)] = await bus.dead_letters.newest(2)
    assert len(letter.raw) == MAX_RAW_BYTES
    for number in range(MAX_LETTERS):
        await reject((b"%d-0" % (number + 2), {b"b": b"%d" % number}))
    assert await bus.streams.length(bus.keys.dlq) == MAX_LETTERS
    with pytest.raises(NotFound, match=str(MAX_LETTERS)):
        await bus.dead_letters.get(first)
    assert await bus._redis.memory_usage(bus.keys.dlq, samples=0) < MAX_LETTERS * (MAX_RAW_BYTES + 1024)
    last = await give_up(bus, "a")  # written by another script
    assert await bus.streams.length(bus.keys.dlq) == MAX_LETTERS
    [(found, newest)] = await bus.dead_letters.newest(1)
    assert (found, newest.submit is not None) == (last, True)

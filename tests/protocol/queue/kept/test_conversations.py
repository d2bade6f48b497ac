"""Conversations in the queue: changes are atomic, turns are added once, and every byte is counted."""

from __future__ import annotations

from typing import Any

from helpers.script_queue import Queue, make_body, make_job, make_submit
from msgspec import structs

from protocol.queue.kept.conversations import MAX_TURNS, ConversationLimits, Turn
from protocol.queue.kept.jobs import NewJob
from protocol.wire import messages as m

LIMITS = ConversationLimits(ttl_ms=60_000, max_conversations=2, max_items=3, max_bytes=4000, max_kept=8000)
RECORD_BYTES, ITEM_BYTES = 1024, 256
ID, TENANT = "conv_1", "acme"


async def made(queue: Queue, id_: str = ID, **more: Any) -> Any:
    record = m.Conversation(id_, TENANT, 1)
    return await queue.bus.conversations.change(id_, TENANT, LIMITS, record=record, is_new=True, **more)


async def kept(queue: Queue) -> int:
    return -int(await queue.bus._redis.zscore(queue.keys.kept(TENANT), "sum") or 0)


async def submitted(queue: Queue, rid: str, conversation: str = ID, *, forced: bool = False) -> tuple[str, Any]:
    job = structs.replace(make_job(f"resp_{rid}", rid), conversation=conversation)
    pairs = [(make_submit(rid, tenant=TENANT, stored=True), make_body())]
    new = NewJob(job, b"{}", 60_000)
    return await queue.bus.submit("interactive", pairs, max_queued=99, job=new, forced=forced)


async def test_a_change_is_whole_or_not_at_all(queue: Queue) -> None:
    conversations = queue.bus.conversations
    assert await made(queue, items=[("a", b"1"), ("b", b"2")]) == ("ok", 0, 0)
    assert await conversations.change(ID, TENANT, LIMITS, items=[("c", b"3"), ("d", b"4")]) == ("items", 2, 0)
    there = RECORD_BYTES + len(m.encode(m.Conversation(ID, TENANT, 1))) + 2 * (ITEM_BYTES + 1)
    assert await conversations.change(ID, TENANT, LIMITS, items=[("c", b"x" * 4000)]) == ("bytes", there, 0)
    assert await conversations.items(ID) == [b"1", b"2"]
    assert await kept(queue) == there
    assert await made(queue, "conv_2", items=[("a", b"x" * 2500)]) == ("ok", 0, 0)
    refused = await conversations.change(
        "conv_2", TENANT, LIMITS, record=m.Conversation("conv_2", TENANT, 1, {"a": "x" * 9000})
    )
    assert (refused.code, refused.there) == ("kept", await kept(queue))
    assert (await made(queue, "conv_3")).code == "conversations"
    assert await conversations.change("conv_9", TENANT, LIMITS) == ("gone", 0, 0)
    assert await conversations.change(ID, "other", LIMITS, items=[("z", b"1")]) == ("gone", 0, 0)
    assert await conversations.get(ID, "other") is None


async def test_a_repeated_change_changes_nothing(queue: Queue) -> None:
    conversations = queue.bus.conversations
    for _ in range(2):
        assert (await made(queue, items=[("a", b"1")])).code == "ok"
        assert (await conversations.change(ID, TENANT, LIMITS, items=[("b", b"2")])).code == "ok"
    assert await conversations.items(ID) == [b"1", b"2"]
    before = await kept(queue)
    assert await conversations.drop(ID, TENANT, "a")
    assert not await conversations.drop(ID, TENANT, "a")
    assert await kept(queue) == before - ITEM_BYTES - 1
    assert not await conversations.drop(ID, "other")
    assert await conversations.drop(ID, TENANT)
    assert not await conversations.drop(ID, TENANT)
    assert await kept(queue) == 0
    assert await queue.bus._redis.keys("*conv*") == []


async def test_items_are_in_order(queue: Queue) -> None:
    conversations = queue.bus.conversations
    await made(queue, items=[("c", b"1"), ("a", b"2"), ("b", b"3")])
    await conversations.drop(ID, TENANT, "a")
    await conversations.change(ID, TENANT, LIMITS, items=[("0", b"4")])
    assert await conversations.items(ID) == [b"1", b"3", b"4"]
    assert await conversations.items(ID, 1, 2, newest_first=True) == [b"3", b"1"]
    assert await conversations.rank(ID, "b", newest_first=False) == 1
    assert await conversations.rank(ID, "a", newest_first=False) is None
    assert await conversations.item(ID, "0") == b"4"
    assert await conversations.item(ID, "a") is None


async def test_a_turn_is_added_once_whatever_the_limits(queue: Queue) -> None:
    conversations = queue.bus.conversations
    await made(queue, items=[("a", b"1"), ("b", b"2"), ("c", b"3")])
    assert (await submitted(queue, "r"))[0] == "ok"
    assert (await submitted(queue, "r"))[0] == "ok"
    assert await conversations.turns(ID) == ["resp_r"]
    assert await conversations.due(1 << 50, 9) == [Turn(TENANT, ID, "resp_r")]
    assert await conversations.due(1, 9) == []
    for name in ("d", "e"):  # the second one adds nothing
        done = await conversations.change(ID, TENANT, LIMITS, items=[(name, b"x" * 9000)], response="resp_r")
        assert done.code == "ok"
    assert await conversations.items(ID) == [b"1", b"2", b"3", b"x" * 9000]
    assert await conversations.turns(ID) == await conversations.due(1 << 50, 9) == []
    assert await kept(queue) > 9000


async def test_turns_need_their_conversation(queue: Queue) -> None:
    assert await submitted(queue, "r") == ("conversation", -1)
    await made(queue)
    for number in range(MAX_TURNS):
        assert (await submitted(queue, f"r{number}"))[0] == "ok"
    assert await submitted(queue, "more") == ("conversation", MAX_TURNS)
    assert await queue.bus.jobs.get("resp_more") is None
    assert (await submitted(queue, "again", forced=True))[0] == "ok"  # accepted before the queue lost the conversation
    await queue.bus.conversations.drop(ID, TENANT)
    assert (await submitted(queue, "late", forced=True))[0] == "ok"
    assert await queue.bus.conversations.turns(ID) == []
    [turn, *_] = await queue.bus.conversations.due(1 << 50, 99)
    await queue.bus.conversations.look_again(turn, 1)
    assert turn not in await queue.bus.conversations.due(1 << 50, 99)


async def test_a_turn_is_put_off_as_long_as_it_is_open(queue: Queue) -> None:
    await made(queue)
    await submitted(queue, "r")
    turn = Turn(TENANT, ID, "resp_r")
    await queue.bus.conversations.look_again(turn, 5)
    assert await queue.bus.conversations.due(5, 9) == [turn]
    assert await queue.bus.conversations.due(4, 9) == []


async def test_everything_of_a_conversation_expires(queue: Queue) -> None:
    await made(queue, items=[("a", b"1")])
    await submitted(queue, "r")
    for key in ("conversation", "conversation_items", "conversation_order", "conversation_turns"):
        assert 50 < await queue.ttl_s(getattr(queue.keys, key)(ID)) <= 60
    assert 50 < await queue.ttl_s(queue.keys.conversations(TENANT)) <= 60
    assert await queue.bus.untimed_keys() == []

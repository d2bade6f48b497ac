"""Workers of several bases join one fleet, each under its base's name; another model with that name is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from protocol.queue.bus import Bus
from protocol.queue.members import MAX_BASES, MAX_REASON
from protocol.wire import messages as m
from protocol.wire.errors import Conflict

TTL_MS = 60_000


def base(name: str, *, weights: str = "", **more: Any) -> m.ServedModel:
    facts = {"fingerprint": "same layout", "model_type": "t", "vocab_size": 9, "max_model_len": 64, "sites": []} | more
    return m.ServedModel(model=name, name=name, weights=weights or f"weights of {name}", **facts)


async def join(bus: Bus, wid: str, served: m.ServedModel, *, several: bool = True) -> str:
    fleet = [served.name] if several else []
    return await bus.members.join(m.WorkerBeat(wid=wid, name=wid, capacity=1), served, TTL_MS, fleet=fleet)


async def names(bus: Bus) -> list[str]:
    return [one.name for one in (await bus.members.bases())[0]]


async def test_bases_of_one_layout_live_side_by_side(bus: Bus) -> None:
    assert await join(bus, "w1", base("a")) == "a"
    assert await join(bus, "w2", base("b")) == "b"
    assert await join(bus, "w3", base("a")) == "a"
    assert (await bus.members.bases())[0] == [base("a"), base("b")]
    beats = await bus.members.worker_beats()
    assert {wid: beat.base for wid, beat in beats.items() if beat is not None} == {"w1": "a", "w2": "b", "w3": "a"}


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("other", [{"weights": "others"}, {"fingerprint": "another layout"}])
async def test_other_weights_under_a_taken_name_are_refused_and_change_nothing(
    bus: Bus, name: str, other: dict[str, str]
) -> None:
    await join(bus, "w1", base("a"))
    await join(bus, "w2", base("b"))
    before = (await bus.members.bases())[0]
    with pytest.raises(Conflict, match=f"serves another base as {name}: the hash of its .* --served-name"):
        await join(bus, "w3", base(name, **other))
    assert (await bus.members.bases())[0] == before
    assert set(await bus.members.ids(bus.keys.workers)) == {"w1", "w2"}


async def test_a_name_is_free_once_its_last_worker_has_gone(bus: Bus) -> None:
    await join(bus, "w1", base("a"))
    await join(bus, "w2", base("b"))
    await bus.members.leave("w2")
    assert await names(bus) == ["a", "b"]  # its requests wait for a worker of it
    await join(bus, "w3", base("b", weights="new"))
    assert (await bus.members.bases())[0] == [base("a"), base("b", weights="new")]


async def test_of_two_contents_that_take_one_name_together_one_gets_it(bus: Bus) -> None:
    await join(bus, "w0", base("a"))
    joins = [join(bus, f"w{i}", base("b", weights=f"content {i % 2}")) for i in range(1, 9)]
    found = await asyncio.gather(*joins, return_exceptions=True)
    assert found.count("b") == 4
    assert sum(isinstance(one, Conflict) for one in found) == 4
    live = {int(wid[1:]) % 2 for wid in await bus.members.ids(bus.keys.workers) if wid != "w0"}
    assert [f"content {number}" for number in live] == [(await bus.members.bases())[0][1].weights]


async def test_another_name_for_served_weights_is_the_served_base(bus: Bus) -> None:
    await join(bus, "w1", base("a"))
    await join(bus, "w2", base("b"))
    assert await join(bus, "w3", base("copy", weights="weights of b"), several=False) == "b"
    assert await names(bus) == ["a", "b"]
    with pytest.raises(Conflict, match="this fleet serves the weights of copy as b; name each base model once"):
        await join(bus, "w4", base("copy", weights="weights of b"))
    await bus.members.leave("w2")
    await bus.members.leave("w3")
    assert await join(bus, "w5", base("copy", weights="weights of b")) == "copy"


async def test_a_fleet_of_one_base_refuses_another_model_and_changes_nothing(bus: Bus) -> None:
    await join(bus, "w1", base("a"), several=False)
    for other in ({}, {"fingerprint": "other"}):
        with pytest.raises(Conflict, match="serves a; b cannot join it: a fleet of several bases has --more"):
            await join(bus, "w2", base("b", **other), several=False)
    assert await join(bus, "w3", base("a"), several=False) == "a"
    assert await names(bus) == ["a"]
    assert set(await bus.members.ids(bus.keys.workers)) == {"w1", "w3"}
    await bus.members.leave("w1")
    await bus.members.leave("w3")
    assert await join(bus, "w4", base("b"), several=False) == "b"


async def test_a_stray_worker_does_not_join_where_an_earlier_run_knew_its_base(bus: Bus) -> None:
    await join(bus, "w1", base("a"))
    await join(bus, "w2", base("b"))
    await bus.members.leave("w2")
    with pytest.raises(Conflict, match="b cannot join it"):
        await join(bus, "w3", base("b"), several=False)
    assert await join(bus, "w4", base("b")) == "b"


async def test_a_fleet_that_starts_again_with_another_model_knows_that_one_only(bus: Bus) -> None:
    await join(bus, "w1", base("a"))
    await join(bus, "w2", base("b"))
    for wid in ("w1", "w2"):
        await bus.members.leave(wid)
    assert await join(bus, "w3", base("b")) == "b"
    assert await names(bus) == ["a", "b"]  # the first one to return is known
    await bus.members.leave("w3")
    assert await join(bus, "w4", base("c")) == "c"
    assert await names(bus) == ["c"]


async def test_a_worker_that_swaps_keeps_the_records_of_other_bases(bus: Bus) -> None:
    """So a fleet of one worker knows all of its bases once it has served each of them."""
    fleet = ["a", "b", "c"]

    async def swap(name: str, fleet: list[str]) -> list[str]:
        for wid in await bus.members.ids(bus.keys.workers):
            await bus.members.leave(wid)
        assert await bus.members.join(m.WorkerBeat(wid=name, name="w", capacity=1), base(name), TTL_MS, fleet=fleet)
        return await names(bus)

    assert await swap("a", fleet) == ["a"]
    assert await swap("b", fleet) == ["a", "b"]
    assert await swap("a", fleet) == ["a", "b"]
    assert await swap("c", fleet) == ["a", "b", "c"]
    assert await swap("b", fleet) == ["a", "b", "c"]
    assert await swap("d", ["d", "a", "b"]) == ["a", "b", "d"]  # the fleet's bases have changed: `c` is not one of them
    assert await swap("e", ["e", "d"]) == ["d", "e"]  # nor is its first base


class Meanwhile:
    """A client that triggers an action after the first read of heartbeats."""

    def __init__(self, bus: Bus, happens: Callable[[], Awaitable[object]]) -> None:
        self._client, bus.members._redis = bus.members._redis, self
        self._members, self._happens = bus.members, happens
        self.read: list[str] = []

    def pipeline(self, *, transaction: bool) -> Any:
        pipe = self._client.pipeline(transaction=transaction)
        if transaction:
            return pipe
        execute = pipe.execute

        async def executed() -> list[bytes]:
            keys = [words[1] for words, _ in pipe.command_stack]
            found = await execute()
            if not self.read:
                self._members._redis = self._client
                await self._happens()
                self._members._redis = self
            self.read += keys
            return found

        pipe.execute = executed
        return pipe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


async def test_who_left_is_not_held_against_records_that_came_later(bus: Bus) -> None:
    """A worker got the answer that its fleet serves b, and that b cannot join it."""
    await join(bus, "w1", base("a"), several=False)

    async def change() -> None:
        await bus.members.leave("w1")
        await join(bus, "w2", base("b"), several=False)

    Meanwhile(bus, change)
    with pytest.raises(Conflict, match="this fleet serves a; b cannot join it"):  # that was true when the worker asked
        await join(bus, "w3", base("b"), several=False)
    assert await join(bus, "w3", base("b"), several=False) == "b"


async def test_which_bases_failed_is_told_with_their_names(bus: Bus) -> None:
    assert await bus.members.bases() == ([], {})
    await bus.members.note_failure("c", "no memory")
    await join(bus, "w1", base("a"))
    await join(bus, "w2", base("b"))
    assert await bus.members.bases() == ([base("a"), base("b")], {"c": "no memory"})


async def test_each_base_promises_what_its_own_smallest_worker_holds(bus: Bus) -> None:
    await join(bus, "w1", base("a", max_model_len=64))
    await join(bus, "w2", base("b", max_model_len=16))
    await join(bus, "w3", base("b", max_model_len=32))
    await join(bus, "w4", base("a", max_model_len=128))
    assert {one.name: one.max_model_len for one in (await bus.members.bases())[0]} == {"a": 64, "b": 16}


async def test_there_are_at_most_so_many_bases(bus: Bus) -> None:
    for i in range(MAX_BASES):
        await join(bus, f"w{i}", base(f"b{i}"))
    with pytest.raises(Conflict, match=f"this fleet serves {MAX_BASES} bases, which is the limit; one more cannot"):
        await join(bus, "more", base("one more"))
    assert await join(bus, "again", base("b7")) == "b7"
    assert len((await bus.members.bases())[0]) == MAX_BASES


async def test_a_heartbeat_that_cannot_be_read_keeps_nobody_from_joining(bus: Bus) -> None:
    await join(bus, "w1", base("a"))
    for wid, raw in (("w2", b"\xc1"), ("w3", b"\x93\1\2\3"), ("w4", b"\1"), ("w5", b"\xc0")):
        await bus.members.beat(bus.keys.worker_beat(wid), bus.keys.workers, wid, raw, TTL_MS)
    assert await join(bus, "w6", base("b")) == "b"


async def test_the_beginning_of_a_heartbeat_is_enough_to_know_its_base(bus: Bus) -> None:
    """So the queue is not blocked, and a hundred workers that join together do not read megabytes each."""
    await join(bus, "w1", base("a"))
    raw = m.encode(m.WorkerBeat(wid="w1", name="base", base="a", capacity=1))
    await bus.members.beat(bus.keys.worker_beat("w1"), bus.keys.workers, "w1", raw[:16], TTL_MS)
    with pytest.raises(Conflict, match="serves another base as a"):
        await join(bus, "w2", base("a", weights="others"))
    assert await join(bus, "w3", base("b")) == "b"


@pytest.mark.parametrize("length", [31, 32, 255, 256, 70_000])
async def test_workers_of_a_name_of_any_length_are_found(bus: Bus, length: int) -> None:
    name = "é" + "n" * (length - 2)
    assert await join(bus, "w1", base(name)) == name
    with pytest.raises(Conflict, match="serves another base as"):
        await join(bus, "w2", base(name, weights="others"))
    assert await join(bus, "w3", base(name[:-1])) == name[:-1]
    with pytest.raises(Conflict, match="serves another base as"):
        await join(bus, "w4", base(name[:-1], weights="others"))


async def test_a_reason_stays_when_a_fleet_starts_with_other_bases(bus: Bus) -> None:
    await join(bus, "w1", base("a"))
    await join(bus, "w2", base("b"))
    for wid in ("w1", "w2"):
        await bus.members.leave(wid)
    await bus.members.note_failure("d", "no such file")
    assert await join(bus, "w3", base("c")) == "c"
    assert await bus.members.bases() == ([base("c")], {"d": "no such file"})


async def test_a_record_is_decoded_once(bus: Bus) -> None:
    await join(bus, "w1", base("a"))
    await join(bus, "w2", base("b"))
    (first, second), _ = await bus.members.bases()
    again, _ = await bus.members.bases()
    assert again[0] is first
    assert again[1] is second


async def test_why_a_base_did_not_start_is_told_until_a_worker_of_it_joins(bus: Bus) -> None:
    await join(bus, "w1", base("a"))
    await bus.members.note_failure("b", "no memory " * 1000)
    await bus.members.note_failure("a", "a second worker of it")
    bases, failures = await bus.members.bases()
    assert (bases, set(failures)) == ([base("a")], {"a", "b"})
    assert len(failures["b"]) == MAX_REASON
    await join(bus, "w2", base("b"))
    assert (await bus.members.bases())[1] == {"a": "a second worker of it"}
    for i in range(3 * MAX_BASES):
        await bus.members.note_failure(f"c{i}", "no such folder")
    assert len((await bus.members.bases())[1]) < 2 * MAX_BASES
    for i in range(MAX_BASES - 2):
        await join(bus, f"v{i}", base(f"d{i}"))  # failure reasons do not count as bases

"""Tenants take turns with the sandbox's processes; waiting jobs and their accounted costs are bounded."""

from __future__ import annotations

from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.sandbox import turns as t
from gateway.sandbox.turns import SandboxTurn, Turns
from protocol.wire.errors import Overloaded, Unavailable

TENANTS = st.sampled_from("abcd")


def test_tenants_take_turns_and_none_has_every_process() -> None:
    turns: Turns[SandboxTurn] = Turns(3)
    for tenant in "aaaabbc":
        turns.add(SandboxTurn(tenant, 1), 0.0)
    begun = [turns.next(0.0) for _ in range(4)]
    assert [turn.tenant for turn in begun if turn] == ["a", "b", "c", "a"]
    assert [turn.tenant for turn in iter(lambda: turns.next(0.0), None)] == ["b"], "a has all that it may have"
    assert begun[0] is not None
    turns.ended(begun[0], 0.0, 0.0)
    after = turns.next(0.0)
    assert after is not None
    assert after.tenant == "a"


def test_who_owes_nothing_is_next() -> None:
    turns: Turns[SandboxTurn] = Turns(2)
    for tenant in "ab":
        turns.add(SandboxTurn(tenant, 1), 0.0)
        turn = turns.next(0.0)
        assert turn is not None
        turns.ended(turn, 5.0, 0.0)
    for tenant in "aabbc":
        turns.add(SandboxTurn(tenant, 1), 1.0)
    order: list[str] = []
    while (turn := turns.next(1.0)) is not None:
        order.append(turn.tenant)
        turns.ended(turn, 5.0, 1.0)
    assert order == ["c", "a", "b", "a", "b"]


def test_what_jobs_cost_is_bounded_and_forgotten() -> None:
    turns: Turns[SandboxTurn] = Turns(2)
    for _ in range(7):
        turns.add(SandboxTurn("a", 1), 0.0)
        turn = turns.next(0.0)
        assert turn is not None
        turns.ended(turn, 5.0, 0.0)
    with pytest.raises(Overloaded, match=r"took 35 s beyond 0\.5 s a second; the limit is 30 s") as refused:
        turns.add(SandboxTurn("a", 1), 0.0)
    turns.add(SandboxTurn("b", 1), 0.0)
    assert refused.value.retry_after_s is not None
    turns.add(SandboxTurn("a", 1), refused.value.retry_after_s)


def test_places_of_all_are_bounded() -> None:
    turns: Turns[SandboxTurn] = Turns(2)
    for i in range(t.MAX_WAITING):
        turns.add(SandboxTurn(f"{i}", 1), 0.0)
    with pytest.raises(Unavailable, match=f"the limit is {t.MAX_WAITING} of"):
        turns.add(SandboxTurn("more", 1), 0.0)
    assert len(turns.clear()) == t.MAX_WAITING
    for i in range(t.MAX_WAITING_BYTES // t.MAX_TENANT_BYTES):
        turns.add(SandboxTurn(f"{i}", t.MAX_TENANT_BYTES), 0.0)
    with pytest.raises(Overloaded, match="of this tenant"):
        turns.add(SandboxTurn("0", 1), 0.0)
    with pytest.raises(Unavailable, match="are waiting"):
        turns.add(SandboxTurn("more", 1), 0.0)


def test_tenants_that_owe_nothing_are_forgotten() -> None:
    turns: Turns[SandboxTurn] = Turns(2)
    for i in range(10 * t.MIN_FORGET):
        turns.add(SandboxTurn(f"{i}", 1), float(i))
        turn = turns.next(float(i))
        assert turn is not None
        turns.ended(turn, 0.001, float(i))
    assert len(turns._tenants) <= 2 * t.MIN_FORGET


@given(st.lists(st.tuples(st.sampled_from(["add", "next", "end", "remove"]), TENANTS, st.floats(0, 5)), max_size=80))
def test_each_job_has_one_turn_and_no_tenant_more_than_its_share(steps: list[tuple[str, str, float]]) -> None:
    num = 3
    turns: Turns[SandboxTurn] = Turns(num)
    waiting: dict[str, deque[SandboxTurn]] = {tenant: deque() for tenant in "abcd"}
    running: list[SandboxTurn] = []
    now_s = 0.0
    for what, tenant, seconds in steps:
        now_s += seconds / 10
        if what == "add":
            turn = SandboxTurn(tenant, 7)
            try:
                turns.add(turn, now_s)
            except Overloaded:
                continue
            waiting[tenant].append(turn)
        elif what == "next" and len(running) < num:
            turn = turns.next(now_s)
            counts = Counter(turn.tenant for turn in running)
            may = [name for name, jobs in waiting.items() if jobs and counts[name] < num - 1]
            assert (turn is not None) == bool(may)
            if turn is not None:
                assert turn.tenant in may
                assert waiting[turn.tenant].popleft() is turn, "a tenant's jobs keep their order"
                running.append(turn)
        elif what == "end" and running:
            turns.ended(running.pop(0), seconds, now_s)
        elif what == "remove" and waiting[tenant]:
            turns.remove(waiting[tenant].pop())
        left = [turn for jobs in waiting.values() for turn in jobs]
        assert all(turn in turns for turn in left)
        assert (turns._num_waiting, turns._num_bytes) == (len(left), 7 * len(left))
        counts = Counter(turn.tenant for turn in running)
        assert turns.has_ready == any(jobs and counts[name] < num - 1 for name, jobs in waiting.items())

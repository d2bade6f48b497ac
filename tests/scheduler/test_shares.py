"""Who gives way to whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.fairness import RECENT_MS, Shares, TokenCounters

PLACES = 64, 8
"""All, and those kept for who has less."""

SLACK = 1000.0


def make_shares(now_ms: float = 0.0, **num_open: int) -> Shares:
    """Tenants, quiet ones with 0 open requests among them."""
    shares = Shares(TokenCounters(4 * SLACK), SLACK)
    for tenant, num in num_open.items():
        for _ in range(max(num, 1)):
            shares.asked(tenant, 1.0, now_ms)
        if not num:
            shares.ended(tenant)
    shares.begin(*PLACES, now_ms)
    return shares


def test_a_flood_gives_way_to_who_asks_now_and_then() -> None:
    shares = make_shares(flood=200, quiet=0, busy=10)
    assert [shares.gives_way(tenant) for tenant in ("flood", "quiet", "busy")] == [True, False, False]
    shares.ended("busy")
    shares.begin(*PLACES, RECENT_MS + 1)  # the quiet one has not asked any more; who has requests open still asks
    assert shares.gives_way("flood")
    for _ in range(9):
        shares.ended("busy")
    shares.begin(*PLACES, 2 * RECENT_MS + 2)
    assert not shares.gives_way("flood")


def test_nobody_gives_way_where_all_fit_or_all_have_more_than_their_share() -> None:
    fits = make_shares(most=8, some=8, quiet=0)
    assert not any(map(fits.gives_way, ("most", "some", "quiet")))
    crowd = make_shares(most=9, some=8, quiet=0)
    assert crowd.gives_way("most"), "noticed before it has filled the fleet"
    equals = make_shares(first=400, second=300, third=23)
    assert not any(map(equals.gives_way, ("first", "second", "third")))


def test_shares_go_by_weight() -> None:
    shares = Shares(TokenCounters(4 * SLACK), SLACK)
    for i in range(200):
        shares.asked("light", 1.0, 0.0)
        if i < 40:
            shares.asked("heavy", 3.0, 0.0)
    shares.begin(*PLACES, 0.0)
    assert (shares.gives_way("light"), shares.gives_way("heavy")) == (True, False)


def test_who_has_had_more_tokens_has_not_less() -> None:
    """Else one with few requests at a time, but no pause between them, would take all that a flood should have."""
    counters = TokenCounters(4 * SLACK)
    shares = Shares(counters, SLACK)
    for tenant, num in (("flood", 200), ("few", 20)):
        for _ in range(num):
            shares.asked(tenant, 1.0, 0.0)
    counters.charge("few", round(SLACK), 0, 1.0)
    shares.begin(*PLACES, 0.0)
    assert shares.gives_way("flood")
    counters.charge("few", 1, 0, 1.0)
    shares.begin(*PLACES, 0.0)
    assert not shares.gives_way("flood")
    assert not shares.gives_way("few"), "who should it give way to?"


def test_batch_work_gives_way_to_whoever_asks() -> None:
    assert make_shares(any=0).gives_way("any", batch=True)
    assert not make_shares().gives_way("any", batch=True)


@given(st.lists(st.tuples(st.integers(1, 300), st.floats(0.1, 10.0)), min_size=2, max_size=12))
def test_shares_fill_the_fleet(tenants: list[tuple[int, float]]) -> None:
    """What all together may have is what there is, and whoever asks for more than its share gives way to all others."""
    shares = Shares(TokenCounters(4 * SLACK), SLACK)
    for number, (num, weight) in enumerate(tenants):
        for _ in range(num):
            shares.asked(str(number), weight, 0.0)
    shares.begin(*PLACES, 0.0)
    giving = [number for number in range(len(tenants)) if shares.gives_way(str(number))]
    others = [item for number, item in enumerate(tenants) if number not in giving]
    if not giving:
        return
    assert others
    if sum(num for num, _ in tenants) <= PLACES[0] - PLACES[1]:
        return
    left = PLACES[0] - PLACES[1] - sum(num for num, _ in others)
    weight = sum(tenants[number][1] for number in giving)
    for number in giving:
        num, own = tenants[number]
        assert num > left * own / weight or num == pytest.approx(left * own / weight)
    for num, own in others:
        assert num <= left * own / weight or num == pytest.approx(left * own / weight)

"""Which tenants yield."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.fairness import RECENT_MS, FairShares, VirtualTokenCounters
from scheduler.request import QueuedRequest
from tests.scheduler.fakes import make_submit

PLACES = 64, 8
"""All slots, and the reserved ones."""

SLACK = 1000.0


def make_shares(now_ms: float = 0.0, **num_open: int) -> FairShares:
    """Return the shares of tenants; those with 0 open requests are quiet."""
    shares = FairShares(VirtualTokenCounters(4 * SLACK), SLACK)
    for tenant, num in num_open.items():
        for _ in range(max(num, 1)):
            shares.opened(tenant, 1.0, now_ms)
        if not num:
            shares.closed(tenant)
    shares.update(*PLACES, now_ms)
    return shares


def test_a_flood_yields_and_tenants_with_less_do_not() -> None:
    shares = make_shares(flood=200, quiet=0, busy=10)
    assert [shares.tenant_yields(tenant) for tenant in ("flood", "quiet", "busy")] == [True, False, False]
    shares.closed("busy")
    shares.update(*PLACES, RECENT_MS + 1)
    assert [shares.tenant_yields(tenant) for tenant in ("flood", "busy")] == [True, False]


def test_nobody_yields_where_all_fit_but_a_crowd_is_noticed_early() -> None:
    fits = make_shares(most=8, some=8, quiet=0)
    assert not any(map(fits.tenant_yields, ("most", "some", "quiet")))
    crowd = make_shares(most=9, some=8, quiet=0)
    assert crowd.tenant_yields("most"), "noticed before it has filled the workers"


def test_equals_that_all_have_more_than_their_share_all_yield() -> None:
    equals = make_shares(first=400, second=300, third=23)
    assert all(map(equals.tenant_yields, ("first", "second", "third")))


def test_a_tenant_that_is_alone_yields_to_whoever_comes_next() -> None:
    shares = make_shares(only=1)
    assert shares.tenant_yields("only")
    assert shares.is_alone("only")
    flood = make_shares(only=200)
    assert (flood.tenant_yields("only"), flood.is_alone("only")) == (True, False), "it has more than its share besides"
    shares.opened("other", 1.0, 0.0)
    shares.update(*PLACES, 0.0)
    assert not any(map(shares.tenant_yields, ("only", "other")))
    assert not any(map(shares.is_alone, ("only", "other")))
    shares.closed("other")
    shares.update(*PLACES, RECENT_MS)
    assert not shares.tenant_yields("only"), "another has asked recently"
    shares.update(*PLACES, RECENT_MS + 1)
    assert shares.tenant_yields("only")


def test_shares_go_by_weight() -> None:
    shares = FairShares(VirtualTokenCounters(4 * SLACK), SLACK)
    for i in range(200):
        shares.opened("light", 1.0, 0.0)
        if i < 40:
            shares.opened("heavy", 3.0, 0.0)
    shares.update(*PLACES, 0.0)
    assert (shares.tenant_yields("light"), shares.tenant_yields("heavy")) == (True, False)


def test_a_tenant_that_was_served_more_tokens_yields_too() -> None:
    """Otherwise a tenant with few requests at a time but no pauses would take everything a flood should have."""
    counters = VirtualTokenCounters(4 * SLACK)
    shares = FairShares(counters, SLACK)
    for tenant, num in (("flood", 200), ("few", 20)):
        for _ in range(num):
            shares.opened(tenant, 1.0, 0.0)
    counters.charge("few", round(SLACK), 0, 1.0)
    shares.update(*PLACES, 0.0)
    assert (shares.tenant_yields("flood"), shares.tenant_yields("few")) == (True, False)
    counters.charge("few", 1, 0, 1.0)
    shares.update(*PLACES, 0.0)
    assert (shares.tenant_yields("flood"), shares.tenant_yields("few")) == (True, True)


def test_batch_work_yields_and_a_resumed_request_does_not() -> None:
    shares = make_shares(flood=200, quiet=1)
    for attempts in (0, 2):
        assert shares.yields(QueuedRequest(make_submit("a", tenant="quiet", cls="batch"), attempts))
    assert shares.yields(QueuedRequest(make_submit("b", tenant="flood"), 0))
    assert not shares.yields(QueuedRequest(make_submit("b", tenant="flood"), 2))
    assert not shares.yields(QueuedRequest(make_submit("c", tenant="quiet"), 0))


@given(st.lists(st.tuples(st.integers(1, 300), st.floats(0.1, 10.0)), min_size=2, max_size=12))
def test_shares_fill_the_places(tenants: list[tuple[int, float]]) -> None:
    """The shares of all tenants sum to the number of slots, and exactly the tenants over their share yield."""
    shares = FairShares(VirtualTokenCounters(4 * SLACK), SLACK)
    for number, (num, weight) in enumerate(tenants):
        for _ in range(num):
            shares.opened(str(number), weight, 0.0)
    shares.update(*PLACES, 0.0)
    yielding = [number for number in range(len(tenants)) if shares.tenant_yields(str(number))]
    others = [item for number, item in enumerate(tenants) if number not in yielding]
    if not yielding or sum(num for num, _ in tenants) <= PLACES[0] - PLACES[1]:
        return
    left = PLACES[0] - PLACES[1] - sum(num for num, _ in others)
    weight = sum(tenants[number][1] for number in yielding)
    for number in yielding:
        num, own = tenants[number]
        assert num > left * own / weight or num == pytest.approx(left * own / weight)
    for num, own in others:
        assert num <= left * own / weight or num == pytest.approx(left * own / weight)

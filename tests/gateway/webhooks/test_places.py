"""Slots shared by tenants."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.webhooks.places import PlacesByHost, TenantSlots

TENANTS = st.sampled_from("abcdefghijklmnopqrstuvwxyz")


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 6), st.lists(st.tuples(TENANTS, st.booleans())))
def test_no_limit_is_passed_whoever_asks(most: int, most_of_one: int, asked: list[tuple[str, bool]]) -> None:
    places, held = TenantSlots(most, most_of_one), dict.fromkeys("abcdefghijklmnopqrstuvwxyz", 0)
    for tenant, takes in asked:
        if takes and places.room(tenant):
            for _ in range(places.room(tenant)):
                places.take(tenant)
                held[tenant] += 1
        elif held[tenant]:
            places.leave(tenant)
            held[tenant] -= 1
        assert places.num_taken == sum(held.values()) <= most
        assert max(held.values()) <= most_of_one
        assert all(places.of(name) == number for name, number in held.items())


@settings(deadline=None)
@given(st.integers(4, 64), st.integers(1, 6))
def test_the_last_quarter_is_for_tenants_that_have_none(most: int, most_of_one: int) -> None:
    places, num_tenants = TenantSlots(most, most_of_one), 0
    while places.room(f"t{num_tenants}"):
        for _ in range(places.room(f"t{num_tenants}")):
            places.take(f"t{num_tenants}")
        num_tenants += 1
        if places.num_taken >= most - most // 4:
            assert not any(places.room(f"t{number}") for number in range(num_tenants))
    assert places.num_taken == most
    assert num_tenants >= most // 4


def test_a_receiver_that_nobody_asks_takes_no_memory() -> None:
    receivers = PlacesByHost(2, 1)
    with receivers.held("a", "x") as first, receivers.held("a", "x") as second, receivers.held("a", "y") as third:
        assert (first, second, third) == (True, False, True)
        with receivers.held("a", "z") as fourth, receivers.held("b", "x") as fifth:
            assert (fourth, fifth) == (False, True)
            assert len(receivers) == 2
        assert len(receivers) == 1
    assert len(receivers) == 0

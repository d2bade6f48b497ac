"""Fair turns: a tenant with thousands of tasks does not delay those of others."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from gateway.overload.shares import shares

WORK = st.lists(st.tuples(st.sampled_from("abcd"), st.integers()), max_size=60)


@given(WORK, st.integers(1, 9))
def test_all_is_done_or_waits_in_order_and_nobody_has_more_than_a_share(work: list[tuple[str, int]], most: int) -> None:
    now, later = shares(work, lambda one: one[0], most)
    assert Counter(now) + Counter(later) == Counter(work)
    for tenant in "abcd":
        own = [one for one in work if one[0] == tenant]
        assert [one for one in now if one[0] == tenant] == own[:most]
        assert [one for one in later if one[0] == tenant] == own[most:]
    for turn in range(len(now)):  # a tenant that is served has had no more turns than any that still waits
        had = Counter(tenant for tenant, _ in now[:turn])
        assert had[now[turn][0]] <= min((had[tenant] for tenant, _ in now[turn:]), default=0)

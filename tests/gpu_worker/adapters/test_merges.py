"""Merges beside other adapters: what waits for them, how many run at once, and when one ends without a result."""

from __future__ import annotations

import pytest
from helpers.adapter_loading import Loading, make_adapter

from gpu_worker.adapters.jobs import NUM_STAGERS
from gpu_worker.adapters.merges import NUM_MERGERS, NUM_PER_TENANT, GivenUp, MergeWatch
from protocol.wire.errors import AdapterRefused

MERGES = [f"merge-{i}" for i in range(2 * NUM_STAGERS)]


def loading(merge_timeout_s: float = 60.0) -> Loading:
    """Return a cache whose merges do not finish before `merges_go_on` is set."""
    adapters = [make_adapter(digest, 8) for digest in ("a", *MERGES)]
    found = Loading(4, adapters, merge_timeout_s=merge_timeout_s)
    found.merges_go_on.clear()
    return found


def test_nothing_that_is_only_fetched_waits_behind_merges() -> None:
    cold = loading()
    cold.settle(*MERGES, until=lambda: len(cold.merging) == NUM_MERGERS)
    cold.settle(*MERGES, "a", until=lambda: cold.cache.is_resident("a"))
    assert sorted(cold.merging) == MERGES[:NUM_MERGERS]
    cold.merges_go_on.set()
    cold.settle(*MERGES, until=lambda: cold.cache.is_resident(MERGES[0]))


def test_one_tenant_never_has_all_the_threads() -> None:
    assert NUM_PER_TENANT < NUM_MERGERS
    cold, tenants = loading(), dict.fromkeys(MERGES, "greedy") | {MERGES[-1]: "modest"}
    cold.settle(*MERGES, until=lambda: len(cold.merging) == 2, tenant_of=tenants.__getitem__)
    assert sorted(cold.merging) == sorted([MERGES[0], MERGES[-1]])
    cold.merges_go_on.set()
    cold.settle(*MERGES[:2], until=lambda: cold.cache.is_resident(MERGES[1]), tenant_of=tenants.__getitem__)


def test_a_merge_that_nobody_waits_for_is_given_up() -> None:
    """Merges that have not begun are dropped; one requested again is computed again, and its end is not a failure."""
    cold = loading()
    cold.settle(*MERGES, until=lambda: len(cold.merging) == NUM_MERGERS)
    cold.settle("a", until=lambda: cold.cache.is_resident("a") and not cold.cache.loading)
    assert len(cold.merging) == NUM_MERGERS
    cold.merges_go_on.set()
    cold.settle(MERGES[0], until=lambda: cold.cache.is_resident(MERGES[0]))
    assert cold.merging.count(MERGES[0]) == 2


def test_a_merge_is_not_computed_for_requests_that_may_come() -> None:
    cold = loading()
    cold.cache.prefetch(MERGES[0])
    assert cold.cache.loading == []


def test_a_merge_that_takes_too_long_is_refused_and_not_tried_at_once() -> None:
    cold = loading(merge_timeout_s=0.001)
    failed: dict[str, str] = {}
    while not failed:
        cold.changed.clear()
        failed |= {digest: error.message for digest, error in cold.cache.poll().items()}
        if not failed:
            cold.cache.load([MERGES[0]])
            assert cold.changed.wait(timeout=60)
    assert "0.001 s (merge_timeout_s)" in failed[MERGES[0]]
    assert cold.cache.load([MERGES[0]])[MERGES[0]].status == 422
    assert cold.merging == [MERGES[0]]


def test_a_watch_tells_when_to_end() -> None:
    watch = MergeWatch(3600.0)
    watch.check()
    watch.check(needed_s=3000.0)
    with pytest.raises(AdapterRefused, match="merge_timeout_s"):
        watch.check(needed_s=4000.0)
    watch.give_up()
    with pytest.raises(GivenUp):
        watch.check()

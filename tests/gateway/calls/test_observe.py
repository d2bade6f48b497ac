"""However many adapters and tenants there are, a gateway shows a bounded number of series."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client import REGISTRY

from gateway.adapters.resolver import Target
from gateway.calls import observe
from gateway.calls.tokenize import Prompt
from protocol.metrics.names import OTHER
from protocol.wire import messages as m

NUM, LIMIT = 10_000, 50
FAMILIES = ("lorafleet_adapter", "lorafleet_tenant")


def shown() -> list[Any]:
    return [s for metric in REGISTRY.collect() if metric.name.startswith(FAMILIES) for s in metric.samples]


def test_ten_thousand_adapters_and_tenants_have_a_bounded_page() -> None:
    files = cast("Any", SimpleNamespace())
    observe.ADAPTERS.set_limit(LIMIT)
    observe.TENANTS.set_limit(LIMIT)
    try:
        for i in range(NUM):
            target, tenant = Target(f"adapter-{i}", f"digest-{i}", files), f"tenant-{i}"
            observe.accepted(tenant, [Prompt(target, b"", 7, 9)])
            observe.placed(tenant, target, m.Timing(1, 5, "store", 10, 20, 30, 40))
            observe.first_token(target, 0.1)
            observe.left(tenant, target, 3)
            observe.refused(tenant, "requests")
        samples = shown()
    finally:
        observe.ADAPTERS.set_limit(0)
        observe.TENANTS.set_limit(0)
        observe.ADAPTERS.set_limit(100)
        observe.TENANTS.set_limit(100)
    for label in ("adapter", "tenant"):
        assert len({s.labels[label] for s in samples if label in s.labels}) <= LIMIT + 1
    assert len(samples) < 60 * LIMIT
    others = {s.name: s.value for s in samples if OTHER in s.labels.values() and "le" not in s.labels}
    assert others["lorafleet_adapter_requests_total"] >= NUM - LIMIT
    assert others["lorafleet_tenant_refused_total"] >= NUM - LIMIT
    assert observe.name_of_digest("digest-0") is None  # as many as `MAX_NAMES` are remembered
    assert observe.name_of_digest(f"digest-{NUM - 1}") == f"adapter-{NUM - 1}"


def test_merges_that_clients_invent_have_one_name() -> None:
    target = Target("a,b", "merge-" + "0" * 64, cast("Any", Path()))
    assert observe.name_of(target) == observe.MERGES

"""The number of metric series of a gateway is bounded, however many adapters and tenants there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import REGISTRY

from gateway.adapters.resolver import CallTarget
from gateway.calls import observe
from gateway.calls.tokenize import Prompt
from protocol.metrics.names import OTHER
from protocol.wire import messages as m

NUM, LIMIT = 10_000, 50
FAMILIES = ("lorafleet_adapter", "lorafleet_tenant")


@pytest.fixture(autouse=True)
def _no_names() -> Iterator[None]:
    """Clear the most used names before a test, so that its series don't depend on earlier tests."""
    forget_names()
    yield
    forget_names()


def forget_names() -> None:
    for names in (observe.ADAPTERS, observe.TENANTS):
        names.set_limit(0)
        names.set_limit(100)


def shown() -> list[Any]:
    return [s for metric in REGISTRY.collect() if metric.name.startswith(FAMILIES) for s in metric.samples]


def test_ten_thousand_adapters_and_tenants_have_a_bounded_page() -> None:
    files = cast("Any", SimpleNamespace())
    observe.ADAPTERS.set_limit(LIMIT)
    observe.TENANTS.set_limit(LIMIT)
    for i in range(NUM):
        target, tenant = CallTarget(f"adapter-{i}", f"digest-{i}", files), f"tenant-{i}"
        observe.accepted(tenant, [Prompt(target, b"", 7, 9)])
        observe.placed(tenant, target, m.Timing(1, 5, "store", 10, 20, 30, 40))
        observe.first_token(tenant, target, 0.1)
        for kind in ("staged", "resident"):
            observe.adapter_event(m.AdapterEvent(kind=kind, digest=target.digest, ms=5))
        observe.left(tenant, target, 3)
        observe.refused(tenant, "requests")
    samples = shown()
    for label in ("adapter", "tenant"):
        assert len({s.labels[label] for s in samples if label in s.labels}) <= LIMIT + 1
    assert len(samples) < 90 * LIMIT
    others = {s.name: s.value for s in samples if OTHER in s.labels.values() and "le" not in s.labels}
    assert others["lorafleet_adapter_requests_total"] >= NUM - LIMIT
    assert others["lorafleet_tenant_refused_total"] >= NUM - LIMIT
    assert observe.name_of_digest("digest-0") is None  # `MAX_NAMES` names are remembered
    assert observe.name_of_digest(f"digest-{NUM - 1}") == f"adapter-{NUM - 1}"


def test_loads_are_counted_by_adapter_and_tier() -> None:
    def loads(adapter: str, tier: str) -> tuple[float, float]:
        labels = {"adapter": adapter, "tier": tier}
        parts = (
            REGISTRY.get_sample_value(f"lorafleet_adapter_load_seconds_{part}", labels) for part in ("count", "sum")
        )
        count, seconds = (value or 0.0 for value in parts)
        return count, seconds

    target = CallTarget("loaded", "digest-loaded", cast("Any", SimpleNamespace()))
    observe.accepted("tenant", [Prompt(target, b"", 7, 9)])
    merges, others = loads(observe.MERGES, "host"), loads(OTHER, "store")
    observe.adapter_event(m.AdapterEvent(kind="staged", digest=target.digest, ms=200.0))
    for ms in (30.0, 50.0):
        observe.adapter_event(m.AdapterEvent(kind="resident", digest=target.digest, ms=ms))
    observe.adapter_event(m.AdapterEvent(kind="evicted", digest=target.digest, ms=9.0))
    observe.adapter_event(m.AdapterEvent(kind="staged", digest="nobody asked for it here", ms=500.0))
    observe.adapter_event(m.AdapterEvent(kind="resident", digest="merge-" + "0" * 64, ms=500.0))
    assert loads("loaded", "store") == (1, 0.2)
    assert loads("loaded", "host") == (2, 0.08)
    assert loads(OTHER, "store") == (others[0] + 1, others[1] + 0.5)
    assert loads(observe.MERGES, "host") == merges  # no request used merges, so they have no series


def test_merges_that_clients_invent_have_one_name() -> None:
    target = CallTarget("a,b", "merge-" + "0" * 64, cast("Any", Path()))
    assert observe.name_of(target) == observe.MERGES

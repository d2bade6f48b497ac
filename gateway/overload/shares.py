"""Round-robin selection of work by tenant, so that a tenant with thousands of items delays no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def shares(values: Sequence[T], tenant_of: Callable[[T], str], most: int) -> tuple[list[T], list[T]]:
    """Return the values to process now, round-robin by tenant and at most `most` of each, and the remaining ones.

    Each tenant's values stay in order.
    """
    by_tenant: dict[str, list[T]] = {}
    for value in values:
        by_tenant.setdefault(tenant_of(value), []).append(value)
    rounds = range(min(most, max(map(len, by_tenant.values()), default=0)))
    now = [own[turn] for turn in rounds for own in by_tenant.values() if turn < len(own)]
    return now, [value for own in by_tenant.values() for value in own[most:]]

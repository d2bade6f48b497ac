"""Which of many pieces of work are done now: tenants take turns, so that one with thousands delays no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def shares(values: Sequence[T], tenant_of: Callable[[T], str], most: int) -> tuple[list[T], list[T]]:
    """Return what is done now, by turns of tenants and at most `most` of each, and what waits for the next time.

    What one tenant has stays in its order.
    """
    by_tenant: dict[str, list[T]] = {}
    for value in values:
        by_tenant.setdefault(tenant_of(value), []).append(value)
    rounds = range(min(most, max(map(len, by_tenant.values()), default=0)))
    now = [own[turn] for turn in rounds for own in by_tenant.values() if turn < len(own)]
    return now, [value for own in by_tenant.values() for value in own[most:]]

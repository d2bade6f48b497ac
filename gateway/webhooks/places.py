"""Slots shared by tenants, so that no tenant takes all of them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class TenantSlots:
    """A number of slots, the last quarter of which is reserved for tenants without any."""

    def __init__(self, most: int, most_of_one: int) -> None:
        """most: maximum of all tenants. most_of_one: maximum per tenant."""
        self.most = most
        self.most_of_one = most_of_one
        self._taken: Counter[str] = Counter()

    @property
    def num_taken(self) -> int:
        """Number of slots taken by all tenants."""
        return self._taken.total()

    def of(self, tenant: str) -> int:
        """Return how many slots a tenant has taken."""
        return self._taken[tenant]

    def room(self, tenant: str) -> int:
        """Return how many more slots a tenant may take."""
        left, has = self.most - self.num_taken, self._taken[tenant]
        if not has and left > 0:
            return max(1, min(self.most_of_one, left - self.most // 4))
        return max(0, min(self.most_of_one - has, left - self.most // 4))

    def take(self, tenant: str) -> None:
        """Take a slot for a tenant that has room."""
        self._taken[tenant] += 1

    def leave(self, tenant: str) -> None:
        """Release a slot."""
        self._taken[tenant] -= 1
        if not self._taken[tenant]:
            del self._taken[tenant]

    @contextmanager
    def held(self, tenant: str) -> Iterator[bool]:
        """Hold a slot during the block, if the tenant has room; yield whether it has."""
        has_room = self.room(tenant) > 0
        if has_room:
            self.take(tenant)
        try:
            yield has_room
        finally:
            if has_room:
                self.leave(tenant)


class PlacesByHost:
    """Slots per receiver; an unused receiver takes no memory."""

    def __init__(self, most: int, most_of_one: int) -> None:
        """most: maximum per receiver. most_of_one: maximum per tenant and receiver."""
        self.most = most
        self._limits = most, most_of_one
        self._places: dict[str, TenantSlots] = {}

    def __len__(self) -> int:
        """Return the number of receivers at which slots are taken."""
        return len(self._places)

    @contextmanager
    def held(self, host: str, tenant: str) -> Iterator[bool]:
        """Hold a slot at a receiver during the block, if the tenant has room; yield whether it has."""
        places = self._places.setdefault(host, TenantSlots(*self._limits))
        try:
            with places.held(tenant) as has_room:
                yield has_room
        finally:
            if not places.num_taken:
                self._places.pop(host, None)

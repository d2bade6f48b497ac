"""Slots that tenants share: none takes so many that another finds none. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class TenantSlots:
    """A number of slots, of which the last quarter is for tenants that have none yet."""

    def __init__(self, most: int, most_of_one: int) -> None:
        """most: of all tenants. most_of_one: of one tenant."""
        self.most = most
        self.most_of_one = most_of_one
        self._taken: Counter[str] = Counter()

    @property
    def num_taken(self) -> int:
        """The taken slots of all tenants."""
        return self._taken.total()

    def of(self, tenant: str) -> int:
        """Return how many slots a tenant has."""
        return self._taken[tenant]

    def room(self, tenant: str) -> int:
        """Return how many more slots a tenant may take."""
        left, has = self.most - self.num_taken, self._taken[tenant]
        if not has and left > 0:
            return max(1, min(self.most_of_one, left - self.most // 4))
        return max(0, min(self.most_of_one - has, left - self.most // 4))

    def take(self, tenant: str) -> None:
        """Take a slot for a tenant, which has room."""
        self._taken[tenant] += 1

    def leave(self, tenant: str) -> None:
        """Release a slot."""
        self._taken[tenant] -= 1
        if not self._taken[tenant]:
            del self._taken[tenant]

    @contextmanager
    def held(self, tenant: str) -> Iterator[bool]:
        """Hold a slot within the block, if there is room for the tenant; yield whether there is."""
        has_room = self.room(tenant) > 0
        if has_room:
            self.take(tenant)
        try:
            yield has_room
        finally:
            if has_room:
                self.leave(tenant)


class PlacesByHost:
    """Slots at each of many receivers; an unused receiver takes no memory."""

    def __init__(self, most: int, most_of_one: int) -> None:
        """most: at one receiver. most_of_one: of one tenant there."""
        self.most = most
        self._limits = most, most_of_one
        self._places: dict[str, TenantSlots] = {}

    def __len__(self) -> int:
        """Return the number of receivers at which slots are taken."""
        return len(self._places)

    @contextmanager
    def held(self, host: str, tenant: str) -> Iterator[bool]:
        """Hold a slot at a receiver within the block, if there is room for the tenant; yield whether there is."""
        places = self._places.setdefault(host, TenantSlots(*self._limits))
        try:
            with places.held(tenant) as has_room:
                yield has_room
        finally:
            if not places.num_taken:
                self._places.pop(host, None)

"""Which adapters are in the pool, and the pages and slot of each. Pure: `PoolWeights` copies the weights.

Pages are counted in groups with a page space each (attention, MLP, other, extras): an adapter takes pages only where it
has weights, as many as its actual rank needs. Eviction follows GDSF (Cherkasova, "Improving WWW Proxies Performance
with Greedy-Dual-Size-Frequency Caching Policy", 1998): recency, and frequency times reload seconds per byte. Adapters
needed by requests in the fleet's queue are evicted last.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Container, Iterable, Sequence, Set
from dataclasses import dataclass, field


@dataclass(slots=True)
class Resident:
    """An adapter's slot and pages in the pool."""

    digest: str
    slot: int
    pages: list[list[int]]  # page numbers by group
    num_bytes: int
    refs: int = 0  # running requests that use it
    pinned: bool = False
    visible: bool = False  # whether its weights are loaded, so that steps may use the slot
    uses: int = 0  # references taken since it was loaded
    priority: float = 0.0  # the lowest is evicted first


@dataclass(slots=True)
class PagePool:
    """The pages and slots of one adapter pool. Adapters are identified by digest."""

    capacity: Sequence[int]  # pages by group
    page_bytes: Sequence[int]  # bytes of a page by group
    num_slots: int
    cost: Callable[[str], float] = field(default=lambda _digest: 1.0)  # seconds to reload an adapter
    residents: dict[str, Resident] = field(default_factory=dict[str, Resident], init=False)
    pins: set[str] = field(default_factory=set[str], init=False)  # adapters that stay once they are in the pool
    queued: Set[str] = field(default=frozenset(), init=False)  # adapters that are evicted last
    num_ever_used: list[int] = field(init=False)  # pages by group: the first ones, since low pages are taken first
    _free_pages: list[list[int]] = field(init=False)
    _free_slots: list[int] = field(init=False)
    _clock: float = field(default=0.0, init=False)  # highest priority of an evicted adapter: ages the others

    def __post_init__(self) -> None:
        self._free_pages = [list(range(num)) for num in self.capacity]  # heaps: low pages first, to touch less memory
        self.num_ever_used = [0] * len(self.capacity)
        self._free_slots = list(range(self.num_slots))

    @property
    def total_bytes(self) -> int:
        """Size of all pages, in bytes."""
        return sum(num * size for num, size in zip(self.capacity, self.page_bytes, strict=True))

    @property
    def free_bytes(self) -> int:
        """Size of the pages that no adapter holds, in bytes."""
        return sum(len(free) * size for free, size in zip(self._free_pages, self.page_bytes, strict=True))

    def bytes_of(self, num_pages: Sequence[int]) -> int:
        """Return the bytes of `num_pages` by group."""
        return sum(num * size for num, size in zip(num_pages, self.page_bytes, strict=True))

    def can_ever_hold(self, num_pages: Sequence[int]) -> bool:
        """Return whether an adapter of `num_pages` by group fits into the empty pool."""
        return all(num <= have for num, have in zip(num_pages, self.capacity, strict=True))

    def can_hold_beside_pins(self, num_pages: Sequence[int]) -> bool:
        """Return whether an adapter of `num_pages` by group fits beside the pinned adapters."""
        slots, pages = self._pinned()
        return slots < self.num_slots and all(
            num <= have - pinned for num, have, pinned in zip(num_pages, self.capacity, pages, strict=True)
        )

    def can_pin(self, digest: str, num_pages: Sequence[int]) -> bool:
        """Return whether the pinned adapters and this one take at most half of the slots and of each group's pages."""
        slots, pages = self._pinned(but=digest)
        return 2 * (slots + 1) <= self.num_slots and all(
            2 * (pinned + num) <= have or not num
            for num, have, pinned in zip(num_pages, self.capacity, pages, strict=True)
        )

    def _pinned(self, but: str = "") -> tuple[int, list[int]]:
        """Return the slots, and pages by group, held by pinned adapters other than `but`."""
        held = [resident for resident in self.residents.values() if resident.pinned and resident.digest != but]
        return len(held), [sum(len(resident.pages[g]) for resident in held) for g in range(len(self.capacity))]

    def set_pinned(self, digest: str, pinned: bool) -> None:
        """Set whether an adapter must stay once it is in the pool. It is pinned only if `can_pin`."""
        (self.pins.add if pinned else self.pins.discard)(digest)
        if resident := self.residents.get(digest):
            resident.pinned = pinned and self.can_pin(digest, [len(pages) for pages in resident.pages])

    def reserve(self, digest: str, num_pages: Sequence[int], keep: Container[str] = ()) -> dict[str, int] | None:
        """Give an adapter a slot and pages, not visible yet, evicting others if necessary.

        Adapters in use, pinned, in `keep` or not visible yet are not evicted. Return the bytes of each evicted adapter
        by digest; None, with nothing changed, if space is insufficient. Raises ValueError if the adapter is in the
        pool.
        """
        if digest in self.residents:
            raise ValueError(f"adapter {digest:.12} is in the pool already")
        victims = self._choose(num_pages, [r for r in self._movable(keep) if r.refs == 0])
        if victims is None:
            return None
        for victim in victims:
            self._clock = max(self._clock, victim.priority)
            self.remove(victim.digest)
        pages = [[heapq.heappop(free) for _ in range(n)] for free, n in zip(self._free_pages, num_pages, strict=True)]
        for group, own in enumerate(pages):
            if own:
                self.num_ever_used[group] = max(self.num_ever_used[group], own[-1] + 1)
        resident = Resident(digest, heapq.heappop(self._free_slots), pages, self.bytes_of(num_pages))
        resident.pinned = digest in self.pins and self.can_pin(digest, num_pages)
        self.residents[digest] = resident
        self._touch(resident)
        return {victim.digest: victim.num_bytes for victim in victims}

    def blockers(self, num_pages: Sequence[int], keep: Container[str] = ()) -> list[str]:
        """Return the adapters in use whose requests must end before an adapter of `num_pages` fits."""
        victims = self._choose(num_pages, self._movable(keep)) or []
        return [victim.digest for victim in victims if victim.refs]

    def _movable(self, keep: Container[str]) -> list[Resident]:
        """Return the adapters that may be evicted once no request uses them; jobs still write to invisible ones."""
        return [r for r in self.residents.values() if r.visible and not r.pinned and r.digest not in keep]

    def _choose(self, num_pages: Sequence[int], candidates: Iterable[Resident]) -> list[Resident] | None:
        """Return the lowest-priority candidates whose eviction frees enough, None if even all do not."""
        lacking = [num - len(free) for num, free in zip(num_pages, self._free_pages, strict=True)]
        lacks_slot = not self._free_slots
        victims: list[Resident] = []
        for resident in sorted(candidates, key=lambda resident: (resident.digest in self.queued, resident.priority)):
            if not lacks_slot and all(num <= 0 for num in lacking):
                break
            if lacks_slot or any(num > 0 and pages for num, pages in zip(lacking, resident.pages, strict=True)):
                victims.append(resident)
                lacks_slot = False
                lacking = [num - len(pages) for num, pages in zip(lacking, resident.pages, strict=True)]
        return None if lacks_slot or any(num > 0 for num in lacking) else victims

    def remove(self, digest: str) -> None:
        """Free an adapter's slot and pages, to which no job may be writing. Raises ValueError while it is in use."""
        resident = self.residents[digest]
        if resident.refs:
            raise ValueError(f"adapter {digest:.12} is in use")
        del self.residents[digest]
        heapq.heappush(self._free_slots, resident.slot)
        for free, pages in zip(self._free_pages, resident.pages, strict=True):
            for page in pages:
                heapq.heappush(free, page)

    def publish(self, digest: str) -> None:
        """Make an adapter visible: its weights are loaded."""
        self.residents[digest].visible = True

    def acquire(self, digest: str) -> int | None:
        """Add a reference and return the slot; None if the adapter is not visible."""
        resident = self.residents.get(digest)
        if resident is None or not resident.visible:
            return None
        resident.refs += 1
        resident.uses += 1
        self._touch(resident)
        return resident.slot

    def release(self, digest: str) -> None:
        """Drop a reference that `acquire` added."""
        self.residents[digest].refs -= 1

    def _touch(self, resident: Resident) -> None:
        """Update an adapter's priority after a use."""
        value = max(resident.uses, 1) * self.cost(resident.digest)
        resident.priority = self._clock + value / max(resident.num_bytes, 1)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every slot and page is free or held by exactly one adapter."""
        residents = self.residents.values()
        slots = sorted([*self._free_slots, *(resident.slot for resident in residents)])
        if slots != list(range(self.num_slots)):
            raise AssertionError(f"slots are lost or held twice: {slots}")
        for group, num in enumerate(self.capacity):
            held = [page for resident in residents for page in resident.pages[group]]
            if sorted([*self._free_pages[group], *held]) != list(range(num)):
                raise AssertionError(f"pages of group {group} are lost or held twice")
        if any(resident.refs < 0 or (resident.refs and not resident.visible) for resident in residents):
            raise AssertionError("references do not match what is visible")

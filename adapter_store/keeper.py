"""Sees to it that workers hold what is pinned or preloaded: compares their beats with what is wanted, orders the rest.

Level-triggered: a worker that has just joined, a name that stands for something else now, a lost order, all are
differences that the next look finds. Orders may be given twice, so that every store may do it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping

from adapter_store.catalogue import Catalogue
from protocol.queue.bus import Bus, now_ms
from protocol.runtime.settings import Settings, names_of
from protocol.wire import messages as m
from protocol.wire.adapter_refs import parse_reference

logger = logging.getLogger(__name__)

AGAIN_S = 5.0
"""Pause before a worker is asked again for a pin that it could not keep or does not know of yet."""

SETTINGS = "settings"


class Keeper:
    """One store's share in what workers should hold."""

    def __init__(self, bus: Bus, catalogue: Catalogue, settings: Settings) -> None:
        self._bus = bus
        self._catalogue = catalogue
        self._pins = names_of(settings.pin)
        self._preload = names_of(settings.preload)
        self._is_set_up = False
        self._pinned_s: dict[tuple[str, str], float] = {}  # (wid, digest) -> when its pin was ordered, monotonic
        self._fetched: set[tuple[str, str]] = set()  # (wid, digest) whose preload was ordered

    async def tick(self) -> None:
        """Look once."""
        if not self._is_set_up:
            await self._set_up()
            self._is_set_up = True
        pins = await self._bus.adapters.pins()
        if not pins and not self._preload and not self._pinned_s:
            return
        beats = {wid: beat for wid, beat in (await self._bus.members.worker_beats()).items() if beat is not None}
        orders = self.orders(beats, self._digests(pins), self._digests(self._preload), time.monotonic())
        if orders:
            await self._bus.streams.tell(orders)

    async def _set_up(self) -> None:
        """Make the settings' wishes the fleet's; those of earlier settings end."""
        for name, by in (await self._bus.adapters.pins()).items():
            if by == SETTINGS and name not in self._pins:
                await self._bus.adapters.unpin(name)
        for name in self._pins:
            await self._bus.adapters.pin(name, SETTINGS)
        for name in dict.fromkeys((*self._pins, *self._preload)):
            reference = parse_reference(name)
            if reference is None or name in self._catalogue.aliases:
                continue
            known = await self._bus.adapters.registration(name)
            if known is None or known.on_request:
                await self._bus.adapters.register(m.Registration(name=name, source=reference.source, asked_ms=now_ms()))

    def _digests(self, names: Iterable[str]) -> set[str]:
        """Return the contents that names stand for, as far as they are here."""
        found = (self._catalogue.aliases.get(name) for name in names)
        return {alias.digest for alias in found if alias is not None and alias.state == "on_disk"}

    def orders(
        self, beats: Mapping[str, m.WorkerBeat], pinned: set[str], preloaded: set[str], now_s: float
    ) -> list[tuple[str, m.Control]]:
        """Return what workers have to be told, given their beats and what all of them should hold."""
        orders: list[tuple[str, m.Control]] = []
        for wid, beat in beats.items():
            for digest in sorted(pinned):
                asked_s = self._pinned_s.get((wid, digest), -AGAIN_S)
                if beat.pinned.get(digest) != "" and now_s >= asked_s + AGAIN_S:
                    self._pinned_s[wid, digest] = now_s
                    orders.append((wid, m.Control(kind="pin", digest=digest)))
            for digest in sorted(beat.pinned.keys() - pinned):
                orders.append((wid, m.Control(kind="unpin", digest=digest)))
            here = {*beat.resident, *beat.host, *beat.loading}
            for digest in sorted(preloaded - pinned - here):
                if (wid, digest) not in self._fetched:
                    self._fetched.add((wid, digest))
                    orders.append((wid, m.Control(kind="prefetch", digest=digest)))
        self._pinned_s = {key: at_s for key, at_s in self._pinned_s.items() if key[0] in beats and key[1] in pinned}
        self._fetched = {key for key in self._fetched if key[0] in beats and key[1] in preloaded}
        return orders

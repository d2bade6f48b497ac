"""Makes workers hold the adapters of their base that are pinned or preloaded.

Each tick compares the workers' heartbeats with what they should hold, and sends control messages for the differences.
So the next tick corrects a worker that has just joined, a name with new content, or a lost message. The messages are
idempotent, so every store of a fleet may send them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping

from adapter_store.catalogue import Catalogue
from protocol.queue.bus import Bus, now_ms
from protocol.runtime.adapter_refs import parse_reference
from protocol.runtime.settings import Settings, names_of
from protocol.wire import messages as m

logger = logging.getLogger(__name__)

REPEAT_S = 5.0
"""Seconds before a pin is sent again to a worker that could not keep it or does not report it yet."""

SETTINGS = "settings"
"""Origin of a pin that comes from the settings instead of the API."""

Content = tuple[str, str]
"""(digest, name of the base with which it is served); the name is "" in a fleet with one base."""


class PinController:
    """Sends pins, unpins and prefetches to the workers of one fleet."""

    def __init__(self, bus: Bus, catalogue: Catalogue, settings: Settings) -> None:
        self._bus = bus
        self._catalogue = catalogue
        self._pins = names_of(settings.pin)
        self._preload = names_of(settings.preload)
        self._is_set_up = False
        self._pinned_s: dict[tuple[str, str], float] = {}  # (wid, digest) -> monotonic time when its pin was last sent
        self._fetched: set[tuple[str, str]] = set()  # (wid, digest) whose prefetch was sent

    async def tick(self) -> None:
        """Compare once, and send the missing messages."""
        if not self._is_set_up:
            await self._set_up()
            self._is_set_up = True
        pins = await self._bus.adapters.pins()
        if not pins and not self._preload and not self._pinned_s:
            return
        beats = {wid: beat for wid, beat in (await self._bus.members.worker_beats()).items() if beat is not None}
        pinned, preloaded = self._digests(pins), self._digests(self._preload)
        messages = self.messages(beats, pinned, preloaded, time.monotonic())
        if messages:
            await self._bus.streams.tell(messages)

    async def _set_up(self) -> None:
        """Pin and register the names in the settings; remove the pins of earlier settings."""
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

    def _digests(self, names: Iterable[str]) -> set[Content]:
        """Return the contents of those names that are on a store's disk."""
        found = (self._catalogue.aliases.get(name) for name in names)
        return {(alias.digest, alias.base) for alias in found if alias is not None and alias.state == "on_disk"}

    def messages(
        self, beats: Mapping[str, m.WorkerBeat], all_pinned: set[Content], all_preloaded: set[Content], now_s: float
    ) -> list[tuple[str, m.Control]]:
        """Return (wid, control message) pairs to send now, and remember them as sent.

        beats: the workers' latest heartbeats by wid. all_pinned, all_preloaded: what every worker of the content's base
        should hold. now_s: monotonic time.
        """
        messages: list[tuple[str, m.Control]] = []
        for wid, beat in beats.items():
            pinned, preloaded = _of_base(beat, all_pinned), _of_base(beat, all_preloaded)
            for digest in sorted(pinned):
                sent_s = self._pinned_s.get((wid, digest), -REPEAT_S)
                if beat.pinned.get(digest) != "" and now_s >= sent_s + REPEAT_S:
                    self._pinned_s[wid, digest] = now_s
                    messages.append((wid, m.Control(kind="pin", digest=digest)))
            for digest in sorted(beat.pinned.keys() - pinned):
                messages.append((wid, m.Control(kind="unpin", digest=digest)))
            here = {*beat.resident, *beat.host, *beat.loading}
            for digest in sorted(preloaded - pinned - here):
                if (wid, digest) not in self._fetched:
                    self._fetched.add((wid, digest))
                    messages.append((wid, m.Control(kind="prefetch", digest=digest)))
        kept = {digest for digest, _ in all_pinned}
        self._pinned_s = {key: at_s for key, at_s in self._pinned_s.items() if key[0] in beats and key[1] in kept}
        kept = {digest for digest, _ in all_preloaded}
        self._fetched = {key for key in self._fetched if key[0] in beats and key[1] in kept}
        return messages


def _of_base(beat: m.WorkerBeat, contents: set[Content]) -> set[str]:
    """Return the digests of the contents for a worker's base."""
    return {digest for digest, base in contents if beat.is_of(base)}

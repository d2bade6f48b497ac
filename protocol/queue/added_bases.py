"""The bases that operators add and remove while the fleet runs, in one record that all services read."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from redis.exceptions import WatchError

from protocol.queue.connection.redis_client import Client
from protocol.wire import messages as m
from protocol.wire.clock import now_ms
from protocol.wire.codec import decode_record
from protocol.wire.errors import Conflict, NotFound
from protocol.wire.keys import Keys

MAX_REMOVED = 64
"""How many names of removed bases are remembered, the latest ones. By the time a name is forgotten, requests queued for
it have ended, unless that many bases are removed within seconds.
"""


def decoded(raw: bytes | None) -> m.AddedBases:
    """Return the decoded record, an empty one for None. Raises UnreadableRecord, or NewerRecord for a newer form."""
    return decode_record(raw, m.AddedBases) if raw else m.AddedBases()


def added(known: m.AddedBases, name: str, model: str, now: int, most: int) -> m.AddedBases:
    """Return the record with one more base, unchanged if it has this base already. now: unix ms. Pure.

    Raises Conflict if another base has the name or the model, or if there are `most` bases already.
    """
    there = known.bases.get(name)
    if there is not None and there.model == model:
        return known
    if there is not None:
        raise Conflict(f"the base {name} was added with the model {there.model}: remove it first", code="base_exists")
    if twin := next((other for other, base in known.bases.items() if base.model == model), ""):
        raise Conflict(f"the model {model} is the base {twin}: name each base model once", code="base_exists")
    if len(known.bases) >= most:
        raise Conflict(f"no more than {most} bases can be added to those of the settings", code="too_many_bases")
    bases = known.bases | {name: m.AddedBase(model=model, added_ms=now)}
    return msgspec.structs.replace(known, bases=bases, removed=[one for one in known.removed if one != name])


def removed(known: m.AddedBases, name: str) -> m.AddedBases:
    """Return the record without a base. Raises NotFound. Pure."""
    if name not in known.bases:
        raise NotFound(f"no base {name:.200} was added to this fleet", code="base_not_found")
    bases = {other: base for other, base in known.bases.items() if other != name}
    gone = [*(one for one in known.removed if one != name), name][-MAX_REMOVED:]
    return msgspec.structs.replace(known, bases=bases, removed=gone)


class AddedBaseRecord:
    """The record in the queue. Concurrent changes are applied one after another."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self._redis = client
        self._key = keys.added_bases

    async def get(self) -> m.AddedBases:
        """Return the added bases with their models, and the names of removed ones."""
        return decoded(await self._redis.get(self._key))

    async def add(self, name: str, model: str, most: int) -> bool:
        """Add a base; return whether it is new. Raises as `added`."""
        return await self._change(lambda known: added(known, name, model, now_ms(), most))

    async def remove(self, name: str) -> None:
        """Remove a base. Raises as `removed`."""
        await self._change(lambda known: removed(known, name))

    async def _change(self, change: Callable[[m.AddedBases], m.AddedBases]) -> bool:
        while True:
            async with self._redis.pipeline(transaction=True) as pipe:
                await pipe.watch(self._key)
                before = decoded(await pipe.get(self._key))
                if (after := change(before)) == before:
                    return False
                pipe.multi()
                pipe.set(self._key, m.encode(after))
                try:
                    await pipe.execute()
                    return True
                except WatchError:  # another gateway wrote in between
                    continue

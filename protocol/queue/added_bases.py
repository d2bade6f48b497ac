"""The bases that operators add and take away while the fleet runs, in one record that all services read."""

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
"""Names of removed bases that are remembered, the last ones. What is queued for one that is forgotten has ended long
before, unless as many are removed within seconds."""


def decoded(raw: bytes | None) -> m.AddedBases:
    """Return the record as it was read. Raises UnreadableRecord, and NewerRecord."""
    return decode_record(raw, m.AddedBases) if raw else m.AddedBases()


def added(known: m.AddedBases, name: str, model: str, now: int, most: int) -> m.AddedBases:
    """Return the record with one base more, the same one if it is there. now: unix ms. Pure.

    Raises Conflict for a name or a model that another one has, and above `most` bases.
    """
    for other, base in known.bases.items():
        if (other, base.model) == (name, model):
            return known
        if other == name or base.model == model:
            text = f"the base {other} was added with the model {base.model}"
            raise Conflict(f"{text}: remove it first, or name each base model once", code="base_exists")
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
    """The record in the queue. Who changes it at the same time as others does so after them."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self._redis = client
        self._key = keys.added_bases

    async def get(self) -> m.AddedBases:
        """Return the bases that are added, with their models, and the names of those that were removed."""
        return decoded(await self._redis.get(self._key))

    async def add(self, name: str, model: str, most: int) -> bool:
        """Add a base; return whether it is new. Raises as `added`."""
        return await self._change(lambda known: added(known, name, model, now_ms(), most))

    async def remove(self, name: str) -> None:
        """Take a base away. Raises as `removed`."""
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
                except WatchError:  # another gateway was faster
                    continue

"""The bases that operators add and remove while the fleet runs, in one record that all services read."""

from __future__ import annotations

from collections.abc import Callable

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


class AddedBaseRecord:
    """The record in the queue. Concurrent changes are applied one after another."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self._redis = client
        self._key = keys.added_bases

    async def get(self) -> m.AddedBases:
        """Return the added bases with their models, and the names of removed ones."""
        return decoded(await self._redis.get(self._key))

    async def add(self, name: str, model: str, most: int) -> bool:
        """Add a base; return whether it is new.

        Raises Conflict if another base has the name or the model, or if there are `most` bases already.
        """

        def change(known: m.AddedBases) -> m.AddedBases:
            for other, base in known.bases.items():
                if (other, base.model) == (name, model):
                    return known
                if other == name or base.model == model:
                    text = f"the base {other} was added with the model {base.model}"
                    raise Conflict(f"{text}: remove it first, or name each base model once", code="base_exists")
            if len(known.bases) >= most:
                text = f"no more than {most} bases can be added to those of the settings"
                raise Conflict(text, code="too_many_bases")
            bases = known.bases | {name: m.AddedBase(model=model, added_ms=now_ms())}
            return m.AddedBases(bases=bases, removed=[one for one in known.removed if one != name])

        return await self._change(change)

    async def remove(self, name: str) -> None:
        """Remove a base. Raises NotFound."""

        def change(known: m.AddedBases) -> m.AddedBases:
            if name not in known.bases:
                raise NotFound(f"no base {name:.200} was added to this fleet", code="base_not_found")
            bases = {other: base for other, base in known.bases.items() if other != name}
            return m.AddedBases(bases=bases, removed=[*known.removed, name][-MAX_REMOVED:])

        await self._change(change)

    async def _change(self, change: Callable[[m.AddedBases], m.AddedBases]) -> bool:
        async def write(pipe: Client) -> bool:
            before = decoded(await pipe.get(self._key))
            after = change(before)
            pipe.multi()
            pipe.set(self._key, m.encode(after))
            return after != before

        return await self._redis.transaction(write, self._key, value_from_callable=True)

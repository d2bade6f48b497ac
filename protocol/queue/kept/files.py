"""The records of files that clients have uploaded or batches have written. Their bytes are in the gateways' storage."""

from __future__ import annotations

from typing import Literal

from protocol.queue.connection.redis_client import Client, read_many
from protocol.queue.scripts import Scripts
from protocol.wire import messages as m
from protocol.wire.codec import decode
from protocol.wire.keys import Keys

Outcome = tuple[Literal["ok", "bytes", "files"], int]


class Files:
    """The files of a fleet, by id."""

    def __init__(self, client: Client, keys: Keys, scripts: Scripts) -> None:
        self._redis = client
        self._keys = keys
        self._scripts = scripts

    async def keep(self, file: m.File, *, max_bytes: int, max_files: int) -> Outcome:
        """Note a file. Returns ("ok", 0), or of its tenant's other files ("bytes", sum) or ("files", number).

        max_bytes, max_files: what the tenant may have in all, and room is held for; 0: no limit.
        """
        return await self._keep(file, m.encode(file), max_bytes, max_files)

    async def hold(self, file: m.File, *, max_bytes: int, max_files: int) -> Outcome:
        """Hold room for a file that is being written, until it is noted, or its `expires_ms`. Returns as `keep`.

        It counts among its tenant's files with its `num_bytes`, which a later call may change, and nobody sees it.
        What is not noted in time is among `expired`, so its bytes are deleted.
        """
        return await self._keep(file, b"", max_bytes, max_files)

    async def _keep(self, file: m.File, record: bytes, max_bytes: int, max_files: int) -> Outcome:
        names = self._names(file.id, file.tenant)
        args = [file.id, file.tenant, record, file.num_bytes, file.created_ms, file.expires_ms, max_bytes, max_files]
        reply = await self._scripts.keep_file(keys=[self._keys.tag, *names], args=args)
        return reply[0].decode(), reply[1] if len(reply) > 1 else 0

    async def get(self, file_id: str, tenant: str) -> m.File | None:
        """Return a tenant's file; None if it is unknown, another's, or has expired."""
        raw = await self._redis.get(self._keys.file(file_id))
        file = decode(raw, m.File) if raw is not None else None
        return file if file is not None and file.tenant == tenant else None

    async def get_many(self, file_ids: list[str]) -> list[m.File]:
        """Return those of these files that are known, in their order."""
        raws = await read_many(self._redis, [self._keys.file(file_id) for file_id in file_ids])
        return [decode(raw, m.File) for raw in raws if raw is not None]

    async def forget(self, file_id: str, tenant: str) -> bool:
        """Forget a file, or give back the room that is held for it. Returns whether the tenant had it."""
        names = self._names(file_id, tenant)
        return bool(await self._scripts.drop_file(keys=[self._keys.tag, *names], args=[file_id, tenant]))

    async def rank(self, tenant: str, file_id: str, *, oldest_first: bool) -> int | None:
        """Return how many of a tenant's files come before one in a list; None when it is unknown."""
        name = self._keys.files(tenant)
        return await (self._redis.zrank(name, file_id) if oldest_first else self._redis.zrevrank(name, file_id))

    async def ids(self, tenant: str, start: int, num: int, *, oldest_first: bool) -> list[str]:
        """Return the ids of a tenant's files `[start, start + num)`, by age."""
        name, end = self._keys.files(tenant), start + num - 1
        found = await (
            self._redis.zrange(name, start, end) if oldest_first else self._redis.zrevrange(name, start, end)
        )
        return [file_id.decode() for file_id in found]

    async def expired(self, now_ms: int, num: int) -> list[tuple[str, str]]:
        """Return at most `num` files that have expired, or that room was held for too long: tenant and id."""
        found = await self._redis.zrangebyscore(self._keys.file_expiry, "-inf", now_ms, start=0, num=num)
        return [_parts(member) for member in found]

    def _names(self, file_id: str, tenant: str) -> list[str]:
        keys = self._keys
        return [keys.file(file_id), keys.files(tenant), keys.file_sizes(tenant), keys.file_expiry]


def _parts(member: bytes) -> tuple[str, str]:
    """Return tenant and id; neither holds a colon."""
    tenant, _, own = member.decode().partition(":")
    return tenant, own

"""The records of files that clients have uploaded or batches have written. Their bytes are in the gateways' storage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from protocol.queue.connection.redis_client import Client, read_many
from protocol.queue.dead_letters import set_aside
from protocol.queue.kept import signatures as lua
from protocol.queue.kept.readable import readable
from protocol.queue.scripts import Scripts
from protocol.wire import messages as m
from protocol.wire.codec import decode_record
from protocol.wire.errors import UnreadableRecord
from protocol.wire.keys import Keys

_MEMBER = re.compile(r"([^:]*):(file-[0-9A-Za-z._-]+)")
Outcome = tuple[Literal["ok", "bytes", "files"], int]


class Files:
    """The files of a fleet, by id."""

    def __init__(self, client: Client, keys: Keys, scripts: Scripts) -> None:
        self._redis = client
        self._keys = keys
        self._scripts = scripts

    async def keep(self, file: m.File, *, max_bytes: int, max_files: int) -> Outcome:
        """Record a file. Returns ("ok", 0), or the tenant's other files as ("bytes", sum) or ("files", number).

        max_bytes, max_files: limits of the tenant's files and reservations; 0: no limit.
        """
        return await self._keep(file, m.encode(file), max_bytes, max_files)

    async def hold(self, file: m.File, *, max_bytes: int, max_files: int) -> Outcome:
        """Reserve space for a file being written, until it is recorded or `expires_ms`. Returns as `keep`.

        The reservation counts as one of the tenant's files with its `num_bytes`, which a later call may change, and is
        not shown. If it is not recorded in time, it is among `expired`, so that its bytes are deleted.
        """
        return await self._keep(file, b"", max_bytes, max_files)

    async def _keep(self, file: m.File, record: bytes, max_bytes: int, max_files: int) -> Outcome:
        keys = self._keys
        call = lua.KeepFile(
            file=keys.file(file.id), files=keys.files(file.tenant), sizes=keys.file_sizes(file.tenant),
            expiry=keys.file_expiry, id=file.id, tenant=file.tenant, record=record, num_bytes=file.num_bytes,
            created_ms=file.created_ms, expires_ms=file.expires_ms, max_bytes=max_bytes, max_files=max_files,
        )  # fmt: skip
        reply = await self._scripts.run(call)
        return reply[0].decode(), reply[1] if len(reply) > 1 else 0

    async def get(self, file_id: str, tenant: str) -> m.File | None:
        """Return a tenant's file; None if unknown, expired or of another tenant. Raises UnreadableRecord."""
        raw = await self._redis.get(self._keys.file(file_id))
        try:
            file = decode_record(raw, m.File) if raw is not None else None
        except UnreadableRecord:
            if await self.rank(tenant, file_id, oldest_first=True) is None:
                return None
            raise
        return file if file is not None and file.tenant == tenant else None

    async def get_many(self, file_ids: list[str]) -> list[m.File]:
        """Return the known and readable ones of these files, in order."""
        raws = await read_many(self._redis, [self._keys.file(file_id) for file_id in file_ids])
        return readable(raws, m.File)

    async def forget(self, file_id: str, tenant: str) -> bool:
        """Delete a file's record or its reservation. Returns whether the tenant had it."""
        keys = self._keys
        call = lua.DropFile(
            file=keys.file(file_id),
            files=keys.files(tenant),
            sizes=keys.file_sizes(tenant),
            expiry=keys.file_expiry,
            id=file_id,
            tenant=tenant,
        )
        return bool(await self._scripts.run(call))

    async def rank(self, tenant: str, file_id: str, *, oldest_first: bool) -> int | None:
        """Return the number of a tenant's files before this one in a list; None if it is unknown."""
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
        """Return (tenant, id) of at most `num` expired files and reservations, the earliest first.

        An invalid entry is set aside: no part of it is used as a path in the storage.
        """
        found = await self._redis.zrangebyscore(self._keys.file_expiry, "-inf", now_ms, start=0, num=num)
        parts = {member: _parts(member) for member in found}
        for member in (member for member, own in parts.items() if own is None):
            reason = "it is no file's name, which looks like TENANT:file-ID"
            await set_aside(self._scripts, self._keys, "file", member, reason, ("ZREM", self._keys.file_expiry, member))
        return [own for own in parts.values() if own is not None]

    async def put_off(self, files: Sequence[tuple[str, str]], at_ms: int) -> None:
        """Make expired files, (tenant, id), due again at `at_ms`."""
        if files:
            members = {f"{tenant}:{file_id}": at_ms for tenant, file_id in files}
            await self._redis.zadd(self._keys.file_expiry, members, xx=True)


def _parts(member: bytes) -> tuple[str, str] | None:
    """Return tenant and id, neither of which contains a colon; None if the entry is invalid."""
    try:
        found = _MEMBER.fullmatch(member.decode())
    except UnicodeDecodeError:
        return None
    return (found[1], found[2]) if found else None

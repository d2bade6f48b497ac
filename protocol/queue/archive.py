"""The queue's side of copying the history of requests into a database.

One gateway copies at a time. The sources are the two history streams of each tenant (`protocol.queue.history`), and the
queue stores how far they have been copied. So an unreachable database only delays the copy. Prompts and outputs are
read from the records of requests, which live two minutes longer than the request.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from protocol.queue.books.usage import owner_of
from protocol.queue.calls import Input
from protocol.queue.connection.redis_client import Client
from protocol.queue.history import Place, entry_of, mark_of
from protocol.runtime.sealing import Seal
from protocol.wire import messages as m
from protocol.wire.codec import decode
from protocol.wire.errors import ProtocolError
from protocol.wire.keys import Keys

LEASE_MS = 10_000
"""How long a dead gateway keeps others from copying. What has been read is written within half of this time."""

_PROBLEM_MS = 60_000

_COPIED = re.compile(rb"\d{1,18}-\d{1,18} \d{1,18}-\d{1,18}")


@dataclass(frozen=True, slots=True)
class Past:
    """An entry of a tenant's history, with its place."""

    tenant: str
    place: Place
    entry: m.HistoryEntry | None  # None: written by another release, unreadable for this one


@dataclass(frozen=True, slots=True)
class NewPast:
    """The oldest entries of a tenant's history that were not copied yet."""

    tenant: str
    found: list[Past]
    at: bytes  # ids of the last entries in `found`, in the form of `Keys.copied`
    has_more: bool
    has_gap: bool  # whether entries were trimmed before they were copied


@dataclass(frozen=True, slots=True)
class TextFound:
    """The prompt and output of a request that has ended, if they were kept."""

    text: m.KeptText | None = None
    is_lost: bool = False  # they should have been kept, but have expired or are unreadable


class Archive:
    """The histories as a source, the lease to copy them, and pending deletions from the copy."""

    def __init__(self, client: Client, keys: Keys, seal: Seal | None) -> None:
        """seal: encrypts texts; None: the database stores them as plain text."""
        self._redis = client
        self._keys = keys
        self._seal = seal

    # ------------------------------------------------------------ who copies

    async def lead(self, gid: str) -> bool:
        """Take or renew the lease to copy, for LEASE_MS. Returns whether this gateway holds it."""
        key = self._keys.history_writer
        if await self._redis.set(key, gid, nx=True, px=LEASE_MS):
            return True
        if await self._redis.get(key) != gid.encode():
            return False
        return bool(await self._redis.pexpire(key, LEASE_MS))

    async def leave(self, gid: str) -> None:
        """Release the lease to copy."""
        if await self._redis.get(self._keys.history_writer) == gid.encode():
            await self._redis.delete(self._keys.history_writer)

    async def tell(self, problem: str) -> None:
        """Publish why nothing can be copied; "": no problem."""
        await self._redis.set(self._keys.history_problem, problem, px=_PROBLEM_MS)

    async def problem(self) -> str:
        """Return the reason that the copying gateway has published, "" for none."""
        return (await self._redis.get(self._keys.history_problem) or b"").decode()

    # ------------------------------------------------------------ what is new

    async def tenants(self, since_ms: int) -> list[str]:
        """Return the tenants whose last request ended, as far as noted, at or after a unix time in ms."""
        found = await self._redis.zrangebyscore(self._keys.histories, since_ms, "+inf")
        return [name.decode(errors="replace") for name in found]  # an invalid name has no history

    async def new(self, tenants: Sequence[str], num: int, since_ms: int) -> list[NewPast]:
        """Return tenants' uncopied entries: the `num` oldest of each stream since a unix time in ms."""
        copied = await self._redis.mget([self._keys.copied(tenant) for tenant in tenants])
        ids: list[list[str]] = []
        pipe = self._redis.pipeline(transaction=False)
        for tenant, raw in zip(tenants, copied, strict=True):
            known = raw if raw is not None and _COPIED.fullmatch(raw) else b"0-0 0-0"  # or another release wrote it
            ids.append([max(at, f"{since_ms}-0", key=_numbers) for at in known.decode().split(" ")])
            for key, at in zip(self._streams(tenant), ids[-1], strict=True):
                pipe.xrange(key, f"({at}", "+", count=num)
        entries: list[Any] = await pipe.execute()
        found: list[NewPast] = []
        for number, tenant in enumerate(tenants):
            streams = entries[2 * number : 2 * number + 2]
            if any(streams):
                found.append(await self._new_of(tenant, streams, ids[number], num, since_ms))
                await asyncio.sleep(0)
        return found

    async def _new_of(self, tenant: str, streams: list[Any], ids: list[str], num: int, since_ms: int) -> NewPast:
        past: list[Past] = []
        has_gap, ends = False, list[str]()
        for key, at, entries in zip(self._streams(tenant), ids, streams, strict=True):
            for raw, fields in entries:
                past.append(Past(tenant, Place(*_numbers(raw.decode()), mark_of(key)), entry_of(fields)))
            ends.append(entries[-1][0].decode() if entries else at)
            # A copied entry is trimmed early only if so many are new that uncopied ones may have been trimmed, too.
            if len(entries) == num and _numbers(at)[0] > since_ms:
                has_gap = has_gap or not await self._redis.xrange(key, at, at)
        return NewPast(tenant, past, " ".join(ends).encode(), any(len(one) == num for one in streams), has_gap)

    def _streams(self, tenant: str) -> tuple[str, str]:
        return self._keys.history(tenant), self._keys.refusals(tenant)

    async def copied(self, found: Sequence[NewPast], keep_ms: int) -> None:
        """Record that these entries have been copied. The record lives twice as long as the entries, `keep_ms`."""
        pipe = self._redis.pipeline(transaction=False)
        for one in found:
            pipe.set(self._keys.copied(one.tenant), one.at, px=2 * keep_ms)
        await pipe.execute()

    # ------------------------------------------------------------ prompts and outputs

    async def texts(self, wanted: Sequence[tuple[str, str]]) -> list[TextFound]:
        """Return the prompts and outputs of ended requests, each given by its tenant and id.

        A text is missing if the gateway keeps no texts, the owner has deleted it, or it belongs to another tenant.
        """
        pipe = self._redis.pipeline(transaction=False)
        for tenant, rid in wanted:
            pipe.hmget(self._keys.req(rid), "sub", "text", "usage", "call", "tokenizer")
            pipe.zscore(self._keys.history_deleted, _deletion(tenant, rid))
        facts = await pipe.execute()
        records: list[list[Any]] = facts[::2]
        heads = [self._head(record, tenant) for record, (tenant, _) in zip(records, wanted, strict=True)]
        for head, num, key in filter(None, heads):
            pipe.hmget(key, "common", str(head.part))
            pipe.getrange(self._keys.tok(head.rid), 0, 4 * num - 1)
        read: Iterator[Any] = iter(await pipe.execute() if any(heads) else ())
        found: list[TextFound] = []
        for one, record, deleted in zip(heads, records, facts[1::2], strict=True):
            if one is None:
                found.append(TextFound(is_lost=record[0] is None and deleted is None))
                continue
            head, num, key = one
            (common, part), output = next(read), next(read)
            tokenizer = (record[4] or b"").decode()
            read_input = Input(common, part, b"", b"", key, head.part, self._seal)
            found.append(_text(head, num, tokenizer, read_input, output))
            await asyncio.sleep(0)  # opening a long sealed prompt takes some tenths of a ms
        return found

    def _head(self, record: list[Any], tenant: str) -> tuple[m.RequestHead, int, str] | None:
        """Return a request, its number of kept tokens and the key of its bodies; None if no text is kept."""
        sub, num, usage, call, _ = record
        if sub is None or num is None or owner_of(usage or b"") != tenant:
            return None
        try:
            return decode(sub, m.RequestHead), int(num), self._keys.body(call.decode())
        except (ProtocolError, ValueError):  # another release wrote it
            return None

    def sealed(self, tenant: str, rid: str, text: m.KeptText) -> bytes:
        """Return a text as it is stored in the database: encoded, and sealed if there is a seal."""
        raw = m.encode(text)
        return raw if self._seal is None else self._seal.seal(raw, self._place(tenant, rid))

    def opened(self, tenant: str, rid: str, raw: bytes) -> m.KeptText:
        """Decode what `sealed` returned. Raises ProtocolError."""
        return decode(raw if self._seal is None else self._seal.open(raw, self._place(tenant, rid)), m.KeptText)

    def _place(self, tenant: str, rid: str) -> str:
        return f"{self._keys.history(tenant)}/{rid}"

    # ------------------------------------------------------------ deletions

    async def deletions(self, num: int) -> list[tuple[str, str]]:
        """Return (tenant, id) of `num` requests whose texts must be deleted from the database, oldest first."""
        members = await self._redis.zrange(self._keys.history_deleted, 0, num - 1)
        return [(tenant, rid) for tenant, _, rid in (one.decode(errors="replace").partition(":") for one in members)]

    async def deleted(self, done: Sequence[tuple[str, str]]) -> None:
        """Record that these texts have been deleted."""
        await self._redis.zrem(self._keys.history_deleted, *(_deletion(*one) for one in done))

    async def is_deleted(self, tenant: str, rid: str) -> bool:
        """Return whether a text is pending deletion and must not be shown."""
        return await self._redis.zscore(self._keys.history_deleted, _deletion(tenant, rid)) is not None


def _deletion(tenant: str, rid: str) -> str:
    return f"{tenant}:{rid}"


def _numbers(entry_id: str) -> tuple[int, int]:
    ms, _, seq = entry_id.partition("-")
    return int(ms), int(seq)


def _text(head: m.RequestHead, num: int, tokenizer: str, read: Input, output: bytes) -> TextFound:
    try:
        body = read.body()
    except ProtocolError:
        return TextFound(is_lost=True)
    if body is None:
        return TextFound(is_lost=True)
    is_text = body.task == "generate"
    prompt, shown = body.prompt[-4 * num :], output if is_text else b""
    return TextFound(m.KeptText(prompt, shown, head.digest, "", is_text, head.base, tokenizer))

"""The typed client of the queue: a request from submission to end, and the queue's other parts.

Every method can safely be repeated.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from redis.exceptions import WatchError

from protocol.queue import signatures as lua
from protocol.queue.adapters import Adapters
from protocol.queue.added_bases import AddedBaseRecord
from protocol.queue.archive import Archive
from protocol.queue.books.api_keys import ApiKeys
from protocol.queue.books.audit import AuditLog
from protocol.queue.books.quota import Quota, standing_of
from protocol.queue.books.usage import UsageBook
from protocol.queue.calls import Input, most_log_bytes, packed_bodies, sealed_bodies, submit_rows
from protocol.queue.connection.line import LOST, Line, NotTakenError
from protocol.queue.connection.redis_client import (
    CONNECTION_ERRORS,
    DiskFull,
    MemoryFull,
    QueueError,
    connect,
    read_many,
)
from protocol.queue.connection.server import Server
from protocol.queue.dead_letters import DeadLetters
from protocol.queue.history import History
from protocol.queue.kept.batches import Batches
from protocol.queue.kept.conversations import MAX_TURNS, StoredConversations
from protocol.queue.kept.files import Files
from protocol.queue.kept.jobs import NewJob, StoredJobs
from protocol.queue.kept.readable import readable
from protocol.queue.kept.webhooks import Webhooks
from protocol.queue.members import Members
from protocol.queue.request_lists import RequestLists
from protocol.queue.request_records import FACTS, facts_of, record_of
from protocol.queue.scripts import FOLDER, Scripts
from protocol.queue.steps import Refused, StepResult, StepRow, refused_rows, step_call
from protocol.queue.streams import Entry, Streams
from protocol.runtime.sealing import Seal
from protocol.wire import messages as m
from protocol.wire.clock import CLOCK, now_ms
from protocol.wire.codec import decode
from protocol.wire.error_codec import error_json
from protocol.wire.errors import LorafleetError, ProtocolError
from protocol.wire.keys import Keys
from protocol.wire.records import Holder, Owned, RequestFacts, RequestRecord

__all__ = [
    "CONNECTION_ERRORS", "Bus", "DiskFull", "Entry", "MemoryFull", "Owned", "QueueError", "Refused", "RequestFacts",
    "StepResult", "StepRow", "decode", "now_ms",
]  # fmt: skip

T = TypeVar("T")
R = TypeVar("R", bound=m.Record)

TIMEOUT_S = 5
"""Maximum seconds to wait for a reply of the queue's server."""

_READ_BYTES = 1 << 17
"""Bytes per read of a large value."""

FROM_OUTSIDE = 1 << 53
"""Epoch of a delta for an end that the owner did not write: greater than the epoch of any owner."""


class Bus:
    """A service's connection to the queue."""

    def __init__(self, url: str, keys: Keys | None = None, *, lua: Path = FOLDER, seal: Seal | None = None) -> None:
        """lua: folder of the scripts. seal: encrypts prompts and other inputs; None: the queue stores plain text."""
        self.url = url
        self.keys = keys or Keys()
        self._redis = connect(url, timeout_s=TIMEOUT_S, timed=True)
        # redis-py's default read timeout of 5 s would abort and silently repeat longer blocking reads.
        self._blocking = connect(url, timeout_s=None, timed=True)
        self._line = Line(self._blocking, TIMEOUT_S)
        self._scripts = Scripts(self._redis, self._line, self.keys.tag, lua)
        self._seal = seal
        self._run_id = ""  # run id of the server, when last read
        self.streams = Streams(self._redis, self._blocking, self.keys, self._scripts)
        self.members = Members(self._redis, self.keys, self._scripts)
        self.added_bases = AddedBaseRecord(self._redis, self.keys)
        self.adapters = Adapters(self._redis, self.keys)
        self.jobs = StoredJobs(self._redis, self.keys, self._scripts, seal)
        self.files = Files(self._redis, self.keys, self._scripts)
        self.batches = Batches(self._redis, self.keys, self._scripts)
        self.conversations = StoredConversations(self._redis, self.keys, self._scripts, seal)
        self.webhooks = Webhooks(self._redis, self.keys, self._scripts)
        self.api_keys = ApiKeys(self._redis, self.keys)
        self.server = Server(self._redis)
        self.audit = AuditLog(self._redis, self.keys, self._scripts)
        self.usage = UsageBook(self._redis, self.keys, self._scripts)
        self.dead_letters = DeadLetters(self._redis, self.keys, self._scripts)
        self.request_lists = RequestLists(self._redis, self.keys)
        self.history = History(self._redis, self.keys)
        self.archive = Archive(self._redis, self.keys, seal)

    async def close(self) -> None:
        """Close all connections."""
        await self._line.close()
        await self.streams.close()
        await self._redis.aclose()
        await self._blocking.aclose()

    async def restarted(self) -> bool:
        """Return whether the server has restarted since the last call. It may then have lost its last second."""
        asked_at_ns = time.monotonic_ns()
        facts = await self._redis.info("server")
        CLOCK.learn(1000 * facts["server_time_usec"], asked_at_ns, time.monotonic_ns())
        before, self._run_id = self._run_id, facts["run_id"]
        return before not in ("", self._run_id)

    async def memory(self) -> tuple[int, int]:
        """Return the used bytes of the server's memory and their limit (`maxmemory`; 0: no limit)."""
        found = await self._redis.info("memory")
        return found["used_memory"] - found.get("mem_not_counted_for_evict", 0), found["maxmemory"]

    # ------------------------------------------------------------ values

    async def get(self, key: str, type_: type[T]) -> T | None:
        """Return the message stored under a key; None if there is none."""
        try:
            raw = await self._line.ask(("GET", key))
        except (*LOST, NotTakenError):  # redis-py reconnects
            raw = await self._redis.get(key)
        return None if raw is None else decode(raw, type_)

    async def get_many(self, keys: Sequence[str], type_: type[R]) -> list[R | None]:
        """Return the records stored under keys, None for each that is missing or unreadable."""
        return [next(iter(readable([raw], type_)), None) for raw in await read_many(self._redis, keys)]

    async def set(self, key: str, value: msgspec.Struct, ttl_ms: int | None = None) -> None:
        """Store a message under a key even while the server's memory is full. ttl_ms: None: no TTL."""
        life = () if ttl_ms is None else ("PX", ttl_ms)
        await self._scripts.write_vital(("SET", key, m.encode(value), *life))

    # ------------------------------------------------------------ a request's life, one script each

    async def submit(
        self,
        cls: str,
        requests: Sequence[tuple[m.RequestHead, m.Body]],
        *,
        max_queued: int,
        idem_key: str = "",
        idem_value: bytes = b"",
        quota: Quota | None = None,
        forced: bool = False,
        job: NewJob | None = None,
        keep_bodies: bool = False,
        usages: Sequence[bytes] = (),
        history: str = "",
        text: int = 0,
        tokenizer: str = "",
    ) -> tuple[Literal["ok", "full", "idem", "limit", "conversation"], Any]:
        """Accept the requests of a call all together, as a background `job` if given, and charge the tenant's quotas.

        Requests that have the same body object share it in the queue. forced: ignore the tenant's limits. keep_bodies:
        keep bodies with the records of ended requests. usages: what each request's end adds to its tenant's usage, see
        `usage.usage_of`; (): nothing. history: retention of their ends, see `kept_for`; "": none. text: maximum tokens
        of each prompt and output that the history keeps. tokenizer: hash of the base's tokenizer, for these tokens.
        Returns ("ok", the tenant's `Standing` or None). If the call is not accepted: ("full", number queued), ("idem",
        earlier value), ("limit", `Standing`), or ("conversation", pending turns; -1: the tenant has no such
        conversation).
        """
        keys, call = self.keys, requests[0][0].rid
        parts, fields = packed_bodies([body for _, body in requests])
        if self._seal is not None:
            fields = sealed_bodies(fields, keys.body(call), self._seal)
        body_bytes, rows = sum(map(len, fields.values())), submit_rows([head for head, _ in requests], parts, usages)
        num_bytes = (
            body_bytes + sum(2 * len(row.sub) for row in rows) + sum(most_log_bytes(body) for _, body in requests)
        )
        record, request = (m.encode(job.job), self.jobs.kept(job)) if job else (b"", b"")
        conversation, limits = job.job.conversation if job else "", quota or Quota("")
        reply = await self._scripts.run(lua.Submit(
            queue=keys.sub(cls), idem=idem_key,
            job=keys.job(job.job.jid) if job else "", jobs=keys.jobs(job.job.tenant) if job else "",
            conversation=keys.conversation(conversation) if conversation else "",
            turns=keys.turns if conversation else "",
            cls=cls, max_queued=max_queued, idem_value=idem_value,
            who=limits.tenant, max_requests=limits.requests_per_minute, max_tokens=limits.tokens_per_minute,
            max_running=limits.concurrency, max_bytes=limits.max_bytes, is_forced=int(forced), num_bytes=num_bytes,
            record_bytes=len(idem_key) + len(idem_value) + len(record) + len(request),
            jid=job.job.jid if job else "", job_record=record, job_request=request,
            job_ttl_ms=job.ttl_ms if job else 0, is_told=int(job.job.background) if job else 0, max_turns=MAX_TURNS,
            body_bytes=body_bytes if keep_bodies or text else 0, history=history, text=text,
            tokenizer=tokenizer if text else "", num_fields=len(fields),
            fields=[lua.BodyField(name=name, value=value) for name, value in fields.items()], rows=rows,
        ))  # fmt: skip
        outcome, *rest = reply[0].decode(), *reply[1:]
        if quota is not None and outcome in ("ok", "limit") and rest:
            return outcome, standing_of(quota, rest)
        return outcome, rest[0] if rest else None

    async def assign(
        self,
        wid: str,
        batch: Sequence[tuple[m.Assigned, int]],
        *,
        leader: str = "",
        placed: Mapping[str, m.Placed] | None = None,
    ) -> tuple[Literal["ok", "deposed", "gone", "stale"], list[str]]:
        """Assign requests to a worker. `batch` pairs each message, with epoch + 1, and the epoch that was read.

        placed: reasons by request id, stored in the requests' records. Returns ("stale", rids) if some requests have
        changed in between; nothing is assigned then.
        """
        rows: list[lua.AssignRow] = []
        for message, epoch in batch:
            why = placed.get(message.rid) if placed else None
            note = m.encode(why) if why is not None else b""
            rows.append(lua.AssignRow(rid=message.rid, epoch=epoch, placed=note))
        call = lua.Assign(
            leader=self.keys.leader,
            work=self.keys.work(wid),
            token=leader,
            wid=wid,
            entry=m.encode([message for message, _ in batch]),
            rows=rows,
        )
        reply = await self._scripts.run(call)
        return reply[0].decode(), [rid.decode() for rid in reply[1:]]

    async def step(self, wid: str, step: StepResult) -> list[Refused]:
        """Write a step. Returns the refused rows; if there are any, nothing was written."""
        if self._seal is None:
            call = step_call(step, wid, self.keys)
        else:
            call = step_call(step, wid, self.keys, self._sealed_prompt)
        return refused_rows(await self._scripts.run(call))

    async def finish(
        self,
        rid: str,
        state: str,
        reason: m.FinishReason,
        error: LorafleetError | None = None,
        *,
        dead_letter: m.DeadLetter | None = None,
    ) -> bool:
        """End a request from outside its worker. Returns False if it had already ended."""
        info = error_json(error)
        delta = m.Delta(rid, FROM_OUTSIDE, -1, finish=reason, error=info)
        order = m.Control(kind="cancel", rid=rid)
        letter = m.encode(dead_letter) if dead_letter is not None else b""
        call = lua.Finish(
            rid=rid, state=state, reason=reason, error=info, deltas=m.encode([delta]), order=m.encode(order),
            ended=_ended(rid), letter=letter,
        )  # fmt: skip
        return bool(await self._scripts.run(call))

    async def cancel(self, rid: str) -> str:
        """Cancel a request. Returns its state after the call, "" if the request is unknown."""
        delta = m.Delta(rid, FROM_OUTSIDE, -1, finish="cancelled")
        order = m.Control(kind="cancel", rid=rid)
        call = lua.Cancel(rid=rid, deltas=m.encode([delta]), order=m.encode(order), ended=_ended(rid))
        return (await self._scripts.run(call)).decode()

    async def forget_call(self, idem_key: str, rids: Sequence[str]) -> None:
        """Delete everything stored about the requests of an ended call, and its Idempotency-Key."""
        await self._scripts.run(lua.Forget(job="", jobs="", idem=idem_key, jid="", tenant="", text_ms=0, rids=rids))

    async def free_idem(self, idem_key: str, record: m.Idempotent) -> None:
        """Delete an Idempotency-Key if it still belongs to the call of `record`."""
        async with self._redis.pipeline(transaction=True) as pipe:
            await pipe.watch(idem_key)
            raw = await pipe.get(idem_key)
            if raw is None or decode(raw, m.Idempotent).rids != record.rids:
                return
            pipe.multi()
            pipe.delete(idem_key)
            with suppress(WatchError):  # another writer changed it
                await pipe.execute()

    async def requeue(
        self, wid: str, rids: Sequence[str], *, counts: bool, max_attempts: int, name: str = ""
    ) -> dict[str, str]:
        """Queue requests of a worker again. name: the worker's. Returns each request's outcome, see `requeue.lua`."""
        call = lua.Requeue(wid=wid, has_died=int(counts), name=name, max_attempts=max_attempts, rids=rids)
        reply = await self._scripts.run(call)
        return {reply[i].decode(): reply[i + 1].decode() for i in range(0, len(reply), 2)}

    async def lead(self, token: str, candidate: str, ttl_ms: int) -> str:
        """Take or keep the scheduler leadership. Returns the leader's token, "" if another scheduler leads."""
        keys = self.keys
        call = lua.Lead(
            leader=keys.leader, leader_epoch=keys.leader_epoch, token=token, candidate=candidate, ttl_ms=ttl_ms
        )
        return (await self._scripts.run(call)).decode()

    async def has_leader(self) -> bool:
        """Return whether any scheduler leads."""
        return bool(await self._redis.exists(self.keys.leader))

    async def repair(self, rid: str, seq0: int, ids: bytes, logprobs: bytes, record_bytes: int) -> int:
        """Append to a log the tokens that a client has seen and Redis has lost. Returns the log's length in tokens."""
        call = lua.Repair(rid=rid, seq0=seq0, ids=ids, logprobs=logprobs, record_bytes=record_bytes)
        return int(await self._scripts.run(call))

    async def position(self, rid: str, *, limit: int = 1000) -> int | None:
        """Return how many requests were submitted before a queued one, at most `limit`; None if it is not queued."""
        ahead = int(await self._scripts.run(lua.Position(rid=rid, limit=limit)))
        return None if ahead < 0 else ahead

    # ------------------------------------------------------------ reading requests

    async def requests(self, rids: Sequence[str]) -> list[RequestFacts | None]:
        """Return the facts of requests, None for each that has expired or never existed."""
        pipe = self._redis.pipeline(transaction=False)
        for rid in rids:
            pipe.hmget(self.keys.req(rid), FACTS)
            pipe.strlen(self.keys.tok(rid))
        replies = await pipe.execute()
        pairs = zip(replies[::2], replies[1::2], strict=True)
        return [facts_of(row, length) if row[0] is not None else None for row, length in pairs]

    async def record(self, rid: str) -> RequestRecord | None:
        """Return everything stored about a request except prompt and tokens; None if it has expired or never existed.

        Raises ProtocolError.
        """
        pipe = self._redis.pipeline(transaction=False)
        pipe.hgetall(self.keys.req(rid))
        pipe.strlen(self.keys.tok(rid))
        fields, length = await pipe.execute()
        return record_of(fields, length) if fields else None

    async def read_log(self, rid: str, seq0: int, record_bytes: int = 0, limit: int = 0) -> m.Delta | None:
        """Return a request's tokens from index `seq0` on, and its end if it has ended, as if delivered just now.

        record_bytes: size of its logprob records, 0 without them. limit: maximum tokens, 0: all; if that many are
        returned, the end is not reported. Returns None if the request is unknown.
        """
        end = seq0 + limit if limit else 0  # GETRANGE takes -1 for the last byte
        pipe = self._redis.pipeline(transaction=False)
        # Read the state first: if it is terminal, the tokens read after it are complete.
        pipe.hmget(self.keys.req(rid), "state", "epoch", "finish", "error", "n_prompt", "cached")
        pipe.getrange(self.keys.tok(rid), seq0 * 4, end * 4 - 1)
        if record_bytes:
            pipe.getrange(self.keys.lp(rid), seq0 * record_bytes, end * record_bytes - 1)
        (state, epoch, finish, error, num_prompt, cached), ids, *rest = await pipe.execute()
        if state is None:
            return None
        ended = state.decode() in m.TERMINAL and (not limit or len(ids) < 4 * limit)
        logprobs = rest[0][: len(ids) // 4 * record_bytes] if rest else b""
        usage = m.RequestUsage(int(num_prompt), seq0 + len(ids) // 4, int(cached or 0)) if ended else None
        return m.Delta(
            rid,
            int(epoch),
            seq0,
            ids,
            logprobs,
            finish=(finish or b"").decode() if ended else "",
            error=(error or b"").decode() if ended else "",
            usage=usage,
        )

    async def prompt_logprobs(self, rid: str, record_bytes: int) -> tuple[bytes, bytes] | None:
        """Return a request's prompt (int32) and the logprob record of each of its tokens; None if not stored."""
        key = self.keys.plp(rid)
        num_bytes = int(await self._redis.strlen(key))
        if self._seal is not None:
            raw = await self._range(key, 0, num_bytes)
            raw = await asyncio.to_thread(self._seal.open, raw, key) if 0 < len(raw) == num_bytes else b""
            size = len(raw) // (4 + record_bytes) * 4
            return (raw[:size], raw[size:]) if raw else None
        size = num_bytes // (4 + record_bytes) * 4
        found = await self._range(key, 0, size), await self._range(key, size, num_bytes)
        return found if num_bytes and sum(map(len, found)) == num_bytes else None  # it may have expired in between

    async def _range(self, key: str, begin: int, end: int) -> bytes:
        """Return bytes [begin, end) of a value, read in slices and joined in a thread: megabytes take milliseconds."""
        slices = range(begin, end, _READ_BYTES)
        parts = [await self._redis.getrange(key, at, min(at + _READ_BYTES, end) - 1) for at in slices]
        return await asyncio.to_thread(b"".join, parts) if len(parts) > 1 else b"".join(parts)

    def _sealed_prompt(self, row: StepRow) -> bytes:
        assert self._seal is not None
        return self._seal.seal(row.prompt_logprobs, self.keys.plp(row.rid))

    async def owned(self, rids: Sequence[str]) -> list[Owned | None]:
        """Return requests with their submissions and owners, None for each that has expired."""
        pipe = self._redis.pipeline(transaction=False)
        for rid in rids:
            pipe.hmget(self.keys.req(rid), "sub", "state", "owner", "epoch", "attempts", "lost")
            pipe.strlen(self.keys.tok(rid))
        replies = await pipe.execute()
        found: list[Owned | None] = []
        for (sub, state, owner, epoch, attempts, lost), length in zip(replies[::2], replies[1::2], strict=True):
            if state is None:
                found.append(None)
                continue
            deaths = [msgspec.json.decode(line, type=m.Death) for line in (lost or b"").splitlines()]
            submit = decode(sub, m.RequestHead)
            found.append(Owned(submit, state.decode(), owner.decode(), int(epoch), int(attempts), deaths, length // 4))
        return found

    async def work_of(self, wid: str) -> list[m.Assigned]:
        """Return everything on a worker's stream, at least its unfinished requests. Unreadable entries are rejected."""
        stream = self.keys.work(wid)
        items: list[m.Assigned] = []
        for entry in await self.streams.entries(stream):
            try:
                items += decode(entry[1][b"b"], list[m.Assigned])
            except (ProtocolError, KeyError) as error:
                await self.streams.reject(stream, entry, repr(error))
        return items

    async def holder(self, rid: str) -> Holder:
        """Return a request's current owner and its adapter; all fields are empty if the request is unknown."""
        found = await self._redis.hmget(self.keys.req(rid), "state", "owner", "digest")
        return Holder(*((value or b"").decode() for value in found))

    async def tokens(self, rid: str) -> bytes | None:
        """Return a request's log (int32 little endian), None if there is none."""
        return await self._redis.get(self.keys.tok(rid))

    async def inputs(self, items: Sequence[m.Assigned | m.RequestHead]) -> list[Input]:
        """Return the input of each request: body, log and logprob records."""
        asked = [lua.InputRow(rid=item.rid, call=item.call or item.rid, part=item.part) for item in items]
        found = await self._scripts.run(lua.Inputs(rows=asked))
        rows = zip(items, found[::4], found[1::4], found[2::4], found[3::4], strict=True)
        return [
            Input(common, part, log, logprobs, self.keys.body(item.call or item.rid), item.part, self._seal)
            for item, common, part, log, logprobs in rows
        ]

    async def scan_assigned(self, chunk: int) -> AsyncIterator[list[tuple[str, str]]]:
        """Yield lists of (rid, owner) of all assigned requests. Scans all keys, about `chunk` per command."""
        prefix, cursor = self.keys.req(""), -1
        while cursor:
            cursor, found = await self._redis.scan(max(cursor, 0), match=f"{prefix}*", count=chunk)
            pipe = self._redis.pipeline(transaction=False)
            for key in found:
                pipe.hmget(key, "state", "owner")
            facts = zip(found, await pipe.execute(), strict=True)
            yield [
                (key.decode().removeprefix(prefix), owner.decode())
                for key, (state, owner) in facts
                if state == b"assigned" and owner
            ]

    async def untimed_keys(self) -> list[str]:
        """Return the keys that have no TTL and are not permanent; a correct queue has none. Scans all keys."""
        keys = [key.decode() async for key in self._redis.scan_iter(count=1000)]
        return [key for key in keys if not self.keys.is_permanent(key) and await self._redis.pttl(key) == -1]

    async def unfinished(self) -> dict[str, str]:
        """Return the state of each request that has not ended. Scans all keys."""
        prefix = self.keys.req("")
        found: dict[str, str] = {}
        async for key in self._redis.scan_iter(match=f"{prefix}*", count=1000):
            state = await self._redis.hget(key, "state")
            if state is not None and state.decode() not in m.TERMINAL:
                found[key.decode().removeprefix(prefix)] = state.decode()
        return found


def _ended(rid: str) -> bytes:
    """Return the message that tells the scheduler of an end which the worker did not write."""
    return m.encode([m.Ended(rid, "", 0, 0)])

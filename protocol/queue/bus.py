"""The typed client of the queue: the only module that talks to Redis. Every method may be called twice safely."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError
from redis.exceptions import TimeoutError as RedisTimeoutError

from protocol.queue.adapters import AdapterBus
from protocol.queue.quota import Quota, standing_of
from protocol.queue.redis_client import connect
from protocol.queue.scripts import FOLDER, Scripts
from protocol.wire import messages as m
from protocol.wire.codec import decode, now_ms
from protocol.wire.errors import Internal, LorafleetError, ProtocolError
from protocol.wire.keys import Keys
from protocol.wire.records import Owned, RequestFacts

logger = logging.getLogger(__name__)

CONNECTION_ERRORS = (RedisConnectionError, RedisTimeoutError, ConnectionError, OSError, NoScriptError)
"""What a lost connection looks like; loops catch it, wait and go on. The last one is that of a server which was started
anew between being given a script and being asked to run it."""

T = TypeVar("T")
Entry = tuple[bytes, dict[bytes, bytes]]  # stream id, fields


def error_info(error: LorafleetError) -> m.ErrorInfo:
    """Put an error on the wire."""
    return m.ErrorInfo(message=error.message, status=error.status, type=error.type, code=error.code, param=error.param)


def error_from(raw: str | bytes) -> LorafleetError:
    """Take an error off the wire; `raw` is the JSON of an `ErrorInfo`."""
    try:
        info = msgspec.json.decode(raw, type=m.ErrorInfo)
    except msgspec.MsgspecError:
        return Internal("the request failed and its error cannot be read")
    error = LorafleetError(info.message, param=info.param, code=info.code)
    error.status, error.type = info.status, info.type
    error.retryable = info.status == 429 or (info.status >= 500 and info.code != Internal.code)
    return error


@dataclass(slots=True)
class StepRow:
    """One request's share of a step: tokens `[seq0, seq0 + len(ids) / 4)`, and its end if it ended."""

    rid: str
    epoch: int
    seq0: int
    ids: bytes = b""  # int32
    logprobs: bytes = b""
    state: str = ""  # "", or a value of messages.TERMINAL
    finish: str = ""
    error: str = ""
    prompt_logprobs: bytes = b""  # with the first token


@dataclass(slots=True)
class Step:
    """What one engine step makes visible."""

    rows: list[StepRow] = field(default_factory=list)
    outs: dict[str, list[m.Delta]] = field(default_factory=dict)  # gateway -> its deltas
    ended: list[m.Ended] = field(default_factory=list)
    done_entries: list[bytes] = field(default_factory=list)  # work entries whose last request this step ends


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that a step script would not write, and why; `length` tells the log's length in tokens."""

    rid: str
    code: Literal["missing", "terminal", "stale", "cancelled", "length"]
    epoch: int
    length: int


class Bus(AdapterBus):
    """A service's connection to the queue."""

    def __init__(self, url: str, keys: Keys | None = None, *, lua: Path = FOLDER) -> None:
        self.url = url
        self.keys = keys or Keys()
        self.redis = connect(url, timeout_s=5)
        # redis-py's default read timeout of 5 s would abort and silently repeat longer blocking reads.
        self._blocking = connect(url, timeout_s=None)
        self._scripts = Scripts(self.redis, lua)
        self._run_id = ""  # of the server, when last asked

    async def close(self) -> None:
        await self.redis.aclose()
        await self._blocking.aclose()

    async def check(self) -> None:
        """Refuse a server that may evict the queue. Raises Internal."""
        policy = (await self.redis.config_get("maxmemory-policy")).get("maxmemory-policy", "noeviction")
        if policy != "noeviction":
            raise Internal(f"Redis has maxmemory-policy {policy}; the queue needs noeviction, or it loses requests")

    async def restarted(self) -> bool:
        """Tell whether the server has started anew since the last call: then it may have lost its last second."""
        before, self._run_id = self._run_id, (await self.redis.info("server"))["run_id"]
        return before not in ("", self._run_id)

    # ------------------------------------------------------------ scripts

    async def submit(
        self,
        cls: str,
        requests: Sequence[tuple[m.Submit, m.Body]],
        *,
        max_queued: int,
        idem_key: str = "",
        idem_value: bytes = b"",
        quota: Quota | None = None,
        forced: bool = False,
    ) -> tuple[Literal["ok", "full", "idem", "limit"], Any]:
        """Accept requests all together, and reserve their use. `forced`: whatever the tenant's limits say.

        Returns ("ok", `Standing` of the tenant, or None); or, not accepted, ("full", queued), ("idem", earlier value)
        or ("limit", `Standing`).
        """
        limits = [quota.tenant, quota.requests_per_minute, quota.tokens_per_minute, quota.concurrency] if quota else []
        args: list[Any] = [cls, max_queued, idem_value, *(limits or ["", 0, 0, 0]), int(forced)]
        for sub, body in requests:
            args += [sub.rid, m.encode(sub), m.encode(body), sub.tenant, sub.digest, sub.gateway, int(sub.stored),
                     sub.num_prompt_tokens, sub.max_new_tokens, sub.deadline_ms]  # fmt: skip
        reply = await self._scripts.submit(keys=[self.keys.tag, self.keys.sub(cls), idem_key], args=args)
        outcome, *rest = reply[0].decode(), *reply[1:]
        if quota is not None and outcome in ("ok", "limit") and rest:
            return outcome, standing_of(quota, rest)
        return outcome, rest[0] if rest else None

    async def assign(
        self, wid: str, batch: Sequence[tuple[m.Assigned, int]], *, leader: str = ""
    ) -> tuple[Literal["ok", "deposed", "gone", "stale"], list[str]]:
        """Hand requests to a worker; `batch` pairs each message (epoch + 1) with the epoch it had when read.

        Returns ("stale", rids) when some are no longer queued as believed; nothing is assigned then.
        """
        args: list[Any] = [leader, wid, m.encode([message for message, _ in batch])]
        for message, epoch in batch:
            args += [message.rid, epoch]
        reply = await self._scripts.assign(keys=[self.keys.tag, self.keys.leader, self.keys.work(wid)], args=args)
        return reply[0].decode(), [rid.decode() for rid in reply[1:]]

    async def step(self, wid: str, step: Step) -> list[Refused]:
        """Write a step. Returns the refused rows; when there are any, nothing at all was written."""
        keys = [self.keys.tag, self.keys.work(wid), self.keys.ended, self.keys.own(wid)]
        reply = await self._scripts.step(keys=keys, args=_step_args(step))
        return [
            Refused(reply[i].decode(), reply[i + 1].decode(), reply[i + 2], reply[i + 3])
            for i in range(0, len(reply), 4)
        ]

    async def finish(
        self,
        rid: str,
        state: str,
        reason: m.FinishReason,
        error: LorafleetError | None = None,
        *,
        dead_letter: m.DeadLetter | None = None,
    ) -> bool:
        """End a request from outside its worker. Returns False when it had already ended."""
        info = msgspec.json.encode(error_info(error)).decode() if error else ""
        delta = m.Delta(rid, 1 << 53, -1, finish=reason, error=info)
        order = m.Control(kind="cancel", rid=rid)
        letter = m.encode(dead_letter) if dead_letter is not None else b""
        args = [rid, state, reason, info, m.encode([delta]), m.encode(order), _ended(rid), letter]
        return bool(await self._scripts.finish(keys=[self.keys.tag], args=args))

    async def cancel(self, rid: str) -> str:
        """Ask for a request's end. Returns its state after the call, "" when it is unknown."""
        delta = m.Delta(rid, 1 << 53, -1, finish="cancelled")
        order = m.Control(kind="cancel", rid=rid)
        args = [rid, m.encode([delta]), m.encode(order), _ended(rid)]
        reply = await self._scripts.cancel(keys=[self.keys.tag], args=args)
        return reply.decode()

    async def requeue(
        self, wid: str, rids: Sequence[str], *, counts: bool, max_attempts: int, name: str = ""
    ) -> dict[str, str]:
        """Queue the requests of a worker, called `name`, again. Returns each one's outcome, see `requeue.lua`."""
        args = [wid, int(counts), name, max_attempts, *rids]
        reply = await self._scripts.requeue(keys=[self.keys.tag], args=args)
        return {reply[i].decode(): reply[i + 1].decode() for i in range(0, len(reply), 2)}

    async def lead(self, token: str, candidate: str, ttl_ms: int) -> str:
        """Take or keep the scheduler leadership. Returns the token while leading, else ""."""
        keys = [self.keys.tag, self.keys.leader, self.keys.leader_epoch]
        return (await self._scripts.lead(keys=keys, args=[token, candidate, ttl_ms])).decode()

    async def repair(self, rid: str, seq0: int, ids: bytes, logprobs: bytes, record_bytes: int) -> int:
        """Append to a log what a client has seen and Redis has lost. Returns the log's length in tokens."""
        args = [rid, seq0, ids, logprobs, record_bytes]
        return int(await self._scripts.repair(keys=[self.keys.tag], args=args))

    async def position(self, rid: str, *, limit: int = 1000) -> int | None:
        """Return how many requests were submitted before a queued one, at most `limit`; None when it is not queued."""
        ahead = int(await self._scripts.position(keys=[self.keys.tag], args=[rid, limit]))
        return None if ahead < 0 else ahead

    # ------------------------------------------------------------ requests

    async def requests(self, rids: Sequence[str]) -> list[RequestFacts | None]:
        """Return the facts of requests, None for one that has expired or never was."""
        fields = ("state", "epoch", "finish", "error", "gateway", "n_prompt", "attempts",
                  "t_submit", "t_first", "t_end", "t_assign")  # fmt: skip
        pipe = self.redis.pipeline(transaction=False)
        for rid in rids:
            pipe.hmget(self.keys.req(rid), fields)
            pipe.strlen(self.keys.tok(rid))
        replies = await pipe.execute()
        found: list[RequestFacts | None] = []
        for row, length in zip(replies[::2], replies[1::2], strict=True):
            if row[0] is None:
                found.append(None)
                continue
            state, epoch, finish, error, gateway, num_prompt, attempts, *times = ((v or b"").decode() for v in row)
            submitted, first, ended, given = (int(t or 0) for t in times)
            found.append(
                RequestFacts(
                    state, int(epoch), finish, error, gateway, int(num_prompt), length // 4, int(attempts or 0),
                    submitted, first, ended, given,
                )
            )  # fmt: skip
        return found

    async def read_log(self, rid: str, seq0: int, record_bytes: int = 0) -> m.Delta | None:
        """Return a request's tokens from index `seq0` on, and its end if it has ended, as if delivered just now.

        `record_bytes` is the size of its logprob records, 0 without them. None when the request is unknown.
        """
        pipe = self.redis.pipeline(transaction=False)
        # The state first: if it is terminal, the tokens read after it are complete.
        pipe.hmget(self.keys.req(rid), "state", "epoch", "finish", "error")
        pipe.getrange(self.keys.tok(rid), seq0 * 4, -1)
        if record_bytes:
            pipe.getrange(self.keys.lp(rid), seq0 * record_bytes, -1)
        (state, epoch, finish, error), ids, *rest = await pipe.execute()
        if state is None:
            return None
        ended = state.decode() in m.TERMINAL
        logprobs = rest[0][: len(ids) // 4 * record_bytes] if rest else b""
        return m.Delta(
            rid, int(epoch), seq0, ids, logprobs,
            finish=(finish or b"").decode() if ended else "", error=(error or b"").decode() if ended else "",
        )  # fmt: skip

    async def prompt_logprobs(self, rid: str) -> tuple[bytes, bytes] | None:
        """Return a request's prompt (int32) and the logprob record of each token; None if they are not there."""
        body, records = await self.redis.mget(self.keys.body(rid), self.keys.plp(rid))
        return None if body is None or records is None else (decode(body, m.Body).prompt, records)

    async def owned(self, rids: Sequence[str]) -> list[Owned | None]:
        """Return requests with their submissions, None for one that has expired."""
        pipe = self.redis.pipeline(transaction=False)
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
            submit = decode(sub, m.Submit)
            found.append(Owned(submit, state.decode(), owner.decode(), int(epoch), int(attempts), deaths, length // 4))
        return found

    async def work_of(self, wid: str) -> list[m.Assigned]:
        """Return everything on a worker's stream: at least what it has not ended. Unreadable entries are rejected."""
        stream = self.keys.work(wid)
        items: list[m.Assigned] = []
        for entry in await self.entries(stream):
            try:
                items += decode(entry[1][b"b"], list[m.Assigned])
            except (ProtocolError, KeyError) as error:
                await self.reject(stream, entry, repr(error))
        return items

    # ------------------------------------------------------------ streams

    async def read(self, last_ids: dict[str, bytes], *, block_ms: int, count: int = 256) -> dict[str, list[Entry]]:
        """Wait for entries after `last_ids` on any of these streams; moves `last_ids` on. {} on timeout."""
        reply = await self._blocking.xread(last_ids, count=count, block=block_ms)
        pairs = reply.items() if isinstance(reply, dict) else reply
        found: dict[str, list[Entry]] = {}
        for name, entries in pairs:
            flat: list[Entry] = list(_flatten(entries))
            if flat:
                found[name.decode()] = flat
                last_ids[name.decode()] = flat[-1][0]
        return found

    async def entries(self, stream: str) -> list[Entry]:
        """Return everything in a stream, oldest first."""
        return list(await self.redis.xrange(stream))

    async def last_id(self, stream: str) -> bytes:
        """Return the id of a stream's newest entry, to read on from there."""
        newest = await self.redis.xrevrange(stream, count=1)
        return newest[0][0] if newest else b"0"

    async def reject(self, stream: str, entry: Entry, reason: str) -> None:
        """Move an entry that cannot be used to the dead letters."""
        logger.error("%s on %s goes to the dead letters: %s", entry[0].decode(), stream, reason)
        letter = m.DeadLetter(reason=reason, stream=stream, raw=entry[1].get(b"b", b""), ms=now_ms())
        pipe = self.redis.pipeline(transaction=True)
        pipe.xdel(stream, entry[0])
        pipe.xadd(self.keys.dlq, {"b": m.encode(letter)}, minid=now_ms() - 604_800_000, approximate=True)
        pipe.expire(self.keys.dlq, 604_800)
        await pipe.execute()

    async def tell(self, orders: Sequence[tuple[str, m.Control]]) -> None:
        """Give workers (wid) orders. Lost when the worker is gone."""
        pipe = self.redis.pipeline(transaction=False)
        oldest = now_ms() - 300_000
        for wid, order in orders:
            pipe.xadd(self.keys.ctl(wid), {"b": m.encode(order)}, nomkstream=True, minid=oldest, approximate=True)
        await pipe.execute()

    # ------------------------------------------------------------ who is there

    async def beat(
        self, key: str, registry: str, member: str, raw: bytes, ttl_ms: int, renew: Iterable[str] = ()
    ) -> bool:
        """Say that `member` lives, and renew the TTL of the streams it reads by 1 h. Returns False if one is gone."""
        pipe = self.redis.pipeline(transaction=False)
        pipe.set(key, raw, px=ttl_ms)
        pipe.zadd(registry, {member: now_ms()})
        for stream in renew:
            pipe.expire(stream, 3600)
        return all((await pipe.execute())[2:])

    async def create_stream(self, stream: str, ttl_s: int) -> None:
        """Make an empty stream with a TTL, so that writers using NOMKSTREAM reach it."""
        pipe = self.redis.pipeline(transaction=True)
        pipe.xadd(stream, {"b": b""})
        pipe.xtrim(stream, maxlen=0, approximate=False)
        pipe.expire(stream, ttl_s)
        await pipe.execute()

    async def delete_stream(self, stream: str, num_entries: int) -> bool:
        """Delete a stream if it still holds just `num_entries`; tell whether it is gone."""
        script = (
            "if redis.call('XLEN', KEYS[1]) ~= tonumber(ARGV[1]) then return 0 end redis.call('DEL', KEYS[1]) return 1"
        )
        return bool(await self.redis.eval(script, 1, stream, num_entries))

    async def leave(self, wid: str) -> None:
        """Take a worker, whose work is handed back, off the register."""
        pipe = self.redis.pipeline(transaction=True)
        of_worker = (self.keys.work, self.keys.own, self.keys.ctl, self.keys.worker_beat)
        pipe.delete(*(key(wid) for key in of_worker))
        pipe.zrem(self.keys.workers, wid)
        await pipe.execute()

    async def keep_stream(self, stream: str, *, ttl_s: int, max_age_ms: int) -> bool:
        """Renew a stream's TTL and drop its entries older than `max_age_ms`. Returns False when it is gone."""
        pipe = self.redis.pipeline(transaction=False)
        pipe.expire(stream, ttl_s)
        pipe.xtrim(stream, minid=now_ms() - max_age_ms, approximate=True)
        return bool((await pipe.execute())[0])

    async def members(self, registry: str, max_age_ms: int | None = None) -> list[str]:
        """Return who is registered, by last beat at most `max_age_ms` ago."""
        low: float | str = "-inf" if max_age_ms is None else now_ms() - max_age_ms
        return [wid.decode() for wid in await self.redis.zrangebyscore(registry, low, "+inf")]

    async def store_urls(self) -> tuple[str, ...]:
        """Return the addresses of the adapter stores that are alive."""
        sids = await self.members(self.keys.stores, 10_000)
        raws = await self.redis.mget([self.keys.store_beat(sid) for sid in sids]) if sids else []
        return tuple(sorted(raw.decode() for raw in raws if raw))

    async def gateways_alive(self) -> dict[str, bool]:
        """Return each registered gateway and whether its beat is there."""
        gids = await self.members(self.keys.gateways)
        if not gids:
            return {}
        raws = await self.redis.mget([self.keys.gateway_beat(gid) for gid in gids])
        return {gid: raw is not None for gid, raw in zip(gids, raws, strict=True)}

    async def forget_gateway(self, gid: str) -> None:
        """Take a dead gateway off the register. Its stream runs out by itself, should it only have slept."""
        await self.redis.zrem(self.keys.gateways, gid)

    async def worker_beats(self) -> dict[str, m.WorkerBeat | None]:
        """Return each registered worker's last beat, None for one whose beat has expired."""
        wids = await self.members(self.keys.workers)
        if not wids:
            return {}
        raws = await self.redis.mget([self.keys.worker_beat(wid) for wid in wids])
        return {wid: _beat(raw) for wid, raw in zip(wids, raws, strict=True)}

    # ------------------------------------------------------------ values

    async def get(self, key: str, type_: type[T]) -> T | None:
        """Return a message stored under a key."""
        raw = await self.redis.get(key)
        return None if raw is None else decode(raw, type_)

    async def set(self, key: str, value: msgspec.Struct, ttl_ms: int | None = None) -> None:
        """Store a message under a key."""
        await self.redis.set(key, m.encode(value), px=ttl_ms)


def _beat(raw: bytes | None) -> m.WorkerBeat | None:
    """Decode a beat; one that cannot be read is none, and must not hide the others."""
    try:
        return decode(raw, m.WorkerBeat) if raw else None
    except ProtocolError:
        logger.exception("a worker's beat cannot be read")
        return None


def _ended(rid: str) -> bytes:
    """Tell the scheduler that a request has ended without a worker."""
    return m.encode([m.Ended(rid, "", 0, "", 0)])


def _flatten(entries: Any) -> Iterable[Entry]:
    """Undo the extra list that RESP3 replies put around a stream's entries."""
    for item in entries:
        if isinstance(item, list) and item and isinstance(item[0], (tuple, list)):
            yield from (tuple(entry) for entry in item)  # type: ignore[misc]
        else:
            yield tuple(item)


def _step_args(step: Step) -> list[Any]:
    """Return the arguments of `step.lua`."""
    rows: list[Any] = []
    logprobs: list[Any] = []
    ends: list[Any] = []
    for row in step.rows:
        rows += (row.rid, str(row.epoch), row.seq0, len(row.ids))
        if row.ids and row.logprobs:
            logprobs += (row.rid, row.seq0, row.logprobs)
        if row.prompt_logprobs:
            logprobs += (row.rid, "prompt", row.prompt_logprobs)
        if row.state:
            ends += (row.rid, row.state, row.finish, row.error)
    ids = b"".join([row.ids for row in step.rows])
    outs = [part for gid, deltas in step.outs.items() for part in (gid, m.encode(deltas))]
    counts = [len(logprobs) // 3, len(ends) // 4, len(step.outs)]
    ended = m.encode(step.ended) if step.ended else b""
    return [msgspec.msgpack.encode(rows), ids, *counts, ended, *logprobs, *ends, *outs, *step.done_entries]

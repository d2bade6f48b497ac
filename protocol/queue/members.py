"""The members of the fleet: heartbeats and registers of workers, gateways and stores."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import msgspec

from protocol.queue import signatures as lua
from protocol.queue.added_bases import decoded
from protocol.queue.connection.redis_client import Client, read_many
from protocol.queue.scripts import Scripts
from protocol.wire import messages as m
from protocol.wire.clock import now_ms
from protocol.wire.codec import decode
from protocol.wire.errors import Conflict, ProtocolError
from protocol.wire.keys import CLASSES, Keys

logger = logging.getLogger(__name__)

STREAM_TTL_S = 3600
MAX_STORE_SILENCE_MS = 10_000

MAX_BASES = 32
"""Maximum number of bases in a fleet. A gateway reads the records of all of them every second."""

MAX_REASON = 500
"""Maximum characters of the reason why a base's worker has not started."""

_BASE = m.encode("base")
"""The encoded name of a heartbeat's first field, the worker's base."""

_BEFORE_BASE = 16
"""Maximum bytes of a heartbeat before the name of that base."""

_FAILED = "\0"
"""First character of the fields of `Keys.bases` that hold reasons of failures; the base's name follows."""


@dataclass(frozen=True, slots=True)
class FleetSummary:
    """The facts about the fleet that admission needs."""

    num_workers: int  # registered, with a recent heartbeat
    bases: list[m.ServedModel]  # the first base first
    failures: dict[str, str]  # base -> why none of its workers has started since the last one was up
    status: m.SchedulerStatus | None
    added: m.AddedBases


class Members:
    """The members of a fleet. Each has a heartbeat, which is a key with a TTL, and an entry in a register."""

    def __init__(self, client: Client, keys: Keys, scripts: Scripts) -> None:
        self._redis = client
        self._keys = keys
        self._scripts = scripts

    # ------------------------------------------------------------ heartbeats and leaving

    async def beat(
        self, key: str, registry: str, member: str, raw: bytes, ttl_ms: int, renew: Iterable[str] = ()
    ) -> bool:
        """Send the heartbeat of `member`, and renew the TTL of `renew`, its streams, to 1 h. False if one is gone."""
        replies = await self._scripts.write_vital(
            ("SET", key, raw, "PX", ttl_ms),
            ("ZADD", registry, now_ms(), member),
            *(("EXPIRE", stream, STREAM_TTL_S) for stream in renew),
        )
        return all(replies[2:])

    async def leave(self, wid: str) -> None:
        """Unregister a worker whose work is handed back, and delete its keys."""
        keys = self._keys
        pipe = self._redis.pipeline(transaction=True)
        pipe.delete(*(key(wid) for key in (keys.work, keys.own, keys.ctl, keys.worker_beat)))
        pipe.zrem(keys.workers, wid)
        await pipe.execute()

    async def silence(self, wid: str) -> None:
        """Delete a worker's heartbeat. As it stays registered, the scheduler declares it dead."""
        await self._redis.delete(self._keys.worker_beat(wid))

    async def leave_gateway(self, gid: str) -> None:
        """Unregister a gateway, and delete its heartbeat and its stream."""
        await self._redis.delete(self._keys.gateway_beat(gid), self._keys.out(gid))
        await self._redis.zrem(self._keys.gateways, gid)

    async def forget_gateway(self, gid: str) -> None:
        """Unregister a dead gateway. Its stream expires by itself, in case the gateway only slept."""
        await self._redis.zrem(self._keys.gateways, gid)

    async def leave_store(self, sid: str) -> None:
        """Unregister a store, and delete its heartbeat."""
        await self._redis.delete(self._keys.store_beat(sid))
        await self._redis.zrem(self._keys.stores, sid)

    async def forget_stores(self, silent_ms: int) -> None:
        """Unregister the stores without a heartbeat for `silent_ms`."""
        await self._redis.zremrangebyscore(self._keys.stores, "-inf", now_ms() - silent_ms)

    async def join(self, beat: m.WorkerBeat, served: m.ServedModel, ttl_ms: int, *, fleet: Sequence[str] = ()) -> str:
        """Register a worker with its first heartbeat; return the name of its base in this fleet.

        That is its own name or, in a fleet of one base, the name under which live workers serve the same weights.
        fleet: names of the bases, if there are several.

        Raises Conflict if:
        - live workers serve another base under its name, or the fleet serves only another base;
        - `fleet` is given, and live workers serve its weights under another name;
        - an operator has removed the base, or there are too many bases.
        """
        keys = self._keys
        while True:
            pipe = self._redis.pipeline(transaction=True)  # one moment: workers that left affect no later records
            pipe.hgetall(keys.bases)
            pipe.zrange(keys.workers, 0, -1)
            pipe.get(keys.added_bases)
            records, wids, added = await pipe.execute()
            others = [wid.decode() for wid in wids if wid.decode() != beat.wid]
            known = {base.name: base for base in _decoded(records)[0]}
            longest = max(len(m.encode(name)) for name in (*known, served.name))
            pipe = self._redis.pipeline(transaction=False)
            for wid in others:  # only the part that names its base: whole heartbeats would be megabytes
                pipe.getrange(keys.worker_beat(wid), 0, _BEFORE_BASE + longest)
            beats = [raw for raw in await pipe.execute() if raw]
            by_operators, names = decoded(added), list(fleet)
            if served.name in by_operators.removed:
                text = f"the base {served.name} was removed from this fleet: `lorafleet bases add` brings it back"
                raise Conflict(text, code="base_not_served")
            if by_operators.bases:  # which a worker's settings do not list; without settings, all known ones are kept
                more = fleet or (known if served.name in by_operators.bases else ())
                names = [served.name, *more, *by_operators.bases]
            base, dropped = joining_of(served, known, names, beats)
            name = base.name
            call = lua.Join(
                bases=keys.bases, workers=keys.workers, worker_beat=keys.worker_beat(beat.wid), wid=beat.wid,
                beat=m.encode(msgspec.structs.replace(beat, base=name)), ttl_ms=ttl_ms, at_ms=now_ms(), name=name,
                known=records.get(name.encode(), b""), served=m.encode(base), num_others=len(others),
                more=[*others, *dropped],
            )  # fmt: skip
            if await self._scripts.run(call) == b"joined":
                return name

    async def note_failure(self, name: str, reason: str, *, keep: bool = False) -> None:
        """Record why no worker of a base has started, until one joins. There may be as many reasons as bases.

        keep: do not replace an existing reason. Nothing is recorded for a removed base, whose worker may not join: the
        base would count as failed when it is added again.
        """
        note = self._redis.hsetnx if keep else self._redis.hset
        by_operators = decoded(await self._redis.get(self._keys.added_bases))
        if name not in by_operators.removed and await self._redis.hlen(self._keys.bases) < 2 * MAX_BASES:
            await note(self._keys.bases, f"{_FAILED}{name}", reason[:MAX_REASON])

    async def forget_failures(self, names: Iterable[str]) -> None:
        """Delete the reasons why bases have not started, as their workers are about to start."""
        await self._redis.hdel(self._keys.bases, *(f"{_FAILED}{name}" for name in names))

    async def bases(self) -> tuple[list[m.ServedModel], dict[str, str]]:
        """Return the bases that workers have reported, the first one first, and base -> why no worker has started.

        Raises ProtocolError.
        """
        return _decoded(await self._redis.hgetall(self._keys.bases))

    async def drop_base(self, name: str) -> None:
        """Delete what workers of a base have reported, unless one of them is registered.

        A worker that joins in between writes its base again (`join.lua`), and then the registered workers are checked
        again.
        """

        async def drop(pipe: Client) -> None:
            beats = await self.worker_beats()
            pipe.multi()
            if all(beat is not None and beat.base != name for beat in beats.values()):
                pipe.hdel(self._keys.bases, name, f"{_FAILED}{name}")

        await self._redis.transaction(drop, self._keys.bases)

    # ------------------------------------------------------------ reading

    async def ids(self, registry: str, max_age_ms: int | None = None) -> list[str]:
        """Return the members of a register by last heartbeat. max_age_ms: maximum age of that; None: any age."""
        low: float | str = "-inf" if max_age_ms is None else now_ms() - max_age_ms
        found = await self._redis.zrangebyscore(registry, low, "+inf")
        return [name for member in found if "\ufffd" not in (name := member.decode(errors="replace"))]

    async def has_beaten(self, registry: str, since_ms: int) -> bool:
        """Return whether any member of a register has sent a heartbeat since a unix time in ms."""
        return bool(await self._redis.zrangebyscore(registry, since_ms, "+inf", start=0, num=1))

    async def worker_beats(self) -> dict[str, m.WorkerBeat | None]:
        """Return the last heartbeat of each registered worker, None if it has expired or is unreadable."""
        wids = await self.ids(self._keys.workers)
        raws = await read_many(self._redis, [self._keys.worker_beat(wid) for wid in wids])
        return {wid: _beat(raw) for wid, raw in zip(wids, raws, strict=True)}

    async def load(self, wids: Iterable[str]) -> tuple[int, int]:
        """Return how many requests wait for a worker, and how many are assigned to workers, at this moment.

        A request is in neither number once its client has received the end, which is written by the script that takes
        the request from its worker.
        """
        pipe = self._redis.pipeline(transaction=True)
        for cls in CLASSES:
            pipe.xlen(self._keys.sub(cls))
        for wid in wids:
            pipe.hlen(self._keys.own(wid))
        nums = await pipe.execute()
        return sum(nums[: len(CLASSES)]), sum(nums[len(CLASSES) :])

    async def gateways_alive(self) -> dict[str, bool]:
        """Return whether each registered gateway has a heartbeat."""
        gids = await self.ids(self._keys.gateways)
        raws = await read_many(self._redis, [self._keys.gateway_beat(gid) for gid in gids])
        return {gid: raw is not None for gid, raw in zip(gids, raws, strict=True)}

    async def gateway_urls(self) -> tuple[str, ...]:
        """Return the addresses of the live gateways."""
        gids = await self.ids(self._keys.gateways)
        raws = await read_many(self._redis, [self._keys.gateway_beat(gid) for gid in gids])
        return tuple(sorted(raw.decode() for raw in raws if raw))

    async def store_urls(self) -> tuple[str, ...]:
        """Return the addresses of the live adapter stores."""
        sids = await self.ids(self._keys.stores, MAX_STORE_SILENCE_MS)
        raws = await read_many(self._redis, [self._keys.store_beat(sid) for sid in sids])
        return tuple(sorted(raw.decode() for raw in raws if raw))

    async def summary(self, max_silence_ms: int) -> FleetSummary:
        """Return the facts that admission needs, in one round trip. Raises ProtocolError."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.zcount(self._keys.workers, now_ms() - max_silence_ms, "+inf")
        pipe.hgetall(self._keys.bases)
        pipe.get(self._keys.status)
        pipe.get(self._keys.added_bases)
        num_workers, records, status, by_operators = await pipe.execute()
        return FleetSummary(
            num_workers,
            *_decoded(records),
            decode(status, m.SchedulerStatus) if status else None,
            decoded(by_operators),
        )


def _decoded(records: Mapping[bytes, bytes]) -> tuple[list[m.ServedModel], dict[str, str]]:
    """Return the bases in `Keys.bases`, the oldest first, and the reasons of `note_failure`. Raises ProtocolError."""
    names = {name.decode(): raw for name, raw in records.items()}
    bases = [_base(raw) for name, raw in names.items() if not name.startswith(_FAILED)]
    failures = {name[1:]: why.decode() for name, why in names.items() if name.startswith(_FAILED)}
    return sorted(bases, key=lambda base: (base.created_ms, base.name)), failures


@lru_cache(maxsize=2 * MAX_BASES)
def _base(raw: bytes) -> m.ServedModel:
    """Decode a base's record. Cached, since many callers read it every second and it seldom changes."""
    return decode(raw, m.ServedModel)


def joining_of(
    served: m.ServedModel, known: Mapping[str, m.ServedModel], fleet: Sequence[str], beats: Sequence[bytes]
) -> tuple[m.ServedModel, list[str]]:
    """Return a joining worker's base record, and the names of bases to delete. Pure.

    known: the recorded bases by name. fleet: names of the bases, if there are several. beats: beginnings of the
    heartbeats of live workers. If a worker of an unrecorded base joins a fleet without live workers, the records of
    bases not in `fleet` are deleted. Raises as `Members.join`.
    """
    begun = [raw.partition(_BASE)[2] for raw in beats]
    live = {name for name in (*known, served.name) if any(raw.startswith(m.encode(name)) for raw in begun)}
    hashed = [one for one in known.values() if one.weights and served.weights and one.is_same(served)]
    twins = [one.name for one in hashed if one.name in live - {served.name}]
    if fleet and twins:
        text = f"this fleet serves the weights of {served.name} as {min(twins)}; name each base model once"
        raise Conflict(text, code="base_named_twice")
    name = next(iter(twins), served.name)
    base = msgspec.structs.replace(served, name=name)
    other = known.get(name, base)
    if name in live:
        if not other.is_same(base):
            raise Conflict(_taken(base, other), code="base_name_taken")
        base = msgspec.structs.replace(base, max_model_len=min(base.max_model_len, other.max_model_len))
    elif beats and not fleet:
        text = f"this fleet serves {', '.join(known)}; {name} cannot join it"
        raise Conflict(f"{text}: a fleet of several bases has --more-models on all services", code="other_base")
    if name in known:
        return msgspec.structs.replace(base, created_ms=other.created_ms), []  # to keep the order of bases
    dropped = [] if beats else [one for one in known if one not in fleet]
    if len(known) - len(dropped) >= MAX_BASES:
        raise Conflict(f"this fleet serves {MAX_BASES} bases, which is the limit; {name} cannot join it")
    return base, dropped


def _taken(mine: m.ServedModel, other: m.ServedModel) -> str:
    """Return why a worker cannot serve its base under a name that live workers use for another base."""
    what = "config or layout" if mine.fingerprint != other.fingerprint else "weights"
    theirs, own = (base.fingerprint if what != "weights" else base.weights for base in (other, mine))
    return (
        f"this fleet serves another base as {mine.name}: the hash of its {what} is {theirs:.12}, here {own:.12};"
        " give this one another --served-name"
    )


def _beat(raw: bytes | None) -> m.WorkerBeat | None:
    """Decode a heartbeat. An unreadable one counts as missing, so that it does not hide the others."""
    try:
        return decode(raw, m.WorkerBeat) if raw else None
    except ProtocolError:
        logger.exception("a worker's heartbeat cannot be read")
        return None

"""The members of the fleet: heartbeats and registers of workers, gateways and stores."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import msgspec
from redis.exceptions import WatchError

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
        - `fleet` is given, and live workers serve its weights under another name or are of an earlier version;
        - an operator has removed the base, or there are too many bases.
        """
        keys = self._keys
        beats: dict[str, bytes] = {}  # beginnings of heartbeats by wid, each read once even if the loop repeats
        while True:
            first, further, wids = await self._raw_bases()
            others = [wid for wid in wids if wid != beat.wid]
            unread = [wid for wid in others if wid not in beats]
            known = {base.name: base for base in _decoded(first, further)}
            beats |= await self._beginnings(unread, max(len(m.encode(name)) for name in (*known, served.name)))
            by_operators = decoded(await self._redis.get(keys.added_bases))
            if served.name in by_operators.removed:
                text = f"the base {served.name} was removed from this fleet: `lorafleet bases add` brings it back"
                raise Conflict(text, code="base_not_served")
            names = _fleet_of(served.name, fleet, by_operators.bases, known)
            joining = joining_of(served, known, names, [beats[wid] for wid in others if wid in beats])
            name = joining.base.name
            call = lua.Join(
                base=keys.base, bases=keys.bases, workers=keys.workers, worker_beat=keys.worker_beat(beat.wid),
                wid=beat.wid, beat=m.encode(msgspec.structs.replace(beat, base=name)), ttl_ms=ttl_ms, at_ms=now_ms(),
                name=name, first_base=first, further=further.get(name.encode(), b""), served=m.encode(joining.base),
                is_first=int(joining.is_first), num_others=len(others), more=[*others, *joining.dropped],
            )  # fmt: skip
            if await self._scripts.run(call) == b"joined":
                return name

    async def _beginnings(self, wids: Sequence[str], longest: int) -> dict[str, bytes]:
        """Return the part of workers' heartbeats that names their base: whole heartbeats would be megabytes.

        longest: bytes of the longest name of a base. Heartbeats of earlier versions, which have the name elsewhere or
        not at all, are returned whole.
        """
        pipe = self._redis.pipeline(transaction=False)
        for wid in wids:
            pipe.getrange(self._keys.worker_beat(wid), 0, _BEFORE_BASE + longest)
        found = {wid: raw for wid, raw in zip(wids, await pipe.execute(), strict=True) if raw}
        old = [wid for wid, raw in found.items() if not _begins_with_base(raw)]
        raws = await read_many(self._redis, [self._keys.worker_beat(wid) for wid in old])
        return found | {wid: raw or b"" for wid, raw in zip(old, raws, strict=True)}

    async def _raw_bases(self) -> tuple[bytes, dict[bytes, bytes], list[str]]:
        """Return the first base's record, b"" if none, the further records by name, and the ids of registered workers.

        All are read at one moment, so that a worker that left earlier does not influence later records.
        """
        pipe = self._redis.pipeline(transaction=True)
        pipe.get(self._keys.base)
        pipe.hgetall(self._keys.bases)
        pipe.zrange(self._keys.workers, 0, -1)
        first, further, wids = await pipe.execute()
        return first or b"", further, [wid.decode() for wid in wids]

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
        first, further, _ = await self._raw_bases()
        return _decoded(first, further), _failures(further)

    async def base_names(self) -> tuple[list[str], list[str]]:
        """Return the names of the reported bases, and of those that have failed to start."""
        pipe = self._redis.pipeline(transaction=True)
        pipe.get(self._keys.base)
        pipe.hkeys(self._keys.bases)
        first, fields = await pipe.execute()
        names = [field.decode() for field in fields]
        served = [_base(first).name] if first else []
        served += [name for name in names if not name.startswith(_FAILED)]
        return served, [name.removeprefix(_FAILED) for name in names if name.startswith(_FAILED)]

    async def drop_base(self, name: str) -> None:
        """Delete what workers of a base have reported, unless one of them is registered.

        A worker that joins in between writes its base again (`join.lua`), and then nothing is deleted.
        """
        keys = self._keys
        async with self._redis.pipeline(transaction=True) as pipe:
            await pipe.watch(keys.base, keys.bases)
            if any(beat is None or beat.base == name for beat in (await self.worker_beats()).values()):
                return
            first, further, _ = await self._raw_bases()
            others = sorted(_decoded(None, further), key=lambda base: base.created_ms)
            pipe.multi()
            pipe.hdel(keys.bases, name, f"{_FAILED}{name}")
            if first and _base(first).name == name:
                pipe.delete(keys.base)
                if others:
                    pipe.set(keys.base, m.encode(others[0]))
                    pipe.hdel(keys.bases, others[0].name)
            with suppress(WatchError):
                await pipe.execute()

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
        pipe.get(self._keys.base)
        pipe.hgetall(self._keys.bases)
        pipe.get(self._keys.status)
        pipe.get(self._keys.added_bases)
        num_workers, base, further, status, by_operators = await pipe.execute()
        return FleetSummary(
            num_workers,
            _decoded(base, further),
            _failures(further),
            decode(status, m.SchedulerStatus) if status else None,
            decoded(by_operators),
        )


def _decoded(first: bytes | None, further: Mapping[bytes, bytes]) -> list[m.ServedModel]:
    """Return the bases of these records, without the reasons of `note_failure`. Raises ProtocolError."""
    raws = [raw for name, raw in further.items() if not name.startswith(_FAILED.encode())]
    return [_base(raw) for raw in (first, *raws) if raw]


@lru_cache(maxsize=2 * MAX_BASES)
def _base(raw: bytes) -> m.ServedModel:
    """Decode a base's record. Cached, since many callers read it every second and it seldom changes."""
    return decode(raw, m.ServedModel)


def _fleet_of(name: str, fleet: Sequence[str], added: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the names of a fleet's bases as the worker of `name` should know them, [] for a fleet of one base.

    fleet: from the worker's settings. added: by operators, which a worker's settings do not list. A worker of an added
    base without such settings does not know the other bases, so all `known` ones are kept.
    """
    added = list(added)
    if not added:
        return list(fleet)
    return list(dict.fromkeys([name, *(fleet or (known if name in added else ())), *added]))


def _failures(further: Mapping[bytes, bytes]) -> dict[str, str]:
    return {name.decode()[1:]: why.decode() for name, why in further.items() if name.startswith(_FAILED.encode())}


class Joining(NamedTuple):
    """The result of `joining_of`: how a worker joins."""

    base: m.ServedModel  # the record to write, with the name under which it joins
    is_first: bool
    dropped: Sequence[str]  # names of further bases whose records are deleted


def joining_of(
    served: m.ServedModel,
    known: Mapping[str, m.ServedModel],
    fleet: Sequence[str],
    beats: Sequence[bytes],
) -> Joining:
    """Return how a worker joins, given the known records and the heartbeats of live workers. Pure.

    fleet: names of the bases, if there are several. If a worker of an unrecorded base joins a fleet without live
    workers, the records of bases not in `fleet` are deleted. Raises as `Members.join`.
    """
    first_name = next(iter(known), served.name)
    live, has_old = _live([*known, served.name], first_name, beats)
    twins = [name for name, base in known.items() if name != served.name and served.has_weights_of(base)]
    if fleet and live.intersection(twins):
        taken = min(live.intersection(twins))
        text = f"this fleet serves the weights of {served.name} as {taken}; name each base model once"
        raise Conflict(text, code="base_named_twice")
    if not fleet and served.name not in known:  # earlier versions reported no weights and gave one base several names
        twins += [name for name, base in known.items() if base.is_same(served) and name not in twins]
    name = next((name for name in twins if name in live), served.name)
    base = msgspec.structs.replace(served, name=name)
    other = known.get(name, base)
    serves = f"this fleet serves {', '.join(known)}; {name} cannot join it"
    if name in live:
        if not other.is_same(base):
            raise Conflict(_taken(base, other), code="base_name_taken")
        base = msgspec.structs.replace(base, max_model_len=min(base.max_model_len, other.max_model_len))
    elif has_old:
        text = f"{serves} beside workers of an earlier version, which know of one base only: update those first"
        raise Conflict(text, code="old_workers")
    elif beats and not fleet:
        text = f"{serves}: a fleet of several bases has --more-models on all services"
        raise Conflict(text, code="other_base")
    if name in known or name == first_name:
        return Joining(base, name == first_name, ())
    dropped = [] if beats else [one for one in known if one not in fleet]
    if len(known) - len(dropped) >= MAX_BASES:
        raise Conflict(f"this fleet serves {MAX_BASES} bases, which is the limit; {name} cannot join it")
    return Joining(base, first_name in dropped, dropped)


def _begins_with_base(raw: bytes) -> bool:
    """Return whether a heartbeat's first field is its base; elsewhere, a worker's name may contain the same bytes."""
    return 0 < raw.find(_BASE) < len(_BASE)  # only the number of fields precedes it


def _live(names: Iterable[str], first: str, beats: Sequence[bytes]) -> tuple[set[str], bool]:
    """Return the bases that live workers serve, and whether some workers are of an earlier version, without a name.

    Those serve the first base. Only heartbeats of earlier versions are decoded.
    """
    new = [raw for raw in beats if _begins_with_base(raw)]
    old = [beat.base for raw in beats if not _begins_with_base(raw) and (beat := _beat(raw)) is not None]
    live = {name for name in names if any(_BASE + m.encode(name) in raw for raw in new)}
    return live.union(name or first for name in old), "" in old


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

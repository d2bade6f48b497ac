"""The list of the fleet's requests: running, queued, and the history of ended ones.

A page examines at most MAX_LOOKED_AT requests: it may be shorter than its limit, even empty, without being the last.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from gateway.auth.callers import Caller
from gateway.overload import reads
from gateway.overload.loop_slice import LoopSlice, each
from protocol.queue.bus import Bus
from protocol.queue.history import Place
from protocol.wire import messages as m
from protocol.wire.brief import brief
from protocol.wire.error_codec import error_from
from protocol.wire.errors import BadRequest
from protocol.wire.keys import CLASSES
from protocol.wire.records import RequestSummary

if TYPE_CHECKING:  # its packages are optional
    from gateway.requests.database import Database

State = Literal["running", "queued", "ended"]
STATES: tuple[State, ...] = get_args(State)
Status = Literal["completed", "failed", "cancelled", "refused"]
"""Final states of requests, and that of a refused call."""
MAX_LOOKED_AT = 1000
LATE_MS = 5000
"""Maximum ms between a refusal and the writing of its entry, unless the gateway is overloaded."""
MAX_SEARCHED = 20_000
"""Maximum ends searched for one id."""
_AT_ONCE = 100

_PLACES = {
    "running": re.compile(r"(?:[0-9a-f]{24})?"),
    "queued": re.compile(rf"(?:(?:{'|'.join(CLASSES)})/(?:[0-9]{{1,18}}-[0-9]{{1,18}})?)?"),
    "ended": re.compile(r"(?:([0-9]{1,18})-([0-9]{1,18})/([0-9a-f]{12}))?"),
}
"""State -> pattern of a cursor's position in its list."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Which requests a list shows; "", None and 0 match all."""

    state: State | None = None
    status: Status | None = None
    tenant: str | None = None
    model: str = ""
    q: str = ""  # part of an id, a model's or worker's name, or an error, in any case
    since_ms: int = 0  # unix ms of the end; before it, of the submission
    until_ms: int = 0  # exclusive

    @property
    def states(self) -> list[State]:
        """The states to list, in order."""
        if self.state is not None:
            return [self.state]
        return ["ended"] if self.status is not None else list(STATES)

    def shows(self, view: dict[str, Any]) -> bool:
        """Return whether an object of the list matches the filters other than state and tenant."""
        ms = view["ended_ms"] or view["submitted_ms"]
        if ms < self.since_ms or (self.until_ms and ms >= self.until_ms):
            return False
        if self.status is not None and view["state"] != self.status:
            return False
        if self.model and view["model"] != self.model:
            return False
        error = view["error"] or {}
        texts = (view["id"], view["call"], view["model"], view["worker"], error.get("code"), error.get("message"))
        return not self.q or any(self.q.lower() in text.lower() for text in texts if text)


@dataclass(frozen=True, slots=True)
class _Found:
    """A request and its cursor in a list: the next page starts after it."""

    place: str
    rid: str


class RequestList:
    """Builds pages of the list."""

    def __init__(self, bus: Bus, database: Database | None = None) -> None:
        """database: holds the history; None: the queue does."""
        self._bus = bus
        self._database = database

    async def page(self, caller: Caller, filters: Filters, limit: int, after: str) -> dict[str, Any]:
        """Return a page of the requests that a caller may see: its own tenant's; for an admin all, or a given tenant's.

        after: `last_id` of the previous page. Raises BadRequest, PermissionDenied.
        """
        owner = caller.name if not caller.is_admin else filters.tenant
        if not caller.is_admin and filters.tenant is not None:
            owner = caller.namespace(filters.tenant)
        now, place = _after(after)
        states = filters.states
        if now is not None and now not in states:
            raise BadRequest(f"{brief(after)} is not a cursor of this list", param="after")
        beats = {wid: beat for wid, beat in (await self._bus.members.worker_beats()).items() if beat is not None}
        page: list[dict[str, Any]] = []
        seen: set[str] = set()
        last, looked = after, 0
        for kind in states[states.index(now) if now is not None else 0 :]:
            chunks = self._ended(place, owner, filters) if kind == "ended" else self._open(kind, place, beats, owner)
            async for chunk in chunks:
                reads.owe(len(chunk) / reads.REQUESTS_PER_READ)
                for at, view in chunk:
                    if len(page) == limit or looked >= MAX_LOOKED_AT:
                        return _listed(page, last)
                    looked, last = looked + 1, f"{kind}:{at}"
                    if view is None or not filters.shows(view):
                        continue
                    if kind == "ended" or view["id"] not in seen:  # it may have moved to another state
                        seen.add(view["id"])
                        page.append(view)
            place = ""
        return _listed(page, None)

    async def find(self, caller: Caller, names: set[str]) -> dict[str, Any] | None:
        """Return the object of an ended request that has one of these ids, None if there is none.

        In the queue, only the caller's latest MAX_SEARCHED ends are searched. Raises Overloaded once the caller's reads
        are used up: they are charged before each _AT_ONCE ends.
        """
        owner = None if caller.is_admin else caller.name
        if self._database is not None:
            found = await self._database.find(owner, names)
            return _past(found[1], found[0]) if found is not None else None
        tenants, looked = await self._tenants(owner), 0
        reads.spend(_AT_ONCE / reads.REQUESTS_PER_READ)
        async for _, tenant, entry in self._bus.history.walk(tenants, 0, 0, None):
            if entry is not None and entry.rid in names:
                return _past(entry, tenant)
            looked += 1
            if looked == MAX_SEARCHED:
                return None
            if looked % _AT_ONCE == 0:
                await asyncio.sleep(0)  # other tasks run, and may use up the reads
                reads.spend(_AT_ONCE / reads.REQUESTS_PER_READ)
        return None

    async def _walk_past(
        self, owner: str | None, since_ms: int, until_ms: int, after: Place | None
    ) -> AsyncIterator[tuple[Place, str, m.HistoryEntry | None]]:
        """Yield ends, latest first; see `History.walk`."""
        if self._database is not None:
            walk = self._database.walk(owner, since_ms, until_ms, after)
        else:
            walk = self._bus.history.walk(await self._tenants(owner), since_ms, until_ms, after)
        async for found in walk:
            yield found

    async def _tenants(self, owner: str | None) -> list[str]:
        """Return the tenants whose histories are read: the owner, or for None those with recent ends."""
        return [owner] if owner is not None else await self._bus.history.tenants()

    async def _open(
        self, kind: State, place: str, beats: dict[str, m.WorkerBeat], owner: str | None
    ) -> AsyncIterator[list[tuple[str, dict[str, Any] | None]]]:
        """Yield chunks of running or queued requests with their cursors; None for a request that is not shown."""
        async for chunk in self._walk(kind, place, beats):
            summaries = await self._bus.request_lists.summaries([one.rid for one in chunk])
            views = await each(summaries, lambda one: _shown(one, beats, owner))
            yield list(zip([one.place for one in chunk], views, strict=True))

    async def _ended(
        self, place: str, owner: str | None, filters: Filters
    ) -> AsyncIterator[list[tuple[str, dict[str, Any] | None]]]:
        """Yield chunks of ended requests with their cursors, latest first."""
        parts = _PLACES["ended"].fullmatch(place)
        after = Place(int(parts[1]), int(parts[2]), parts[3]) if parts is not None and parts[1] else None
        chunk, turn = list[tuple[str, dict[str, Any] | None]](), LoopSlice()
        until_ms = filters.until_ms + LATE_MS if filters.until_ms else 0
        async for at, tenant, entry in self._walk_past(owner, filters.since_ms, until_ms, after):
            view = _past(entry, tenant) if entry is not None else None
            chunk.append((f"{at.ms}-{at.seq}/{at.mark}", view))
            await turn.pause()
            if len(chunk) == _AT_ONCE:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    async def _walk(self, kind: State, place: str, beats: dict[str, m.WorkerBeat]) -> AsyncIterator[list[_Found]]:
        """Yield chunks of the running or queued requests after a cursor."""
        if kind == "running":
            rids = {_place_of(rid): rid for beat in beats.values() for rid, _ in beat.progress}
            places = sorted(one for one in rids if one > place)
            for begin in range(0, len(places), _AT_ONCE):
                yield [_Found(one, rids[one]) for one in places[begin : begin + _AT_ONCE]]
            return
        now, _, entry = place.partition("/")
        for cls in CLASSES[CLASSES.index(now) if now else 0 :]:
            while found := await self._bus.request_lists.queued(cls, entry, _AT_ONCE):
                entry = found[-1][0]
                yield [_Found(f"{cls}/{one}", submit.rid if submit is not None else "") for one, submit in found]
            entry = ""


def _place_of(rid: str) -> str:
    """Return the cursor of a running request: a hash, as a page may end with another tenant's, whose id is secret."""
    return hashlib.blake2b(rid.encode(), digest_size=12).hexdigest()


def _after(after: str) -> tuple[State | None, str]:
    """Split a cursor into state and position. Raises BadRequest."""
    if not after:
        return None, ""
    name, _, place = after.partition(":")
    known: dict[str, State] = {one: one for one in STATES}
    state = known.get(name)
    if state is None or not _PLACES[state].fullmatch(place):
        raise BadRequest(f"{brief(after)} is not a cursor of this list", param="after")
    return state, place


def _listed(page: Sequence[dict[str, Any]], last: str | None) -> dict[str, Any]:
    """Return a page as JSON. last: cursor of the next page, None for the last page."""
    return {"object": "list", "data": page, "has_more": last is not None, "last_id": last}


def _shown(one: RequestSummary | None, beats: dict[str, m.WorkerBeat], owner: str | None) -> dict[str, Any] | None:
    """Return the object of a request; None if it has ended or has another owner. owner: None for any."""
    if one is None or one.entry.state in m.TERMINAL or owner not in (None, one.tenant):
        return None
    beat = beats.get(one.entry.worker)
    return _object(one.entry, one.tenant, one.digest, beat.name if beat else one.entry.worker)


def _past(one: m.HistoryEntry, tenant: str) -> dict[str, Any]:
    return _object(one, tenant, one.digest, one.worker)


def _object(one: m.HistoryEntry, tenant: str, digest: str, worker: str) -> dict[str, Any]:
    """Return the object of a request in the list."""
    why, model = error_from(one.error) if one.error else None, one.model
    return {
        "id": one.rid,
        "object": "request",
        "call": one.call or one.rid,
        "state": one.state,
        "finish": one.finish or None,
        "error": {"message": why.message, "code": why.code} if why is not None else None,
        "status": one.status or None,
        "endpoint": one.endpoint or None,
        "tenant": tenant,
        "class": one.cls or None,
        "model": model or None,
        "adapter": {"digest": digest, "name": model or None} if digest else None,
        "base": one.base or None,
        "worker": worker or None,
        "prompt_tokens": one.num_prompt_tokens,
        "cached_tokens": one.num_cached_tokens,
        "output_tokens": int(one.num_output_tokens),
        "attempts": one.attempts,
        "submitted_ms": one.submitted_ms,
        "first_ms": one.first_ms or None,
        "ended_ms": one.ended_ms or None,
    }

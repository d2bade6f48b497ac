"""The list of the fleet's requests: those that run, those that wait, and those that have ended lately.

A page looks at MAX_LOOKED_AT requests at most; it may have fewer than asked for, even none, and yet not be the last.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gateway.auth.callers import Caller
from gateway.overload import reads
from protocol.queue.bus import Bus
from protocol.wire import messages as m
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest
from protocol.wire.keys import CLASSES
from protocol.wire.records import RequestSummary

State = Literal["running", "queued", "ended"]
STATES: tuple[State, ...] = get_args(State)
MAX_LOOKED_AT = 1000
_AT_ONCE = 100

_PLACES = {
    "running": re.compile(r"(?:[0-9a-f]{24})?"),
    "queued": re.compile(rf"(?:(?:{'|'.join(CLASSES)})/(?:[0-9]{{1,18}}-[0-9]{{1,18}})?)?"),
    "ended": re.compile(r"(?:[0-9]{1,18}-[0-9]{1,18}/[0-9]{1,6})?"),
}
"""State -> form of a cursor in its list."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A request and its cursor in a list: the next page starts after it."""

    place: str
    rid: str


class RequestList:
    """Makes pages of the list."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def page(
        self, caller: Caller, state: State | None, tenant: str | None, limit: int, after: str
    ) -> dict[str, Any]:
        """Return a page of the requests that a caller sees: its tenant's, an admin all or those of a tenant it names.

        state: only those. after: `last_id` of the page before. Raises BadRequest, PermissionDenied.
        """
        owner = caller.name if not caller.is_admin else tenant
        if not caller.is_admin and tenant is not None:
            owner = caller.namespace(tenant)
        now, place = _after(after)
        states: list[State] = [state] if state is not None else list(STATES)
        if now is not None and now not in states:
            raise BadRequest(f"{brief(after)} is not a cursor of this list", param="after")
        beats = {wid: beat for wid, beat in (await self._bus.members.worker_beats()).items() if beat is not None}
        page: list[RequestSummary] = []
        seen: set[str] = set()
        last, looked = after, 0
        for kind in states[states.index(now) if now is not None else 0 :]:
            async for chunk in self._walk(kind, place, beats):
                reads.owe(len(chunk) / reads.REQUESTS_PER_READ)
                found = await self._bus.request_lists.summaries([one.rid for one in chunk])
                for one, summary in zip(chunk, found, strict=True):
                    if len(page) == limit or looked >= MAX_LOOKED_AT:
                        return _shown(page, beats, last)
                    looked, last = looked + 1, f"{kind}:{one.place}"
                    if summary is None or one.rid in seen or owner not in (None, summary.tenant):
                        continue
                    if summary.is_terminal == (kind == "ended"):  # it may have gone on meanwhile
                        seen.add(one.rid)
                        page.append(summary)
            place = ""
        return _shown(page, beats, None)

    async def _walk(self, kind: State, place: str, beats: dict[str, m.WorkerBeat]) -> AsyncIterator[list[_Found]]:
        """Yield the requests of a state after a cursor, some at a time."""
        if kind == "running":
            rids = {_place_of(rid): rid for beat in beats.values() for rid, _ in beat.progress}
            places = sorted(one for one in rids if one > place)
            for begin in range(0, len(places), _AT_ONCE):
                yield [_Found(one, rids[one]) for one in places[begin : begin + _AT_ONCE]]
        elif kind == "queued":
            now, _, entry = place.partition("/")
            for cls in CLASSES[CLASSES.index(now) if now else 0 :]:
                while found := await self._bus.request_lists.queued(cls, entry, _AT_ONCE):
                    entry = found[-1][0]
                    yield [_Found(f"{cls}/{one}", submit.rid if submit is not None else "") for one, submit in found]
                entry = ""
        else:
            entry, _, done = place.partition("/")
            while ends := await self._bus.request_lists.ended(entry, _AT_ONCE):
                chunk = [
                    _Found(f"{one}/{number}", rid)
                    for one, rids in ends
                    for number, rid in enumerate(rids, 1)
                    if one != entry or number > int(done or 0)
                ]
                for begin in range(0, len(chunk), _AT_ONCE):
                    yield chunk[begin : begin + _AT_ONCE]
                if len(ends) < _AT_ONCE:
                    return
                entry, done = ends[-1][0], str(len(ends[-1][1]))


def _place_of(rid: str) -> str:
    """Return the cursor of a running request. A page may end with another tenant's, whose id it must not reveal."""
    return hashlib.blake2b(rid.encode(), digest_size=12).hexdigest()


def _after(after: str) -> tuple[State | None, str]:
    """Return the state and the position of a cursor. Raises BadRequest."""
    if not after:
        return None, ""
    name, _, place = after.partition(":")
    known: dict[str, State] = {one: one for one in STATES}
    state = known.get(name)
    if state is None or not _PLACES[state].fullmatch(place):
        raise BadRequest(f"{brief(after)} is not a cursor of this list", param="after")
    return state, place


def _shown(page: list[RequestSummary], beats: dict[str, m.WorkerBeat], last: str | None) -> dict[str, Any]:
    """Return a page as JSON; last: where the next one goes on, None for the last page."""
    workers = {wid: beat.name for wid, beat in beats.items()}
    data = [_view(one, workers) for one in page]
    return {"object": "list", "data": data, "has_more": last is not None, "last_id": last}


def _view(one: RequestSummary, workers: dict[str, str]) -> dict[str, Any]:
    return {
        "id": one.rid,
        "object": "request",
        "call": one.call or one.rid,
        "state": one.state,
        "finish": one.finish or None,
        "tenant": one.tenant,
        "class": one.cls,
        "adapter": {"digest": one.digest, "name": one.model or None} if one.digest else None,
        "worker": workers.get(one.owner, one.owner) or None,
        "prompt_tokens": one.num_prompt_tokens,
        "output_tokens": one.num_output_tokens,
        "attempts": one.attempts,
        "submitted_ms": one.submitted_ms,
        "first_ms": one.first_ms or None,
        "ended_ms": one.ended_ms or None,
    }

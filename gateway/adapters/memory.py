"""The memory and disk space that adapters use in the fleet, and how it is freed.

Workers get orders through streams and answer with events; stores are called over HTTP.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

import httpx2
import msgspec

from gateway.http.http_client import HttpClient
from peft_adapters.recipe import merge_of
from protocol.queue.bus import Bus
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, Conflict, LorafleetError, NoRoom, Overloaded, TooLarge, Unavailable
from protocol.wire.keys import CLASSES

POLL_S = 0.25
REST = 9
"""Minimum pause between two scans of the queue, as a multiple of the last one's duration."""

AT_ONCE = 256
"""Queued requests scanned at a time: a millisecond's work."""

STORE_TIMEOUT_S = 30.0
UPLOAD_TIMEOUT = httpx2.Timeout(60.0, read=600.0)  # a store unpacks the zip before it answers


@dataclass(slots=True)
class Freed:
    """Freed bytes, and the workers that will free more when their requests have ended."""

    pool_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    waiting: list[str] = field(default_factory=list)  # names of workers


class AdapterMemory:
    """Controls the memory that workers and stores use for adapters."""

    def __init__(self, bus: Bus, stores: HttpClient) -> None:
        self._bus = bus
        self._stores = stores
        self._open: dict[str, asyncio.Queue[m.AdapterEvent]] = {}  # id of an order -> queue of its answers
        self._look: asyncio.Task[list[m.WorkerBeat]] | None = None

    def on_event(self, event: m.AdapterEvent) -> None:
        """Process an adapter event, which may answer an order."""
        if event.order in self._open:
            self._open[event.order].put_nowait(event)

    async def beats(self) -> list[m.WorkerBeat]:
        """Return the latest heartbeats of live workers."""
        return [beat for beat in (await self._bus.members.worker_beats()).values() if beat is not None]

    async def next_beats(self) -> list[m.WorkerBeat]:
        """Return the heartbeats in at most POLL_S, with one read for all concurrent callers."""
        if self._look is None or self._look.done():
            self._look = asyncio.create_task(self._after_pause())
        look = self._look
        await asyncio.wait([look])
        return look.result()

    async def _after_pause(self) -> list[m.WorkerBeat]:
        await asyncio.sleep(POLL_S)
        return await self.beats()

    async def prefetch(self, digest: str, base: str) -> None:
        """Have every worker of a base fetch an adapter, and load it if no other must be evicted for it."""
        order = m.Control(kind="prefetch", digest=digest)
        await self._bus.streams.tell([(beat.wid, order) for beat in await self.beats() if beat.is_of(base)])

    async def evict(self, digest: str, wait_s: float) -> Freed:
        """Have all workers evict an adapter and the merges with it; wait up to `wait_s` seconds for their answers.

        A worker answers once no request on it uses the adapter or waits for it.
        """
        freed = Freed()
        beats = await self.beats()
        order, answers = uuid.uuid4().hex, asyncio.Queue[m.AdapterEvent]()
        awaited = {(beat.wid, held): beat.name for beat in beats for held in held_with(digest, [beat])}
        self._open[order] = answers
        try:
            await self._bus.streams.tell(
                [(wid, m.Control(kind="evict", digest=held, order=order)) for wid, held in awaited]
            )
            deadline_s = time.monotonic() + wait_s
            while awaited and (left_s := deadline_s - time.monotonic()) > 0:
                try:
                    async with asyncio.timeout(min(left_s, 4 * POLL_S)):
                        event = await answers.get()
                except TimeoutError:
                    living = {beat.wid for beat in await self.beats()}
                    awaited = {key: name for key, name in awaited.items() if key[0] in living}
                    continue
                if awaited.pop((event.source, event.digest), None) is not None:
                    freed.pool_bytes += event.pool_bytes
                    freed.host_bytes += event.host_bytes
        finally:
            del self._open[order]
        freed.waiting = sorted(set(awaited.values()))
        return freed

    async def requests(self, digest: str, tenant: str | None = None) -> list[str]:
        """Return the ids of unfinished requests for an adapter, or for merges with it. tenant: only that tenant's."""

        def counts(request: m.RequestHead | m.Assigned) -> bool:
            return tenant in (None, request.tenant) and involves(request.digest, digest)

        rids: list[str] = []
        for cls in CLASSES:
            entry = ""
            while found := await self._bus.request_lists.queued(cls, entry, AT_ONCE):
                entry = found[-1][0]
                rids += [submit.rid for _, submit in found if submit is not None and counts(submit)]
                await asyncio.sleep(0)
        on_workers: list[str] = []
        for wid in await self._bus.members.ids(self._bus.keys.workers):
            on_workers += [item.rid for item in await self._bus.work_of(wid) if counts(item)]
            await asyncio.sleep(0)
        # Entries of an assigned batch remain until all of its requests have ended.
        facts = await self._bus.requests(on_workers) if on_workers else []
        return rids + [rid for rid, fact in zip(on_workers, facts, strict=True) if fact and not fact.is_terminal]

    async def wait_unused(self, digest: str, wait_s: float) -> bool:
        """Wait up to `wait_s` until no request for an adapter is queued or running; return whether that is so."""
        deadline_s = time.monotonic() + wait_s
        begun_s = time.monotonic()
        while await self.requests(digest):
            now_s = time.monotonic()
            if now_s > deadline_s:
                return False
            await asyncio.sleep(max(POLL_S, min(REST * (now_s - begun_s), deadline_s - now_s)))
            begun_s = time.monotonic()
        return True

    async def end_requests(self, digest: str, error: LorafleetError, tenant: str | None = None) -> int:
        """Fail all requests for an adapter, or one tenant's, with an error; return their number."""
        ended = [await self._bus.finish(rid, "failed", "error", error) for rid in await self.requests(digest, tenant)]
        return sum(ended)

    async def drop_blob(self, digest: str) -> int:
        """Delete an adapter's blob from every store; return the freed bytes. Raises Conflict, Unavailable."""
        freed, http = 0, await self._stores.get()
        for url in await self._bus.members.store_urls():
            try:
                answer = await http.delete(f"{url}/adapters/{digest}", timeout=STORE_TIMEOUT_S)
            except httpx2.HTTPError as error:
                raise Unavailable(f"an adapter store is not responding: {error!r}", code="no_store") from error
            if answer.status_code == 409:
                raise Conflict(f"its files are kept: {_message(answer)}", code="adapter_in_use")
            if answer.status_code != 200:
                raise Unavailable(f"an adapter store answered {answer.status_code}", code="no_store")
            freed += msgspec.json.decode(answer.content, type=dict[str, int])["freed_bytes"]
        return freed

    async def send_upload(self, body: AsyncIterator[bytes], length: int) -> tuple[str, str]:
        """Stream a zip to a store. Return the source that now names its adapter, and the store's URL.

        Raises the store's refusal, and Unavailable.
        """
        urls = await self._bus.members.store_urls()
        if not urls:
            raise Unavailable("no adapter store is running", code="no_store")
        http, headers = await self._stores.get(), {"Content-Length": str(length)}
        try:
            answer = await http.post(f"{urls[0]}/uploads", content=body, headers=headers, timeout=UPLOAD_TIMEOUT)
        except httpx2.HTTPError as error:
            raise Unavailable(f"an adapter store refused the upload: {error!r}", code="no_store") from error
        if answer.status_code != 200:
            raise _refusal(answer)
        return msgspec.json.decode(answer.content, type=dict[str, str])["source"], urls[0]

    async def drop_upload(self, source: str, url: str) -> None:
        """Delete an upload from its store; an unreachable store deletes it by itself later."""
        http = await self._stores.get()
        with suppress(httpx2.HTTPError):
            await http.delete(f"{url}/uploads/{source.rpartition('/')[2]}", timeout=STORE_TIMEOUT_S)


def involves(held: str, digest: str) -> bool:
    """Return whether the digest `held` is the adapter's, or that of a merge with it."""
    if held == digest:
        return True
    merge = merge_of(held)
    return merge is not None and digest in merge.digests


def held_with(digest: str, beats: Iterable[m.WorkerBeat]) -> set[str]:
    """Return an adapter's digest, and those of the merges with it that workers hold."""
    held = {held for beat in beats for tier in (beat.resident, beat.loading, beat.host) for held in tier}
    return {digest} | {other for other in held if involves(other, digest)}


def _message(answer: httpx2.Response) -> str:
    return msgspec.json.decode(answer.content, type=dict[str, dict[str, str]])["error"]["message"]


def _refusal(answer: httpx2.Response) -> LorafleetError:
    """Return the error of a store that refused an upload."""
    try:
        error = msgspec.json.decode(answer.content, type=dict[str, dict[str, str | None]])["error"]
    except (msgspec.DecodeError, KeyError):
        error = {}
    message, code = error.get("message") or f"the store answered {answer.status_code}", error.get("code")
    kinds = {400: BadRequest, 409: Conflict, 413: TooLarge, 507: NoRoom}
    if answer.status_code == 429:
        return Overloaded(message, 5.0)
    kind = kinds.get(answer.status_code)
    return kind(message, code=code) if kind is not None else Unavailable(message, code="no_store")

"""The scheduler's recovery after deaths and lost messages. Every step can be repeated by the next leader."""

from __future__ import annotations

import logging
from typing import Any, cast

import msgspec

from protocol.metrics import series as metrics
from protocol.queue.bus import Bus, Entry, Owned, now_ms
from protocol.wire import messages as m
from protocol.wire.codec import MALFORMED
from protocol.wire.errors import Internal, LorafleetError, WorkerLost
from protocol.wire.keys import CLASSES
from scheduler.core import Scheduler
from scheduler.trace import tell_death

logger = logging.getLogger(__name__)

CHUNK = 128
"""Maximum number of requests per script, so that no script blocks the queue for long."""


class Recovery:
    """Restores the agreement of queue and scheduler."""

    def __init__(self, bus: Bus, scheduler: Scheduler, max_attempts: int) -> None:
        self._bus = bus
        self._scheduler = scheduler
        self._max_attempts = max_attempts
        self._missing: dict[str, int] = {}  # rid -> epoch of requests that their worker did not list at the last check

    async def rebuild(self) -> dict[str, bytes]:
        """Take over what earlier leaders assigned. Returns stream -> last id, from where to continue reading."""
        bus, scheduler = self._bus, self._scheduler
        # The order matters: all later ends are read, so no request adopted below is counted forever.
        last_ids = {bus.keys.ended: await bus.streams.last_id(bus.keys.ended)}
        beats = await bus.members.worker_beats()
        bases, failed = await bus.members.bases()  # after the heartbeats, to know all their bases
        scheduler.set_bases([base.name for base in bases], failed)
        scheduler.beats(beats, 0.0)
        num_adopted = 0
        for wid in beats:
            items = {item.rid: item for item in await bus.work_of(wid)}
            rids = list(items)
            for start in range(0, len(rids), CHUNK):
                for owned in await bus.owned(rids[start : start + CHUNK]):
                    if owned is not None and owned.state == "assigned" and owned.owner == wid:
                        yields = items[owned.submit.rid].yields
                        scheduler.adopt(wid, owned.submit, owned.epoch, owned.attempts, yields=yields)
                        num_adopted += 1
        logger.info("%d workers registered, %d requests running", len(beats), num_adopted)
        # Requests on the submit streams are unassigned; the first read returns them.
        return last_ids | {bus.keys.sub(cls): b"0" for cls in CLASSES}

    async def bury(self, wid: str) -> None:
        """Requeue a dead worker's requests, end those that cannot be requeued, and delete the worker's keys."""
        assigned = {item.rid for item in await self._bus.work_of(wid)}
        rids = list(assigned | set(self._scheduler.assigned_to(wid)))
        worker = self._scheduler.workers.by_id.get(wid)
        order = self._scheduler.swaps.by_worker.get(worker.beat.name) if worker is not None else None
        if order is not None and order.seat.wid == wid and not rids:
            logger.info("worker %s is switching to base %s", order.seat.name, order.base)
        else:
            metrics.WORKERS_LOST.inc()
            logger.warning("worker %s is dead; it had %d requests", wid, len(rids))
        for request in worker.requests.values() if worker is not None else ():
            tell_death(request, worker.beat.name if worker is not None else wid)
        await self._requeue(wid, rids, counts=True, name=worker.beat.name if worker else "")
        self._scheduler.remove_worker(wid)
        await self._bus.members.leave(wid)

    async def _requeue(self, wid: str, rids: list[str], *, counts: bool, name: str = "") -> int:
        """Take requests from a worker and queue them again; return how many of them it owned."""
        num_taken = 0
        for start in range(0, len(rids), CHUNK):
            outcomes = await self._bus.requeue(
                wid, rids[start : start + CHUNK], counts=counts, max_attempts=self._max_attempts, name=name
            )
            num_taken += sum(outcome != "other" for outcome in outcomes.values())
            for rid, outcome in outcomes.items():
                metrics.REQUEUED.labels(outcome).inc()
                if outcome == "exhausted":
                    await self._give_up(rid)
                elif outcome == "cancelled":
                    await self._bus.finish(rid, "cancelled", "cancelled")
                # Checked now: while others are being finished, the request may return from the submit stream.
                if outcome != "requeued" and self._scheduler.is_assigned_to(rid, wid):
                    self._scheduler.forget(rid)
        return num_taken

    async def _give_up(self, rid: str) -> None:
        owned = (await self._bus.owned([rid]))[0]
        if owned is None:
            return
        reason = f"{len(owned.deaths)} workers died while they ran this request"
        logger.error("giving up request %s: %s: %s", rid, reason, ", ".join(death.wid for death in owned.deaths))
        letter = m.DeadLetter(
            reason=reason,
            submit=owned.submit,
            attempts=owned.attempts,
            num_output_tokens=owned.num_output_tokens,
            deaths=owned.deaths,
            ms=now_ms(),
        )
        await self._bus.finish(rid, "failed", "error", WorkerLost(reason), dead_letter=letter)

    async def end(self, rid: str, error: LorafleetError) -> None:
        """Fail a request, wherever it is."""
        await self._bus.finish(rid, "failed", "error", error)
        self._scheduler.forget(rid)

    async def reject(self, stream: str, entry: Entry, reason: str) -> None:
        """Set an unreadable submission aside, and end its request if at least its id can be read."""
        await self._bus.streams.reject(stream, entry, reason)
        try:
            loose: Any = msgspec.msgpack.decode(entry[1].get(b"b", b""))
        except MALFORMED:
            return
        rid = cast("dict[object, object]", loose).get("rid") if isinstance(loose, dict) else None
        if isinstance(rid, str):
            await self._bus.finish(rid, "failed", "error", Internal(f"the request could not be read: {reason}"))

    async def cancel_gateway(self, gid: str) -> None:
        """End the requests for which only a dead gateway waited."""
        rids = self._scheduler.of_gateway(gid)
        logger.warning("gateway %s is dead; %d requests are cancelled", gid, len(rids))
        for rid in rids:
            await self._bus.cancel(rid)
        await self._bus.members.forget_gateway(gid)

    async def reconcile(self) -> None:
        """Check requests that their workers' heartbeats have not listed twice in a row.

        Either they have ended and the message was lost, or their entry on the work stream was lost; the latter are
        requeued.
        """
        missing = self._scheduler.unlisted()
        suspects = [rid for rid, epoch in missing.items() if self._missing.get(rid) == epoch]
        self._missing = missing
        for start in range(0, len(suspects), CHUNK):
            chunk = suspects[start : start + CHUNK]
            for rid, owned in zip(chunk, await self._bus.owned(chunk), strict=True):
                if owned is None or owned.state in m.TERMINAL:
                    self._scheduler.forget(rid)
                elif owned.state == "assigned" and owned.epoch == missing[rid] and not await self._is_on_its_way(owned):
                    logger.error("request %s was lost on its way to %s", rid, owned.owner)
                    await self._requeue(owned.owner, [rid], counts=False)

    async def find_orphans(self) -> int:
        """Requeue requests whose assigned worker is unknown or has no work entry for them; return how many.

        There are none unless a queue has lost its last second. Workers register before they get work, and leave after
        they have handed it back; a work entry is deleted with the last end of its requests. So either the registration
        was lost, or an end, whose worker has then deleted the entry. Scans all keys; it runs when a leadership begins,
        which also happens after a restart of the queue.
        """
        assigned: dict[str, list[str]] = {}  # by owner
        async for found in self._bus.scan_assigned(CHUNK):
            for rid, owner in found:
                assigned.setdefault(owner, []).append(rid)
        registered = set(await self._bus.members.ids(self._bus.keys.workers)) if assigned else set[str]()
        num_found = 0
        for owner, rids in assigned.items():
            listed = {item.rid for item in await self._bus.work_of(owner)} if owner in registered else set[str]()
            orphans = [rid for rid in rids if rid not in listed]
            num_found += await self._requeue(owner, orphans, counts=False)
        if num_found:
            logger.error("%d requests were lost with their workers or work entries", num_found)
        return num_found

    async def _is_on_its_way(self, owned: Owned) -> bool:
        return owned.submit.rid in {item.rid for item in await self._bus.work_of(owned.owner)}

"""The workers for operators, and the orders to drain and resume them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec

from gateway.adapters.memory import POLL_S
from gateway.auth.callers import Caller
from protocol.queue.bus import Bus
from protocol.wire import messages as m
from protocol.wire.errors import NotFound


class WorkerViews:
    """Shows workers by their heartbeats, and sends them orders."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def list(self, after: str, limit: int) -> dict[str, Any]:
        """Return a page of the registered workers, by name, then id; `after` is the last id of the previous page."""
        beats = await self._bus.members.worker_beats()
        order = sorted(beats, key=lambda wid: _place(wid, beats[wid]))
        if after and after not in beats:
            raise NotFound(f"there is no worker {after:.100}", param="after")
        start = order.index(after) + 1 if after else 0
        page = order[start : start + limit]
        return {
            "object": "list",
            "data": [view(wid, beats[wid]) for wid in page],
            "has_more": start + len(page) < len(order),
            "last_id": page[-1] if page else None,
        }

    async def order(self, name: str, caller: Caller, *, drain: bool, wait_s: float) -> tuple[dict[str, Any], bool]:
        """Have a worker, given by name or id, drain or resume.

        Return it, and whether it has confirmed that within `wait_s`. Raises NotFound, PermissionDenied.
        """
        caller.require("admin")
        wid, beat = await self._find(name)
        if beat.draining != drain:
            await self._bus.streams.tell([(wid, m.Control(kind="drain" if drain else "resume"))])
        deadline_s = time.monotonic() + wait_s
        while beat.draining != drain and time.monotonic() < deadline_s:
            await asyncio.sleep(POLL_S)
            wid, beat = await self._find(wid)
        return view(wid, beat), beat.draining == drain

    async def _find(self, name: str) -> tuple[str, m.WorkerBeat]:
        beats = await self._bus.members.worker_beats()
        for wid, beat in beats.items():
            if beat is not None and name in (wid, beat.name):
                return wid, beat
        raise NotFound(f"there is no live worker {name:.100}", code="worker_not_found")


def _place(wid: str, beat: m.WorkerBeat | None) -> tuple[bool, str, str]:
    return (beat is None, beat.name if beat is not None else "", wid)


def view(wid: str, beat: m.WorkerBeat | None) -> dict[str, Any]:
    """Return the object of a worker.

    beat: None if its heartbeat has expired, but the scheduler has not declared it dead.
    """
    if beat is None:
        return {"id": wid, "object": "worker", "name": None, "state": "lost"}
    return {
        "id": wid,
        "object": "worker",
        "name": beat.name,
        "base": beat.base or None,
        "becoming": beat.becoming or None,
        "state": "draining" if beat.draining else "ready",
        "capacity": beat.capacity,
        "running": beat.running,
        "waiting": beat.waiting,
        "waiting_adapter": beat.waiting_adapter,
        "kv": {"blocks": beat.kv_blocks_total, "free": beat.kv_blocks_free, "bytes": beat.kv_bytes_total},
        "pool": {"bytes": beat.pool_bytes_total, "free": beat.pool_bytes_free},
        "host": {"bytes": beat.host_bytes_total, "used": beat.host_bytes_used},
        "adapters": {
            "resident": len(beat.resident),
            "loading": len(beat.loading),
            "host": len(beat.host),
            "pinned": sum(not problem for problem in beat.pinned.values()),
        },
        "loads": beat.num_loads,
        "fetches": beat.num_fetches,
        "counters": {name: getattr(beat.counters, name) for name in _COUNTERS},
        "sent_ms": beat.sent_ms,
    }


_COUNTERS = tuple(field.name for field in msgspec.structs.fields(m.WorkerCounters))

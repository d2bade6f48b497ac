"""What a call waits for until its first token: its place in the queue, then its adapter."""

from __future__ import annotations

from protocol.queue.bus import Bus
from protocol.wire import messages as m

MAX_COUNTED = 100
"""Maximum requests counted ahead of a waiting one: counting stays cheap with thousands waiting."""


async def waiting_state(bus: Bus, rid: str) -> str:
    """Return a short description of what a request waits for. Raises a connection error."""
    holder = await bus.holder(rid)
    if holder.state == "queued":
        status = await bus.get(bus.keys.status, m.SchedulerStatus)
        if status is not None and status.workers == 0:
            return "queued, waiting for a worker to start"
        ahead = await bus.position(rid, limit=MAX_COUNTED)
        return "queued" if ahead is None else _place(ahead)
    if holder.state == "assigned":
        beat = await bus.get(bus.keys.worker_beat(holder.owner), m.WorkerBeat)
        return adapter_state(holder.digest, beat)
    return "waiting"


def adapter_state(digest: str, beat: m.WorkerBeat | None) -> str:
    """Return how far a worker, by its latest heartbeat, has loaded a request's adapter. digest: "" for the base."""
    if beat is None:
        return "waiting for its worker"
    if not digest or digest in beat.resident:
        return "its prompt is being processed"
    if digest in beat.loading or digest in beat.host:
        return "its adapter is being loaded"
    return "its adapter is being fetched"


def _place(ahead: int) -> str:
    if ahead >= MAX_COUNTED:
        return f"queued, {MAX_COUNTED} or more ahead of it"
    return f"queued, {ahead} ahead of it"

"""The scheduler's spans of traced requests: waits in the queue, and assignments to workers that died."""

from __future__ import annotations

from protocol.queue.bus import now_ms
from protocol.runtime.tracing import TRACING, place_of, run_place
from protocol.wire import messages as m
from scheduler.request import QueuedRequest

MS = 1_000_000
"""Nanoseconds per ms."""


def tell_placed(request: QueuedRequest, placed: m.Placed) -> None:
    """Export the span of a request's wait in the queue, at its assignment; it links to the assignment before."""
    request.assigned_ms = placed.ms
    sub, tracer = request.submit, TRACING.tracer
    above = place_of(sub.trace) if tracer is not None and sub.trace else None
    if tracer is None or above is None:
        return
    before = run_place(sub.trace, sub.rid, request.epoch - 1) if request.resumed else None
    attributes = {
        "lorafleet.request": sub.rid,
        "lorafleet.epoch": request.epoch + 1,
        "lorafleet.class": sub.cls,
        "lorafleet.worker": placed.options[0].worker if placed.options else "",
        "lorafleet.because": placed.because,
        "lorafleet.waits_ms": [option.wait_ms for option in placed.options],
        "lorafleet.workers": [option.worker for option in placed.options],
        "lorafleet.held_ms": placed.held_ms,
        "lorafleet.attempts": request.attempts,
    }
    begin_ms = request.since_ms or sub.submitted_ms
    tracer.tell(
        "queue wait", above.child(), begin_ms * MS, placed.ms * MS, attributes, links=[before] if before else []
    )


def tell_death(request: QueuedRequest, worker: str) -> None:
    """Export the span of an assignment to a worker that died and cannot export it itself."""
    sub, tracer = request.submit, TRACING.tracer
    place = run_place(sub.trace, sub.rid, request.epoch + 1) if tracer is not None else None
    if tracer is None or place is None:
        return
    end_ms = now_ms()
    attributes = {"lorafleet.request": sub.rid, "lorafleet.epoch": request.epoch + 1, "lorafleet.worker": worker}
    tracer.tell(
        f"run on {worker}",
        place,
        (request.assigned_ms or end_ms) * MS,
        end_ms * MS,
        attributes,
        kind="CONSUMER",
        error="the worker died",
    )

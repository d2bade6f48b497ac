"""A worker's spans of traced requests, exported once the output they describe is durable."""

from __future__ import annotations

import time
from collections.abc import Sequence

from gpu_worker.service.owned import OwnedRequest, PendingOutput
from protocol.runtime.tracing import TRACING, Trace, run_place
from protocol.wire import messages as m

MS = 1_000_000
"""Nanoseconds per ms."""


def tell_step(request: OwnedRequest, before: m.Timing | None, new: PendingOutput, worker: str) -> None:
    """Export the spans that a newly durable step has completed for a request: up to its first token, or all of it.

    before: its times as last exported. Spans up to the first token are exported at once, so that they survive the
    worker.
    """
    place, timing = _place(request), request.timing
    if place is None:
        return
    if before is None and timing is not None:
        _tell_start(place, timing)
    if new.finish:
        _tell_end(request, place, timing, new, worker)


def tell_handed_back(request: OwnedRequest, worker: str) -> None:
    """Export this worker's span of a request, before the request is reassigned."""
    place = _place(request)
    if place is None:
        return
    now_ns = time.time_ns()
    begin_ns = request.timing.taken_ms * MS if request.timing is not None else now_ns
    _tell_run(request, place, begin_ns, now_ns, worker, events=[("handed back", now_ns)])


def _place(request: OwnedRequest) -> Trace | None:
    return run_place(request.trace, request.rid, request.epoch) if TRACING.tracer is not None else None


def _tell(name: str, place: Trace, timing: m.Timing, begin_ms: int, end_ms: int, **attributes: str | int) -> None:
    """Export a part of the run. begin_ms, end_ms: since the request was accepted."""
    assert TRACING.tracer is not None
    begin_ns, end_ns = (timing.taken_ms + begin_ms) * MS, (timing.taken_ms + end_ms) * MS
    TRACING.tracer.tell(name, place.child(), begin_ns, end_ns, attributes)


def _tell_start(place: Trace, timing: m.Timing) -> None:
    if timing.ready_ms >= 0:
        _tell("adapter wait", place, timing, 0, timing.ready_ms, **{"lorafleet.adapter.tier": timing.tier})
    if timing.begun_ms >= 0 and timing.first_ms >= 0:
        cached = {"lorafleet.usage.cached_tokens": timing.num_cached_tokens}
        _tell("prefill", place, timing, timing.begun_ms, timing.first_ms, **cached)


def _tell_end(request: OwnedRequest, place: Trace, timing: m.Timing | None, new: PendingOutput, worker: str) -> None:
    now_ns, tracer = time.time_ns(), TRACING.tracer
    error = new.error.message if new.error is not None else ""
    if timing is None or tracer is None:  # canceled before it had any times
        _tell_run(request, place, now_ns, now_ns, worker, error=error)
        return
    end_ms = max(timing.ended_ms, timing.first_ms)
    if timing.first_ms >= 0:
        more = {"lorafleet.tokens": request.num_logged, "lorafleet.preemptions": timing.num_preempted}
        _tell("decode", place, timing, timing.first_ms, end_ms, **more)
    if end_ms >= 0:
        tracer.tell("publish", place.child(), (timing.taken_ms + end_ms) * MS, now_ns, {})
    _tell_run(request, place, timing.taken_ms * MS, now_ns, worker, error=error)


def _tell_run(
    request: OwnedRequest, place: Trace, begin_ns: int, end_ns: int, worker: str, *, error: str = "",
    events: Sequence[tuple[str, int]] = (),
) -> None:  # fmt: skip
    """Export an assignment's span, with a link to the previous assignment's, if any."""
    assert TRACING.tracer is not None
    before = run_place(request.trace, request.rid, request.epoch - 2) if request.epoch > 1 else None
    attributes = {
        "lorafleet.request": request.rid,
        "lorafleet.epoch": request.epoch,
        "lorafleet.worker": worker,
        "lorafleet.tokens": request.num_logged,
    }
    TRACING.tracer.tell(
        f"run on {worker}", place, begin_ns, end_ns, attributes, kind="CONSUMER", error=error,
        links=[before] if before is not None else [], events=events,
    )  # fmt: skip

"""A request's record as one timeline, in order of time. Pure.

Times are unix ms by the clocks of the queue's server, the scheduler and the worker; they may disagree.
"""

from __future__ import annotations

from typing import Any

from protocol.wire import messages as m
from protocol.wire.error_codec import error_from
from protocol.wire.keys import BATCH
from protocol.wire.records import Assignment, RequestRecord

TIERS = {
    "resident": "its adapter was in the pool",
    "loading": "its adapter was loading",
    "host": "its adapter was in host memory",
    "store": "its adapter was at the store",
    "": "it needs no adapter",
}


def described(rid: str, record: RequestRecord, converted: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the object of `GET /v1/requests/{id}`. converted: how LoRA approximates its adapter, if it does."""
    facts = record.facts
    error = error_from(facts.error) if facts.error else None
    return {
        "id": rid,
        "object": "request",
        "call": record.call or rid,
        "state": facts.state,
        "finish": facts.finish or None,
        "error": {"message": error.message, "code": error.code} if error is not None else None,
        "tenant": record.tenant,
        "class": record.cls,
        "adapter": _adapter(record, converted),
        "base": record.base or None,
        "prompt_tokens": facts.num_prompt_tokens,
        "cached_tokens": record.num_cached_tokens,
        "output_tokens": facts.num_output_tokens,
        "attempts": facts.attempts,
        "deadline_ms": record.deadline_ms,
        "timeline": timeline(record),
    }


def _adapter(record: RequestRecord, converted: dict[str, Any] | None) -> dict[str, Any] | None:
    if not record.digest:
        return None
    return {"digest": record.digest, "name": record.model or None} | ({"converted": converted} if converted else {})


def recalled(past: dict[str, Any]) -> dict[str, Any]:
    """Return the same object, with the main events only, for a request whose record has expired.

    past: its list object.
    """
    events: list[dict[str, Any]] = []
    if past["state"] == "refused":
        text = f"refused with status {past['status']}: {past['error']['message']}"
        events.append(_event(past["ended_ms"], "refused", text))
    else:
        events.append(_event(past["submitted_ms"], "accepted", "queued"))
        if past["first_ms"]:
            events.append(_event(past["first_ms"], "first_token", "the first token was delivered"))
        text = f"{past['state']} after {past['output_tokens']} tokens: {past['finish']}"
        events.append(_event(past["ended_ms"], "ended", text, state=past["state"], finish=past["finish"]))
    return {**past, "deadline_ms": None, "timeline": events}


def timeline(record: RequestRecord) -> list[dict[str, Any]]:
    """Return a request's events in order of time, each with `ms`, `event`, a sentence `text`, and details."""
    facts = record.facts
    events = [_event(facts.submitted_ms, "accepted", f"queued, {record.num_ahead} ahead of it", ahead=record.num_ahead)]
    for number, one in enumerate(record.assignments, start=1):
        events += _of_assignment(number, one, record.cls)
    if facts.first_ms:
        events.append(_event(facts.first_ms, "first_token", "the first token was delivered"))
    if facts.ended_ms:
        text = f"{facts.state} after {facts.num_output_tokens} tokens: {facts.finish}"
        events.append(_event(facts.ended_ms, "ended", text, state=facts.state, finish=facts.finish))
    return sorted(events, key=lambda event: event["ms"])


def _event(ms: int, event: str, text: str, **more: Any) -> dict[str, Any]:
    return {"ms": ms, "event": event, "text": text, **more}


def _of_assignment(number: int, one: Assignment, cls: str) -> list[dict[str, Any]]:
    """Return the events of an assignment."""
    placed = one.placed
    name = placed.options[0].worker if placed.options else placed.wid
    events = [
        _event(
            placed.ms, "placed", f"placed on {name}: {_why(placed, cls)}", assignment=number, worker=name,
            wid=placed.wid, because=placed.because, held_ms=placed.held_ms, yields=placed.yields,
            lead_tokens=placed.lead_tokens, queued=placed.num_queued, more_workers=placed.num_others,
            options=[
                {"worker": o.worker, "wait_ms": o.wait_ms, "adapter": o.tier or None, "crowded": o.crowded}
                for o in placed.options
            ],
        )
    ]  # fmt: skip
    if one.timing is not None:
        events += _of_run(number, name, one.timing)
    if one.left_ms:
        text = f"{name} died" if one.left_how == "died" else f"{name} returned it to the queue"
        event = "worker_died" if one.left_how == "died" else "handed_back"
        events.append(_event(one.left_ms, event, f"{text}; requeued", assignment=number, worker=name))
    return events


def _why(placed: m.Placed, cls: str) -> str:
    words = [m.REASONS.get(placed.because, placed.because) or "no reason was recorded"]
    if placed.options:
        words[0] += f", {placed.options[0].wait_ms} ms"
    others = [f"{o.worker} {o.wait_ms} ms{' (crowded)' if o.crowded else ''}" for o in placed.options[1:]]
    if others:
        words.append(f"others: {', '.join(others)}")
    if placed.held_ms:
        words.append(f"held {placed.held_ms} ms for a worker with its adapter")
    if placed.yields:
        reason = "batch work" if cls == BATCH else "its tenant has more than its fair share"
        words.append(f"lower priority: {reason}")
    return "; ".join(words)


def _of_run(number: int, name: str, timing: m.Timing) -> list[dict[str, Any]]:
    """Return the events of an assignment that its worker has reported."""
    taken, common = timing.taken_ms, {"assignment": number, "worker": name}
    events = [
        _event(taken, "taken", f"received by {name}; {TIERS[timing.tier]}", adapter=timing.tier or None, **common)
    ]
    if timing.staged_ms >= 0:
        text = f"its adapter was in host memory after {timing.staged_ms} ms"
        events.append(_event(taken + timing.staged_ms, "adapter_staged", text, after_ms=timing.staged_ms, **common))
    if timing.ready_ms >= 0:
        text = f"its adapter was in the pool after {timing.ready_ms} ms"
        events.append(_event(taken + timing.ready_ms, "adapter_ready", text, after_ms=timing.ready_ms, **common))
    if timing.begun_ms >= 0:
        cached = timing.num_cached_tokens
        text = f"first step; {cached} tokens of its prompt were cached"
        events.append(_event(taken + timing.begun_ms, "begun", text, cached_tokens=cached, **common))
    if timing.first_ms >= 0:
        events.append(_event(taken + timing.first_ms, "token", f"first token on {name}", **common))
    if timing.ended_ms >= 0:
        preempted = f"; preempted {timing.num_preempted} times" if timing.num_preempted else ""
        text = f"done on {name}{preempted}"
        events.append(_event(taken + timing.ended_ms, "done", text, preemptions=timing.num_preempted, **common))
    return events

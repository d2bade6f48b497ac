"""Runs a request again, with the same prompt, seed and adapter, and compares the outputs token by token."""

from __future__ import annotations

import uuid
from typing import Any

from msgspec import structs

from gateway.auth.callers import Caller
from gateway.calls.pipeline import Pipeline
from gateway.calls.submit import rid_of
from gateway.overload.call_load import CallLoad
from protocol.queue.books.usage import CountedFor, usage_of
from protocol.queue.bus import now_ms
from protocol.queue.history import kept_for
from protocol.wire import messages as m
from protocol.wire.error_codec import error_from
from protocol.wire.errors import Conflict, DeadlineExceeded, NotFound

NUM_SHOWN = 8
"""Token ids shown of each output, from the first difference on."""

LOOK_S = 5.0
"""Seconds after which the log is read, in case a message was lost."""


async def replay(pipeline: Pipeline, rid: str, caller: Caller) -> dict[str, Any]:
    """Run a completed request again and return how the outputs compare.

    Raises Conflict while it runs or if its prompt was not kept; Overloaded, Unavailable, DeadlineExceeded, and the
    error with which the rerun ends.
    """
    bus = pipeline.bus
    owned, record = (await bus.owned([rid]))[0], await bus.record(rid)
    if owned is None or record is None:
        raise NotFound(f"there is no request {rid}", code="request_not_found")
    if record.facts.state != "completed":
        raise Conflict(f"the request is {record.facts.state}: only completed requests can be replayed")
    body = (await bus.inputs([owned.submit]))[0].body()
    if body is None:
        text = "prompts of ended requests are stored only with --keep-prompts, and as long as their records"
        raise Conflict(text, code="prompt_not_kept")
    before = await bus.tokens(rid) or b""
    call = uuid.uuid4().hex
    again = structs.replace(
        owned.submit, rid=rid_of(call, 0), call="", part=0, gateway=pipeline.replies.gid, stored=False,
        submitted_ms=now_ms(), deadline_ms=now_ms() + int(pipeline.settings.request_timeout_s * 1000), trace="",
    )  # fmt: skip
    now = await _run(pipeline, again, body, record.model, caller)
    return compared(rid, again.rid, before, now)


async def _run(pipeline: Pipeline, submit: m.RequestHead, body: m.Body, model: str, caller: Caller) -> bytes:
    """Run a request to its end and return its tokens (int32).

    It counts against the caller's limits and usage of `model`.
    """
    bus, replies = pipeline.bus, pipeline.replies
    num_tokens = submit.num_prefill_tokens + submit.max_new_tokens
    load = CallLoad(submit.cls, 1, num_tokens, pipeline.settings.request_timeout_s, submit.tenant)
    quota = pipeline.admission.quota_of(caller)
    pipeline.admission.check_again(load, quota)
    base, days = pipeline.fleet.named(submit.base), pipeline.settings.usage_days
    counted = CountedFor(caller.owner, model, submit.digest, base.name if base else "", False, days)
    usage = usage_of(counted, calls=1, prompt_tokens=submit.num_prompt_tokens, has_output=body.task == "generate")
    mail = replies.subscribe([submit.rid], eager=False)
    ended = False
    try:
        outcome, result = await bus.submit(
            submit.cls,
            [(submit, body)],
            max_queued=pipeline.settings.max_queued,
            quota=quota,
            usages=[usage],
            history=kept_for(pipeline.settings.history_s, pipeline.settings.history_requests),
        )
        pipeline.admission.settle_again(load, quota, outcome, result)
        while now_ms() < submit.deadline_ms:
            await mail.take(LOOK_S)
            facts = (await bus.requests([submit.rid]))[0]
            if facts is None:
                raise NotFound("the queue has lost the request", code="request_lost")
            if facts.is_terminal:
                ended = True
                if facts.error:
                    raise error_from(facts.error)
                return await bus.tokens(submit.rid) or b""
        raise DeadlineExceeded("the request exceeded its deadline")
    finally:
        replies.unsubscribe(mail)
        if not ended:
            await replies.cancel([submit.rid])


def compared(rid: str, again: str, before: bytes, now: bytes) -> dict[str, Any]:
    """Return how two outputs (int32) differ. Pure."""
    first, second = memoryview(before).cast("i"), memoryview(now).cast("i")
    num = min(len(first), len(second))
    at = next((i for i in range(num) if first[i] != second[i]), num)
    equal = at == len(first) == len(second)
    shown = slice(at, at + NUM_SHOWN)
    return {
        "object": "request.replay", "id": rid, "replay": again, "equal": equal,
        "tokens": len(first), "tokens_now": len(second), "first_difference": None if equal else at,
        "before": [] if equal else first[shown].tolist(), "now": [] if equal else second[shown].tolist(),
    }  # fmt: skip

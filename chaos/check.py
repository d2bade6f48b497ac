"""Checks of everything that a client was shown and of the queue's records. Pure functions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from chaos.clients.asks import Expected
from chaos.clients.client import Attempt, Call
from chaos.faults import KILLS, Hit
from protocol.wire.messages import Delivery
from protocol.wire.records import RequestFacts

SLACK_S = 2.0
"""Maximum seconds from a fault to its effect on a client."""

DEAD_AFTER_S = 10.0
"""Seconds after a member's return during which its fault may still explain an error."""

EXCUSES = {
    "cut": {"gateway"},
    "shutting_down": {"gateway"},
    "cancelled": {"gateway"},  # the gateway was stopped for so long that it counted as dead
    "no_worker": {"worker", "queue"},
    "queue_unavailable": {"queue"},
    "queue_full": {"queue"},
    "request_lost": {"queue"},
    "job_not_found": {"queue"},
    "expired": {"queue"},
}
"""Error code that a client may get instead of its answer -> kinds of members, one of which must have been hit."""

RTOL, ATOL = 2e-3, 2e-4
"""Tolerances within which two float32 computations of one vector must agree."""

KILLS_OF_A_BASE = 3
"""Killed starts in a row after which the scheduler marks a base as failed for at least a minute: its `MAX_LOST`."""


def shown_wrongly(attempt: Attempt, expected: Expected) -> list[str]:
    """Return the errors in an attempt's output: each text must be a prefix of the expected one, and end once."""
    wrong: list[str] = []
    if expected.vector:
        if attempt.outcome == "complete":
            if len(attempt.vector) != len(expected.vector) or not np.allclose(
                attempt.vector, expected.vector, rtol=RTOL, atol=ATOL
            ):
                wrong.append(f"the vector begins {attempt.vector[:4]}, and the right one {expected.vector[:4]}")
            if attempt.usage.get("prompt_tokens") != expected.num_prompt_tokens:
                wrong.append(f"usage {attempt.usage} instead of {expected.num_prompt_tokens} tokens of the prompt")
    elif attempt.outcome == "complete":
        if attempt.text != expected.text:
            wrong.append(f"text differs from character {_common(attempt.text, expected.text)}")
        if attempt.finishes != [expected.finish]:
            wrong.append(f"ends: {attempt.finishes}")
        if attempt.num_done != 1:
            wrong.append(f"{attempt.num_done} times [DONE]")
        usage = (attempt.usage.get("prompt_tokens"), attempt.usage.get("completion_tokens"))
        if usage != (expected.num_prompt_tokens, expected.num_tokens):
            wrong.append(f"usage {usage} instead of {expected.num_prompt_tokens, expected.num_tokens}")
    else:
        if not expected.text.startswith(attempt.text):
            wrong.append(f"unfinished text differs from character {_common(attempt.text, expected.text)}")
        if len(attempt.finishes) > 1 or (attempt.finishes and attempt.text != expected.text):
            wrong.append(f"unfinished, but ends: {attempt.finishes}")
        if attempt.num_done:
            wrong.append("unfinished, but [DONE]")
    return wrong


def logged_wrongly(expected: Expected, facts: RequestFacts | None, ids: bytes, *, whole: bool) -> list[str]:
    """Return the errors in a request's log, which may only have expected tokens; if `whole`, all, and the end."""
    if not whole:
        return [] if expected.ids.startswith(ids) else [f"the log holds {_words(ids, expected.ids)}"]
    if facts is None:
        return ["the queue does not know the request"]
    wrong: list[str] = []
    if ids != expected.ids:
        wrong.append(f"the log holds {_words(ids, expected.ids)}")
    if (facts.state, facts.finish) != ("completed", expected.finish):
        wrong.append(f"the queue says {facts.state}, {facts.finish!r}")
    return wrong


def unexcused(attempt: Attempt, hits: Iterable[Hit]) -> str:
    """Return the error of an attempt that no fault explains, "" if a fault explains it or there is none."""
    if attempt.outcome == "complete":
        return ""
    code = "cut" if attempt.outcome == "cut" else attempt.code
    kinds, hits = EXCUSES.get(code, set()), list(hits)
    kills = [hit for hit in hits if hit.kind == "worker" and hit.how in KILLS and hit.at_s <= attempt.ended_s]
    if code == "base_failed" and len(kills) >= KILLS_OF_A_BASE:
        return ""
    for hit in hits:
        same = hit.kind != "gateway" or hit.url == attempt.url
        over_s = (hit.until_s or attempt.ended_s) + DEAD_AFTER_S
        if hit.kind in kinds and same and hit.at_s - SLACK_S <= attempt.ended_s and attempt.began_s <= over_s:
            return ""
    return f"{attempt.outcome} {attempt.code} {attempt.detail}".strip()


def lost_webhooks(never: Iterable[tuple[str, str]], waiting: Iterable[Delivery], max_tries: int) -> list[str]:
    """Return the errors of ends that no webhook reported.

    never: (type of the event, id of the job or batch). waiting: deliveries still in the queue. One with more than
    `max_tries` attempts counts as late: the driver waits for no more than that number.
    """
    known = {(one.type, one.subject): one for one in waiting}
    wrong: list[str] = []
    for type_, id_ in sorted(never):
        delivery = known.get((type_, id_))
        if delivery is None:
            wrong.append(f"no webhook has told of {type_} {id_}, and none waits")
        elif delivery.attempts <= max_tries:
            wrong.append(f"the webhook of {type_} {id_} waits after {delivery.attempts} attempts: {delivery.error}")
    return wrong


def longest_pause(call: Call, at_s: float, horizon_s: float) -> float | None:
    """Return the longest pause around `at_s` in the text of a call, in s; None if the call was not running then.

    horizon_s: pauses that begin later than this after `at_s` do not count.
    """
    times = [when for when, _ in call.progress]
    if len(times) < 2 or not times[0] <= at_s < times[-1]:
        return None
    gaps = [(b - a) for a, b in itertools.pairwise(times) if b > at_s and a < at_s + horizon_s]
    return max(gaps, default=None)


def percentile(values: list[float], q: float) -> float:
    """Return the q-quantile (0 to 1) of `values`: the nearest value."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _words(ids: bytes, right: bytes) -> str:
    same = next((i for i in range(0, len(ids), 4) if ids[i : i + 4] != right[i : i + 4]), len(ids))
    more = list(memoryview(ids[same : same + 12]).cast("i"))
    return f"{len(ids) // 4} tokens, right up to {same // 4} of {len(right) // 4}, then {more}"

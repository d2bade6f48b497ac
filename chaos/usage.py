"""Checks the fleet's usage against the clients' calls: at least the usage shown, at most the usage caused."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from chaos.clients.asks import Expected
from chaos.clients.client import Attempt, Call
from protocol.queue.books.usage import DAY_S
from protocol.queue.bus import Bus, now_ms
from protocol.wire.messages import HistoryEntry

AT_THE_DOOR = "so that another one can take the request"
"""Part of the error of calls that a gateway refuses while it shuts down; other calls may have been queued."""

ENDED_503 = {"base_failed", "no_worker"}
"""Codes of requests that the scheduler ends with 503, so that their Idempotency-Key may be used again."""

SLACK_MS = 1000.0
"""Maximum milliseconds between the clocks of driver and queue, which share a machine, including rounding."""

Counts = tuple[int, int, int]
"""Number of requests, prompt tokens and output tokens."""


@dataclass(slots=True)
class Books:
    """Bounds of the fleet's usage by model: usage shown to clients, and usage that they may have caused."""

    least: dict[str, Counts] = field(default_factory=dict[str, Counts])
    most: dict[str, Counts] = field(default_factory=dict[str, Counts])
    calls: list[Call] = field(default_factory=list[Call])

    def note(self, call: Call, expected: Expected) -> None:
        """Add a call of a client that got its answer or gave up."""
        counts = (1, expected.num_prompt_tokens, expected.num_tokens)
        num_taken = sum(map(may_have_run, call.attempts))
        if call.is_keyed:  # attempts with one key are one request
            num_taken = 1 + sum(attempt.code in ENDED_503 for attempt in call.attempts)
        self._add(self.least, call.ask.model, int(call.is_complete), counts)
        self._add(self.most, call.ask.model, num_taken, counts)
        self.calls.append(call)

    def _add(self, to: dict[str, Counts], model: str, times: int, counts: Counts) -> None:
        a, b, c = to.get(model, (0, 0, 0))
        to[model] = (a + times * counts[0], b + times * counts[1], c + times * counts[2])

    def wrong(self, counted: Mapping[str, Counts], *, may_lack: bool, may_exceed: bool) -> list[str]:
        """Return the errors in the counted usage, by model.

        may_lack: the queue has lost its last second of writes. may_exceed: others ask the same models.
        """
        found: list[str] = []
        for model in sorted({*self.least, *counted}):
            nothing = (0, 0, 0)
            have, least, most = (where.get(model, nothing) for where in (counted, self.least, self.most))
            if not may_lack and any(a < b for a, b in zip(have, least, strict=True)):
                found.append(f"usage of {model} is {have}, and clients were told {least}")
            if not may_exceed and any(a > b for a, b in zip(have, most, strict=True)):
                found.append(f"usage of {model} is {have}, and clients can have caused {most}")
        return found


def may_have_run(attempt: Attempt) -> bool:
    """Return whether an attempt may have been computed.

    An attempt that ended with an error may have reached the queue, unless the error is one of calls that are not let
    in.
    """
    if attempt.outcome != "refused":
        return True
    return attempt.code != "queue_full" and not (attempt.code == "shutting_down" and AT_THE_DOOR in attempt.detail)


def counts(entry: HistoryEntry) -> bool:
    """Return whether an ended request counts: it completed, or made a token."""
    return entry.state == "completed" or (entry.state != "refused" and entry.num_output_tokens > 0)


def unexplained(calls: Sequence[Call], entries: Iterable[HistoryEntry], since_ms: float) -> list[HistoryEntry]:
    """Return the counted requests that no attempt of a client can have caused; each attempt causes at most one.

    since_ms: unix time at which the clients' clock was 0. Attempts are matched in the order of their ends.
    """
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)  # model -> times of attempts, unix ms
    for call in calls:
        spans[call.ask.model] += [
            (since_ms + 1000 * began_s - SLACK_MS, since_ms + 1000 * ended_s + SLACK_MS)
            for began_s, ended_s in _spans(call)
        ]
    left: list[HistoryEntry] = []
    for entry in sorted(filter(counts, entries), key=lambda one: one.submitted_ms):
        own = spans[entry.model]
        fitting = [span for span in own if span[0] <= entry.submitted_ms <= span[1]]
        if fitting:
            own.remove(min(fitting, key=lambda span: span[1]))
        else:
            left.append(entry)
    return left


def _spans(call: Call) -> list[tuple[float, float]]:
    if call.is_keyed:
        num = 1 + sum(attempt.code in ENDED_503 for attempt in call.attempts)
        return [(call.attempts[0].began_s, call.attempts[-1].ended_s)] * num
    return [(one.began_s, one.ended_s) for one in call.attempts if may_have_run(one)]


async def wrong_usage(
    bus: Bus, tenant: str, books: Books, more_bases: Sequence[str], *, may_lack: bool, may_exceed: bool
) -> list[str]:
    """Return the errors in a tenant's counted usage, and its requests that no client has caused.

    more_bases: names of the base models besides the first, which is asked as `base`. Batch lines are counted
    separately.
    """
    today = now_ms() // (DAY_S * 1000)
    counted: dict[str, Counts] = {}
    for day in (today - 1, today):
        for row in await bus.usage.rows(day, tenant):
            if not row.batch:
                model = row.model if row.digest or row.model in more_bases else "base"
                a, b, c = counted.get(model, (0, 0, 0))
                counted[model] = (a + row.requests, b + row.prompt_tokens, c + row.output_tokens)
    wrong = books.wrong(counted, may_lack=may_lack, may_exceed=may_exceed)
    if not wrong:
        return []
    entries = [entry async for _, _, entry in bus.history.walk([tenant], 0, 0, None) if entry is not None]
    renamed = [
        entry if entry.digest or entry.model in more_bases else msgspec.structs.replace(entry, row='["base",""]')
        for entry in entries
    ]
    since_ms = 1000 * (time.time() - time.monotonic())
    return wrong + [f"no client has caused {entry}" for entry in unexplained(books.calls, renamed, since_ms)]

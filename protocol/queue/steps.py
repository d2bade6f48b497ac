"""What a worker writes after an engine step, and how the step script takes and refuses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

import msgspec

from protocol.wire import messages as m
from protocol.wire.records import run_field


class StepRow(msgspec.Struct):  # a dataclass takes three times as long to make, and each row of each step has one
    """One request's share of a step: tokens `[seq0, seq0 + len(ids) / 4)`, and its end if it ended."""

    rid: str
    epoch: int
    seq0: int
    ids: bytes = b""  # int32 little endian
    logprobs: bytes = b""  # `messages.logprob_record_bytes` per id
    state: str = ""  # "", or a value of `messages.TERMINAL`
    finish: str = ""
    error: str = ""  # JSON of `messages.ErrorInfo`
    prompt_logprobs: bytes = b""  # with the first token: the prompt (int32), then its records
    num_cached: int = 0  # of one that ended: tokens of its prompt that the prefix cache had
    note: bytes = b""  # `messages.Timing`, with the first token of an assignment and with its end


@dataclass(slots=True)
class Step:
    """What one engine step makes visible."""

    rows: list[StepRow] = field(default_factory=list[StepRow])
    outs: dict[str, list[m.Delta]] = field(default_factory=dict[str, list[m.Delta]])  # gateway -> its deltas
    ended: list[m.Ended] = field(default_factory=list[m.Ended])
    done_entries: list[bytes] = field(default_factory=list[bytes])  # assignments whose last request this step ends


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that the step script would not write, and why."""

    rid: str
    code: Literal["missing", "terminal", "stale", "cancelled", "length"]
    epoch: int  # of the request now
    length: int  # of its log, in tokens


def step_args(step: Step, sealed: Callable[[StepRow], bytes] = attrgetter("prompt_logprobs")) -> list[Any]:
    """Return the arguments of `step.lua`; `sealed` returns a row's prompt logprobs as they lie in the queue."""
    rows: list[Any] = []
    logprobs: list[Any] = []
    ends: list[Any] = []
    notes: list[Any] = []
    for row in step.rows:
        rows += (row.rid, str(row.epoch), row.seq0, len(row.ids))
        if row.ids and row.logprobs:
            logprobs += (row.rid, row.seq0, row.logprobs)
        if row.prompt_logprobs:
            logprobs += (row.rid, "prompt", sealed(row))
        if row.state:
            ends += (row.rid, row.state, row.finish, row.error, row.num_cached)
        if row.note:
            notes += (row.rid, run_field(row.epoch), row.note)
    ids = b"".join([row.ids for row in step.rows])
    outs = [part for gid, deltas in step.outs.items() for part in (gid, m.encode(deltas))]
    counts = [len(logprobs) // 3, len(ends) // 5, len(notes) // 3, len(step.outs)]
    ended = m.encode(step.ended) if step.ended else b""
    return [msgspec.msgpack.encode(rows), ids, *counts, ended, *logprobs, *ends, *notes, *outs, *step.done_entries]


def refused_rows(reply: Sequence[Any]) -> list[Refused]:
    """Read the reply of `step.lua`."""
    return [
        Refused(reply[i].decode(), reply[i + 1].decode(), reply[i + 2], reply[i + 3]) for i in range(0, len(reply), 4)
    ]

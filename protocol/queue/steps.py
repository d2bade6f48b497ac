"""What a worker writes after an engine step: the call of the step script and its reply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

import msgspec

from protocol.queue import signatures as lua
from protocol.wire import messages as m
from protocol.wire.keys import Keys
from protocol.wire.records import run_field


class StepRow(msgspec.Struct):  # a dataclass takes three times as long to create, and every step creates many
    """One request's share of a step: tokens `[seq0, seq0 + len(ids) / 4)`, and its end if it has ended."""

    rid: str
    epoch: int
    seq0: int
    ids: bytes = b""  # int32 little endian
    logprobs: bytes = b""  # `messages.logprob_record_bytes` per id
    state: str = ""  # "": it has not ended, else one of `messages.TERMINAL`
    finish: str = ""
    error: str = ""  # JSON of `messages.ErrorInfo`
    prompt_logprobs: bytes = b""  # with the first token: the prompt (int32), then its logprob records
    num_cached: int = 0  # of an ended request: prompt tokens found in the prefix cache
    note: bytes = b""  # `messages.Timing`, with the first token of an assignment and with its end


@dataclass(slots=True)
class StepResult:
    """What one engine step makes visible."""

    rows: list[StepRow] = field(default_factory=list[StepRow])
    outs: dict[str, list[m.Delta]] = field(default_factory=dict[str, list[m.Delta]])  # gateway -> its deltas
    ended: list[m.Ended] = field(default_factory=list[m.Ended])
    done_entries: list[bytes] = field(default_factory=list[bytes])  # entries of batches whose last request ends here


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that the step script refused, and why."""

    rid: str
    code: Literal["missing", "terminal", "stale", "cancelled", "length"]
    epoch: int  # the request's current epoch
    length: int  # tokens in its log


def step_call(
    step: StepResult, wid: str, keys: Keys, sealed: Callable[[StepRow], bytes] = attrgetter("prompt_logprobs")
) -> lua.Step:
    """Return the script call that writes a worker's step. sealed: returns a row's prompt logprobs as stored."""
    rows: list[Any] = []
    logprobs: list[lua.LogprobRow] = []
    ends: list[lua.EndRow] = []
    notes: list[lua.NoteRow] = []
    for row in step.rows:
        rows += (row.rid, str(row.epoch), row.seq0, len(row.ids))
        if row.ids and row.logprobs:
            logprobs.append(lua.LogprobRow(rid=row.rid, seq0=row.seq0, records=row.logprobs))
        if row.prompt_logprobs:
            logprobs.append(lua.LogprobRow(rid=row.rid, seq0="prompt", records=sealed(row)))
        if row.state:
            ends.append(
                lua.EndRow(rid=row.rid, state=row.state, finish=row.finish, error=row.error, cached=row.num_cached)
            )
        if row.note:
            notes.append(lua.NoteRow(rid=row.rid, field=run_field(row.epoch), timing=row.note))
    return lua.Step(
        work=keys.work(wid), ended_stream=keys.ended, own=keys.own(wid),
        rows=msgspec.msgpack.encode(rows), ids=b"".join([row.ids for row in step.rows]),
        num_logprobs=len(logprobs), num_ends=len(ends), num_notes=len(notes), num_outs=len(step.outs),
        ended=m.encode(step.ended) if step.ended else b"", logprobs=logprobs, ends=ends, notes=notes,
        outs=[lua.OutRow(gateway=gid, deltas=m.encode(deltas)) for gid, deltas in step.outs.items()],
        done=step.done_entries,
    )  # fmt: skip


def refused_rows(reply: Sequence[Any]) -> list[Refused]:
    """Decode the reply of `step.lua`."""
    return [
        Refused(reply[i].decode(), reply[i + 1].decode(), reply[i + 2], reply[i + 3]) for i in range(0, len(reply), 4)
    ]

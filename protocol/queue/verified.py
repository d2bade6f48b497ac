"""What a worker was found to own, so that going on with it needs neither a look nor a write for each request. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from protocol.queue.bus import StepRow

FLUSH_EVERY = 16
"""Steps that a worker's journal holds before it is moved into the logs."""


@dataclass(slots=True)
class Plan:
    """How the rows of one step are written."""

    looked_at: list[StepRow] = field(default_factory=list)  # their logs are written
    tails: list[bytes] = field(default_factory=list)  # for each, what only the journal may hold of it
    journaled: list[StepRow] = field(default_factory=list)
    flush: bool = False  # move the journal into the logs first


class Verified:
    """What one worker was found to own at one version of its `own` hash, in one life of the queue's server."""

    def __init__(self) -> None:
        self.version = b""
        self._next: dict[str, tuple[int, int]] = {}  # request -> its epoch, and length of its log with the journal
        self._tails: dict[str, bytes] = {}  # ids that the journal holds, and maybe no log
        self._num_journaled = 0  # steps in the journal

    def forget(self) -> None:
        """Nothing is certain: the server has started anew, refused a step, or did not answer."""
        self.version = b""
        self._next.clear()
        self._tails.clear()
        self._num_journaled = 0

    def plan(self, rows: Iterable[StepRow]) -> Plan:
        """Return how to write `rows`.

        Looked at are, beside unknown ones, ends; first tokens, whose request may have expired; and rows with
        logprobs, whose repetition would go unnoticed without their logs.
        """
        plan = Plan(flush=self._num_journaled >= FLUSH_EVERY)
        for row in rows:
            is_known = self._next.get(row.rid) == (row.epoch, row.seq0)
            if is_known and row.seq0 and row.ids and not (row.state or row.logprobs or row.prompt_logprobs):
                plan.journaled.append(row)
            else:
                plan.looked_at.append(row)
                plan.tails.append(self._tails.get(row.rid, b"") if is_known else b"")
                if not is_known and row.rid in self._tails:
                    plan.flush = True
        return plan

    def note(self, version: bytes, plan: Plan) -> None:
        """Note that a step was written as planned, and that its rows are owned at `version` (b"": nobody knows)."""
        goes_on = bool(version) and version == self.version
        if not goes_on:  # every row was looked at, and the journal emptied; or nobody knows
            self.forget()
            self.version = version
        elif plan.flush:
            self._tails.clear()
            self._num_journaled = 0
        if not version:
            return
        for row in (*plan.looked_at, *plan.journaled):
            if row.state:
                self._next.pop(row.rid, None)
            else:
                self._next[row.rid] = row.epoch, row.seq0 + len(row.ids) // 4
        for row in plan.looked_at:
            self._tails.pop(row.rid, None)
        if goes_on and plan.journaled:
            for row in plan.journaled:
                self._tails[row.rid] = self._tails.get(row.rid, b"") + row.ids
            self._num_journaled += 1

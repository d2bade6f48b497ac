"""A request in the scheduler, from its submission to its end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from protocol.wire import messages as m

Key = TypeVar("Key")

BASE = ""
"""The digest of requests for the base model."""


class Candidate(NamedTuple):
    """A worker that could take a request."""

    name: str
    wait_ms: float  # estimated
    tier: int  # see `workers.Tier`
    crowded: bool  # whether it has more than its share of the requests


@dataclass(frozen=True, slots=True)
class WorkerChoice:
    """Why a worker was chosen for a request."""

    because: str  # one of `messages.REASONS`
    chosen: Candidate
    candidates: list[Candidate]  # in the order of the scan, including the chosen one


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """One request that has not ended. `wid` is the worker that it is assigned to, "" while it is queued."""

    submit: m.RequestHead
    epoch: int  # as read from the queue; its assignment has epoch + 1
    attempts: int = 0  # workers that died under it before it made progress
    order: int = 0  # order of arrival
    wid: str = ""
    dropped: bool = False  # it has left the backlog; heaps discard it when they reach it
    input_charged: bool = False
    output_charged: int = 0  # output tokens charged so far; -1: those that are already in the log are not charged
    start_tokens: int = 0  # length of the log at its assignment; -1: not known yet
    started: bool = False  # whether it has made progress since its assignment
    ready: bool = False  # whether its adapter is resident on its worker, so that it takes a slot there
    reserved_tokens: int = 0  # prefill and expected output, as counted for its worker
    held_since_ms: float = -1.0  # ms since which it is held for a worker with its adapter; -1: it is not
    held_until_ms: float = 0.0
    yields: bool = False  # whether it yields to requests of other tenants, see `FairShares`
    alone: bool = False  # whether it yields only because its tenant is alone
    since_ms: int = 0  # unix ms when it was queued again; 0: only at its submission
    assigned_ms: int = 0  # unix ms; 0: not known
    choice: WorkerChoice | None = None  # the last choice of a worker for it

    @property
    def rid(self) -> str:
        """The request's id."""
        return self.submit.rid

    @property
    def resumed(self) -> bool:
        """Whether a worker has had it before: it was handed back, or its worker died."""
        return self.epoch > 0

    @property
    def sort_key(self) -> tuple[int, int]:
        """Earliest deadline first, then order of arrival."""
        return self.submit.deadline_ms, self.order


def decrement(counter: Counter[Key], key: Key) -> None:
    """Decrement a count, and remove the key when its count reaches zero."""
    counter[key] -= 1
    if not counter[key]:
        del counter[key]

"""A request as the scheduler sees it, from its submission to its end."""

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
    crowded: bool  # it has more than its share of the requests


@dataclass(frozen=True, slots=True)
class WorkerChoice:
    """Why a worker was chosen for a request."""

    because: str  # one of `messages.REASONS`
    chosen: Candidate
    candidates: list[Candidate]  # candidates in scan order, including the chosen one


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """One request that has not ended. `wid`, the worker it is assigned to, is "" while it is queued."""

    submit: m.RequestHead
    epoch: int  # epoch read from the queue; its assignment carries epoch + 1
    attempts: int = 0  # workers that died while they had it and before it made progress
    order: int = 0  # order of arrival
    wid: str = ""
    dropped: bool = False  # left the backlog; its containers discard it when they come to it
    input_charged: bool = False
    output_charged: int = 0  # output tokens charged so far; -1: charge none of those that the log already holds
    start_tokens: int = 0  # length of the log when its worker got it; -1: not seen yet
    started: bool = False  # True: progress since then
    ready: bool = False  # its adapter is resident on its worker, so it takes a slot there
    reserved_tokens: int = 0  # prefill and expected output, as counted on its worker
    held_since_ms: float = -1.0  # when it was first held for a worker with its adapter; -1: never
    held_until_ms: float = 0.0
    yields: bool = False  # to requests of other tenants, see `FairShares`
    alone: bool = False  # it yields only because its tenant was alone
    since_ms: int = 0  # when it came to the backlog, unix time; 0: as it was submitted
    assigned_ms: int = 0  # unix time, 0 while that is not known
    choice: WorkerChoice | None = None  # worker that it was last offered to

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
    """Count one less, and remove the key when its count reaches zero."""
    counter[key] -= 1
    if not counter[key]:
        del counter[key]

"""Scheduler to worker: requests to run, and orders."""

from __future__ import annotations

from typing import Literal

from protocol.wire.messages.base import Packed, Wire


class Assigned(Packed, frozen=True):
    """One request of a batch that is assigned to a worker."""

    rid: str
    epoch: int
    digest: str
    tenant: str = ""
    gateway: str = ""
    yields: bool = False  # its tenant has more than its fair share, or is alone: it yields to requests of other tenants
    choice: int = 0  # `choice`, `call` and `part` are as in `RequestHead`
    call: str = ""
    part: int = 0
    batch: bool = False  # class `batch`: yields to all other requests
    queued_ms: int = 0  # ms from submission to this assignment
    trace: str = ""  # see `RequestHead.trace`
    alone: bool = False  # it yields only because no other tenant has asked recently; see `FairShares`


REASONS = {
    "least_wait": "the shortest estimated wait",
    "only_place": "no other worker could take it",
    "all_crowded": "the shortest estimated wait; all had more than their share of requests",
    "held_enough": "it had waited for a worker with its adapter as long as loading takes",
    "resumed": "resumed: the shortest estimated wait of workers with free slots",
}
"""Why a worker was chosen for a request, by the value of `Placed.because`."""


class Option(Packed, frozen=True):
    """A candidate worker for a request, as the scheduler saw it."""

    worker: str  # name
    wait_ms: int  # estimated ms until the request would end there: queued prompts, loading its adapter, its own decode
    tier: str  # tier of its adapter: resident, loading, host or store; "" for the base model
    crowded: bool = False  # it had more than its share of the requests, so any other worker was preferred


class Placed(Packed, frozen=True):
    """Why a request was assigned to a worker; the request's record keeps one for each assignment."""

    ms: int  # unix time
    wid: str
    because: str  # one of `REASONS`
    options: list[Option]  # candidates, at most 4: the chosen one, then the others by increasing wait
    num_others: int = 0  # candidates beyond these
    held_ms: int = 0  # ms for which it was held for a worker with its adapter
    yields: bool = False  # to requests of tenants that have less than their fair share
    lead_tokens: int = 0  # weighted tokens by which its tenant was ahead of the tenant served least
    num_queued: int = 0  # requests that were still waiting at that time


class Control(Wire, frozen=True):
    """An order to one worker."""

    kind: Literal["cancel", "prefetch", "pin", "unpin", "evict", "queued", "drain", "resume", "serve"]
    rid: str = ""
    digest: str = ""
    digests: list[str] = []  # `queued`: adapters that waiting requests need and that should stay resident
    order: str = ""  # `evict`: id that the answering event repeats
    base: str = ""  # `serve`: name of the base to which the worker is to switch

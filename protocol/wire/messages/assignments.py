"""Scheduler to worker: requests to run, and orders."""

from __future__ import annotations

from typing import Literal

from protocol.wire.messages.base import Packed, Wire


class Assigned(Packed, frozen=True):
    """One request of an assignment."""

    rid: str
    epoch: int
    digest: str
    tenant: str = ""
    gateway: str = ""
    yields: bool = False  # its tenant has more than its fair share: it yields to requests of tenants that have less
    choice: int = 0  # this and the next two as in `Submit`
    call: str = ""
    part: int = 0
    batch: bool = False  # of the class `batch`: it yields to all that is not


class Control(Wire, frozen=True):
    """An order to one worker."""

    kind: Literal["cancel", "prefetch", "pin", "unpin", "evict", "queued"]
    rid: str = ""
    digest: str = ""
    digests: list[str] = []  # of `queued`: adapters that waiting requests need, which should stay
    order: str = ""  # of `evict`: id that the answering event repeats

"""What the queue stores about a request, read from its hash; returned by `protocol.queue.bus`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from protocol.wire import messages as m

FIRST_NOTES = LAST_NOTES = 8
"""How many of a request's first and of its last assignments have notes in its hash."""


def _slot(epoch: int) -> int:
    """Return an assignment's slot for notes, as `note_slot` in `common.lua` does. Assignments have the odd epochs."""
    number = (epoch + 1) // 2
    return number if number <= FIRST_NOTES else FIRST_NOTES + 1 + (number - FIRST_NOTES - 1) % LAST_NOTES


def run_field(epoch: int) -> str:
    """Return the field of a request's hash that holds the `messages.Timing` of an assignment."""
    return f"run:{_slot(epoch)}"


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """The state of a request. Times are unix ms, 0 for what has not happened."""

    state: str
    epoch: int
    finish: str
    error: str  # JSON of `messages.ErrorInfo`
    gateway: str
    num_prompt_tokens: int
    num_output_tokens: int
    attempts: int
    submitted_ms: int
    first_ms: int
    ended_ms: int
    assigned_ms: int = 0  # when it was assigned to its last worker

    @property
    def is_terminal(self) -> bool:
        """Whether the request has ended."""
        return self.state in m.TERMINAL


@dataclass(frozen=True, slots=True)
class Assignment:
    """One assignment of a request, as far as the request's record has it."""

    placed: m.Placed
    timing: m.Timing | None = None  # None: the worker has reported nothing
    left_ms: int = 0  # when the request was taken from the worker; 0: it was not
    left_how: str = ""  # "died" or "handed back"


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """All that the queue stores about a request, except its prompt and its tokens."""

    facts: RequestFacts
    tenant: str
    cls: str
    digest: str
    model: str  # requested model, as shown by the API
    call: str
    num_cached_tokens: int
    num_ahead: int  # waiting requests of its class at its arrival
    deadline_ms: int
    assignments: list[Assignment]  # in order; of many, the middle ones are missing
    base: str = ""  # name of its base


class RequestSummary(NamedTuple):
    """What a list shows of a request that has not ended: its future history entry, and facts not in that entry."""

    entry: m.HistoryEntry  # with the wid of its owner instead of a worker's name
    tenant: str  # the tenant as the API shows it
    digest: str  # digest of its adapter or merge; "" for the base model


@dataclass(frozen=True, slots=True)
class Holder:
    """The current owner of a request."""

    state: str
    owner: str  # wid; "" while it is queued
    digest: str  # digest of its adapter, "" for the base model


@dataclass(slots=True)
class AdapterUse:
    """How often an adapter was used: in the whole fleet, or on one worker since its last report."""

    hits: int = 0  # requests that found it in the pool of their worker
    misses: int = 0  # requests that did not
    last_ms: int = 0  # unix time of the last request
    fetches: int = 0  # fetches from a store to a worker's host memory
    fetch_ms: int = 0  # ms of all fetches together
    loads: int = 0  # loads from host memory into a pool
    load_ms: int = 0  # ms of all loads together


@dataclass(frozen=True, slots=True)
class Owned:
    """A request and its owner, as the scheduler needs them after a worker's death."""

    submit: m.RequestHead
    state: str
    owner: str
    epoch: int
    attempts: int
    deaths: list[m.Death]  # workers that died under it
    num_output_tokens: int

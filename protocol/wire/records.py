"""What the queue says of a request, read from its hash; `protocol.queue.bus` returns these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from protocol.wire import messages as m

FIRST_NOTES = LAST_NOTES = 8
"""Assignments of a request of which notes are kept in its hash: the first and the last ones."""


def _slot(epoch: int) -> int:
    """Return the place of an assignment's notes, as `note_slot` of `common.lua`. Assignments have the odd epochs."""
    number = (epoch + 1) // 2
    return number if number <= FIRST_NOTES else FIRST_NOTES + 1 + (number - FIRST_NOTES - 1) % LAST_NOTES


def run_field(epoch: int) -> str:
    """Return the field of a request's hash that holds the times of an assignment (`messages.Timing`)."""
    return f"run:{_slot(epoch)}"


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What the queue knows of a request; times are unix milliseconds, 0 for what has not happened."""

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
    assigned_ms: int = 0  # to its last worker

    @property
    def is_terminal(self) -> bool:
        """Whether it has ended."""
        return self.state in m.TERMINAL


@dataclass(frozen=True, slots=True)
class Assignment:
    """One assignment of a request, as far as its record has it."""

    placed: m.Placed
    timing: m.Timing | None = None  # None: nothing came of it, or not yet
    left_ms: int = 0  # when it was taken from the worker; 0: it was not
    left_how: str = ""  # "died" or "handed back"


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """All that the queue keeps of a request, but its prompt and its tokens."""

    facts: RequestFacts
    tenant: str
    cls: str
    digest: str
    model: str  # requested model, as shown by the API
    call: str
    num_cached_tokens: int
    num_ahead: int  # requests of its class that waited when it came
    deadline_ms: int
    assignments: list[Assignment]  # assignments in order; of very many, the first and the last ones
    base: str = ""  # name of its base


class RequestSummary(NamedTuple):
    """What a list says of a request that has not ended: as the history will, and what that does not say."""

    entry: m.HistoryEntry  # the wid of its owner in place of a worker's name
    tenant: str  # the tenant as the API shows it
    digest: str  # digest of its adapter, also of a merge; "" for the base model


@dataclass(frozen=True, slots=True)
class Holder:
    """The present owner of a request."""

    state: str
    owner: str  # wid; "" while it is queued
    digest: str  # digest of its adapter, "" for the base model


@dataclass(slots=True)
class AdapterUse:
    """How often an adapter was used: in the whole fleet, or on one worker since it last reported. Times in ms."""

    hits: int = 0  # requests that found it in their worker's pool
    misses: int = 0  # requests that did not
    last_ms: int = 0  # unix time of the last request
    fetches: int = 0  # fetches from a store to a worker's host memory
    fetch_ms: int = 0  # all fetches together
    loads: int = 0  # loads from host memory into a pool
    load_ms: int = 0


@dataclass(frozen=True, slots=True)
class Owned:
    """A request and who has it, as the scheduler needs it after a death."""

    submit: m.RequestHead
    state: str
    owner: str
    epoch: int
    attempts: int
    deaths: list[m.Death]  # workers that died under it
    num_output_tokens: int

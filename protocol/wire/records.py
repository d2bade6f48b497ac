"""What the queue says of a request, read from its hash; `protocol.queue.bus` returns these."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.wire import messages as m


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
class Holder:
    """The present owner of a request."""

    state: str
    owner: str  # wid; "" while it is queued
    digest: str  # of its adapter, "" for the base model


@dataclass(slots=True)
class AdapterUse:
    """How often an adapter was used: in the whole fleet, or on one worker since it last reported. Times in ms."""

    hits: int = 0  # requests that found it in their worker's pool
    misses: int = 0  # requests that did not
    last_ms: int = 0  # unix time of the last request
    fetches: int = 0  # from a store to a worker's host memory
    fetch_ms: int = 0  # all fetches together
    loads: int = 0  # from host memory into a pool
    load_ms: int = 0


@dataclass(frozen=True, slots=True)
class Owned:
    """A request and who has it, as the scheduler needs it after a death."""

    submit: m.Submit
    state: str
    owner: str
    epoch: int
    attempts: int
    deaths: list[m.Death]  # workers that died under it
    num_output_tokens: int

"""What the queue says of a request, read from its hash; `protocol.bus` returns these."""

from __future__ import annotations

from dataclasses import dataclass

from protocol import messages as m


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

    @property
    def is_terminal(self) -> bool:
        return self.state in m.TERMINAL


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

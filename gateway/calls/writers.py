"""*Write*, the last stage: what every API's writer has in common. Each has its own in its `write`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gateway.calls.choices import Piece

MIN_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes this for what is impossible


@dataclass(slots=True)
class Usage:
    """Tokens of a whole call; each prompt counts once."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def event(body: bytes) -> bytes:
    """Frame one JSON text."""
    return b"data: " + body + b"\n\n"


def comment(text: str) -> bytes:
    """Frame what keeps a connection alive and is no event; with a text, tell whoever reads along what it waits for."""
    return f": {text or 'ping'}\n\n".encode()


class Writer(Protocol):
    """One endpoint's way of writing."""

    def frames(self, piece: Piece) -> bytes:
        """Return the SSE frames of a piece; b"" when it shows nothing yet."""
        ...

    def usage_frame(self, usage: Usage) -> bytes:
        """Return the frame after the last choice's end."""
        ...

    def show_usage(self, usage: Usage) -> None:
        """Let the frames from now on tell a call's usage so far."""
        ...

    def whole(self, choices: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """Return the answer of a call that was not streamed."""
        ...


def shown_logprob(logprob: float) -> float | None:
    """Return a logprob as JSON has it; None for a prompt's first token, which nothing comes before."""
    return None if math.isnan(logprob) else max(logprob, MIN_LOGPROB)

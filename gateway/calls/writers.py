"""*Write*, the last stage: what the writers of all APIs share. Each API has its own in its module `write`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.calls.choices import Piece

MIN_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes this for what is impossible


@dataclass(slots=True)
class CallUsage:
    """The tokens of a call; each prompt counts once."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def json(self) -> dict[str, Any]:
        """Return the `usage` of an answer."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def event(body: bytes) -> bytes:
    """Return one JSON text as an event."""
    return b"data: " + body + b"\n\n"


def comment(text: str) -> bytes:
    """Return a comment, which keeps a connection alive and is no event; `text` says what the call waits for."""
    return f": {text or 'ping'}\n\n".encode()


@dataclass(frozen=True, slots=True)
class Framing:
    """How the parts of a stream stand one after the other."""

    media_type: bytes
    event: Callable[[bytes], bytes]  # turns one JSON text into an event
    idle: Callable[[str], bytes]  # a part that only keeps the connection alive; takes what the call waits for

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers of a stream."""
        return [(b"content-type", self.media_type), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


SSE = Framing(b"text/event-stream; charset=utf-8", event, comment)
"""Server-sent events."""

DONE = b"data: [DONE]\n\n"
"""The last event of a stream of OpenAI's."""


class Writer:
    """How one endpoint writes its answers. A writer that has this as its base writes nothing of what it leaves out."""

    def frames(self, piece: Piece) -> Iterable[bytes]:
        """Return the frames of a piece, each a whole one; none when it shows nothing yet.

        Each is made in a few milliseconds at most. Those of a piece with more tokens are made as they are asked for.
        """
        return ()

    def usage_frame(self, usage: CallUsage) -> bytes:
        """Return the frame after the last choice's end; none where the last frame has the counts."""
        return b""

    def show_usage(self, usage: CallUsage) -> None:
        """Include a call's usage so far in all following frames, where frames before the last have counts."""

    def whole(self, choices: Sequence[Piece], usage: CallUsage) -> dict[str, Any]:
        """Return the answer of a call that was not streamed."""
        return {}


def shown_logprob(logprob: float) -> float | None:
    """Return a logprob as JSON has it; None for NaN, the logprob of a prompt's first token."""
    return None if math.isnan(logprob) else max(logprob, MIN_LOGPROB)

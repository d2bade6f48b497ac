"""*Write*, the last stage: the code that the writers of all APIs share. Each API has its own module `write`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.calls.choices import Piece

MIN_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes this for an impossible token


@dataclass(slots=True)
class CallUsage:
    """Token counts of a call; each prompt counts once."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def json(self) -> dict[str, Any]:
        """Return the `usage` object of an answer."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def event(body: bytes) -> bytes:
    """Return a JSON text as a server-sent event."""
    return b"data: " + body + b"\n\n"


def comment(text: str) -> bytes:
    """Return an SSE comment, which keeps a connection alive. text: what the call waits for."""
    return f": {text or 'ping'}\n\n".encode()


@dataclass(frozen=True, slots=True)
class Framing:
    """How a stream's parts are delimited."""

    media_type: bytes
    event: Callable[[bytes], bytes]  # turns one JSON text into an event
    idle: Callable[[str], bytes]  # returns a keep-alive part; takes what the call waits for

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers of a stream."""
        return [(b"content-type", self.media_type), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


SSE = Framing(b"text/event-stream; charset=utf-8", event, comment)
"""Server-sent events."""

DONE = b"data: [DONE]\n\n"
"""The last event of a stream in OpenAI's API."""


class Writer:
    """How one endpoint writes its answers. This base class writes nothing."""

    def frames(self, piece: Piece) -> Iterable[bytes]:
        """Yield the complete frames of a piece; none while it shows nothing.

        Each takes at most a few milliseconds; the frames of a piece with more tokens are made lazily.
        """
        return ()

    def usage_frame(self, usage: CallUsage) -> bytes:
        """Return the usage frame that follows the last choice's end; b"" if the last frame has the counts."""
        return b""

    def show_usage(self, usage: CallUsage) -> None:
        """Include the call's usage so far in the following frames, in a stream where all frames have counts."""

    def whole(self, choices: Sequence[Piece], usage: CallUsage) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        return {}


def shown_logprob(logprob: float) -> float | None:
    """Return a logprob for JSON; None for NaN, the logprob of a prompt's first token."""
    return None if math.isnan(logprob) else max(logprob, MIN_LOGPROB)

"""*Write* for the Responses API: a response object, or the events that build it.

Events are made token by token and numbered from 0, so that every replay of a response has the same events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.answers.sse import GenerationAnswer
from gateway.calls.choices import Choice, Piece
from gateway.calls.follow import Generation, usage_of
from gateway.calls.submit import SubmittedCall
from gateway.calls.writers import SSE, CallUsage, Framing, Writer
from gateway.http.errors import OPENAI_ERRORS, OpenAIErrors, cut
from gateway.jobs.jobs import JobApi
from gateway.responses.output import Output
from gateway.responses.response_parse import parse_stored
from protocol.queue.bus import now_ms
from protocol.runtime.settings import Settings
from protocol.wire.errors import LorafleetError

ID_PREFIX = "resp_"

SILENT = 1 << 62
"""Larger than any event's number: no events are written."""

_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
"""Status of an error -> its code among those in the official client's types. All others are `server_error`."""


class StreamErrors(OpenAIErrors):
    """OpenAI's errors as responses; in a stream, the event `error`."""

    def body(self, error: LorafleetError) -> bytes:
        """Return the event's JSON for an error before any other event."""
        return error_json(error, 0)

    def response(self, error: LorafleetError, headers: Any = None) -> Any:
        """Return an error's response."""
        return OPENAI_ERRORS.response(error, headers)


def error_json(error: LorafleetError, number: int) -> bytes:
    """Return an event `error` as JSON."""
    told = {"type": "error", "sequence_number": number, "code": error.code, "message": cut(error.message)}
    return orjson.dumps({**told, "param": error.param})


STREAM_ERRORS = StreamErrors()
FRAMING = Framing(SSE.media_type, lambda body: b"event: error\ndata: " + body + b"\n\n", SSE.idle)
"""Frames errors and keep-alive parts in a stream."""


def error_event(error: LorafleetError) -> bytes:
    """Return the event of an error in a stream whose number of sent events is unknown."""
    return FRAMING.event(STREAM_ERRORS.body(error))


@dataclass(frozen=True, slots=True)
class End:
    """How a response has ended, or that it has not."""

    status: str  # status as in the object
    error: LorafleetError | None = None
    ended_ms: int = 0  # unix time

    @property
    def event(self) -> str:
        """The type of the last event; cancelled responses have none of their own."""
        return f"response.{'failed' if self.status == 'cancelled' else self.status}"


def end_of(piece: Piece, ended_ms: int) -> End:
    """Return the end of a response whose output ended normally."""
    return End("completed" if piece.finish == "stop" else "incomplete", None, ended_ms)


def failure_of(error: LorafleetError) -> End:
    """Return the end of a response that failed or was cancelled."""
    return End("cancelled") if error.code == "cancelled" else End("failed", error)


class ResponseWriter(Writer):
    """Writes the object of one response, and the events of its stream."""

    def __init__(self, call: SubmittedCall, choice: Choice) -> None:
        """choice: the call's only choice."""
        self.output = Output(call.id, choice.rid, choice.prompt.form, choice.prompt.files.tokens, call.parsed.options)
        self.after = -1 if call.parsed.options.stream else SILENT
        """Events up to this number are not written."""
        self.number = 0
        """The sequence number of the next event."""
        self._background = call.parsed.options.background
        self._head = {"id": ID_PREFIX + call.id, "object": "response", "created_at": call.created_ms // 1000}
        self._shown = call.parsed.shown
        self._ended_ms = call.ended_ms
        self._begun = self._is_running = False
        self._last = Piece(0)

    def first(self) -> list[bytes]:
        """Return the first events of a stream, once; in the background, they say that it is queued."""
        if self._begun:
            return []
        self._begun = True
        status = "queued" if self._background else "in_progress"
        out = self._event("response.created", {"response": self.object(End(status))})
        return out + self._event("response.queued", {"response": self.object(End(status))}) if self._background else out

    def _run(self) -> list[bytes]:
        """Return the events before the first one of the output, once."""
        if self._is_running:
            return []
        self._is_running = True
        return self.first() + self._event("response.in_progress", {"response": self.object(End("in_progress"))})

    def frames(self, piece: Piece) -> list[bytes]:
        """Return the events of a token, or of the output's end."""
        if piece.finish:
            self._last = piece
        out = self._run()
        for event in self.output.read(piece):
            out += self._event(*event)
        return out

    def last(self, end: End | None, usage: CallUsage) -> list[bytes]:
        """Return the events that end a stream. end: None for the output's own end."""
        out = self._run()
        end = end or self.end(self._ended_ms)
        if end.status in ("cancelled", "failed"):
            self.output.cut()
        return out + self._event(end.event, {"response": self.object(end, usage)})

    def end(self, ended_ms: int) -> End:
        """Return how the output has ended."""
        return end_of(self._last, ended_ms)

    def failure(self, error: LorafleetError) -> bytes:
        """Return the event of an error of the stream, not of the response, which may continue."""
        return FRAMING.event(error_json(error, self.number))

    def _event(self, kind: str, fields: dict[str, Any]) -> list[bytes]:
        """Return an event, or nothing if the client has it already."""
        number, self.number = self.number, self.number + 1
        if number <= self.after:
            return []
        body = orjson.dumps({"type": kind, "sequence_number": number, **fields})
        return [b"event: " + kind.encode() + b"\ndata: " + body + b"\n\n"]

    def object(self, end: End, usage: CallUsage | None = None) -> dict[str, Any]:
        """Return the response object. Without usage it has no output, which separate events deliver."""
        error, completed = end.error, end.status == "completed"
        return {
            **self._head,
            "status": end.status,
            "completed_at": end.ended_ms // 1000 if completed else None,
            "error": None if error is None else {"code": _code(error), "message": cut(error.message)},
            "incomplete_details": {"reason": "max_output_tokens"} if end.status == "incomplete" else None,
            **self._shown,
            "background": self._background,
            "output": [] if usage is None else self.output.items,
            "usage": None if usage is None or end.status in ("cancelled", "failed") else self._usage(usage),
        }

    def _usage(self, usage: CallUsage) -> dict[str, Any]:
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self.output.num_reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    def usage_frame(self, usage: CallUsage) -> bytes:
        """Return the event that ends the stream of a job."""
        return b"".join(self.last(None, usage))

    def whole(self, choices: Sequence[Piece], usage: CallUsage) -> dict[str, Any]:
        """Return the response object, after all tokens have been read."""
        return self.object(self.end(self._ended_ms), usage)


def _code(error: LorafleetError) -> str:
    return _CODES.get(error.status, "server_error")


def writer_of(call: SubmittedCall, choices: Sequence[Choice]) -> ResponseWriter:
    """Return the writer of a call."""
    [choice] = choices
    return ResponseWriter(call, choice)


def job_api(settings: Settings) -> JobApi:
    """Return the parser and writer of stored responses."""
    return JobApi(lambda kept, caller: parse_stored(kept, caller, settings), writer_of, id_prefix=ID_PREFIX)


class FollowedAnswer(GenerationAnswer):
    """The answer of `/v1/responses` while it is generated."""

    errors = STREAM_ERRORS
    framing = FRAMING

    def __init__(self, generation: Generation) -> None:
        self._made = writer_of(generation.call, generation.choices)
        super().__init__(generation, self._made)

    async def last_frames(self) -> bytes:
        """Return the end of a stream."""
        return b"".join(self._made.last(self._made.end(await self._ended_ms()), self.generation.usage))

    async def whole(self, choices: list[Piece]) -> tuple[Any, dict[str, str]]:
        """Return the answer of a call that is not streamed, and its headers."""
        return self._made.object(self._made.end(await self._ended_ms()), self.generation.usage), {}

    def failed(self, error: LorafleetError) -> bytes:
        """Return the end of a stream that fails."""
        if self.generation.choices[0].cursor.ended:
            return b"".join(self._made.last(failure_of(error), usage_of(self.generation.choices)))
        return self._made.failure(error)

    async def _ended_ms(self) -> int:
        """Return when the response has ended, in unix ms, as later readers will see it."""
        facts = await self.generation.facts()
        return facts.ended_ms if facts is not None and facts.ended_ms else now_ms()

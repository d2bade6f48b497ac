"""*Write* for Ollama's API: one object, or one object per line, the last of them with counts and times.

A tool call is sent once it is complete, because it is an object in a message.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson

from gateway.answers.sse import GenerationAnswer
from gateway.bodies import json_values
from gateway.bodies.json_slices import RowSlices, dumps
from gateway.calls.choices import Piece, TokenLogprob
from gateway.calls.follow import Generation
from gateway.calls.writers import MIN_LOGPROB, CallUsage, Framing, Writer
from gateway.encoders.encoder_write import VECTORS, EncoderAnswer, shortened
from gateway.ollama.ollama_bodies import EmbedRequest
from gateway.ollama.ollama_errors import OLLAMA_ERRORS
from gateway.text.answer_form import AnswerForm
from gateway.text.answer_parts import Part
from protocol.runtime.imports import Late
from protocol.wire.errors import BadRequest
from protocol.wire.tokens import TokenTable

if TYPE_CHECKING:
    import numpy as np
else:
    np = Late("numpy")

NDJSON = b"application/x-ndjson"
NS_PER_MS = 1_000_000


def line(body: bytes) -> bytes:
    """Return one JSON text as a line."""
    return body + b"\n"


def time_text(ms: int | None = None) -> str:
    """Return a unix time in ms, default now, in RFC 3339."""
    moment = datetime.now(UTC) if ms is None else datetime.fromtimestamp(ms / 1000, UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Objects:
    """Makes the objects of one answer."""

    model: str  # name given by the client
    is_chat: bool

    def part(self, text: str = "", *, thinking: str = "", calls: Sequence[Any] = (), done: bool = False) -> Any:
        """Return an object with a part of the answer."""
        message: dict[str, Any] = {"content" if self.is_chat else "response": text}
        if thinking:
            message["thinking"] = thinking
        if calls:
            message["tool_calls"] = list(calls)
        shown = {"message": {"role": "assistant", **message}} if self.is_chat else message
        return {"model": self.model, "created_at": time_text(), **shown, "done": done}

    def loaded(self) -> Any:
        """Return the answer to a request that only checks that the model is available."""
        return {**self.part(done=True), "done_reason": "load"}

    def framing(self) -> Framing:
        """Return the framing of a stream; keep-alive lines are objects without text."""
        return Framing(NDJSON, line, lambda _: line(orjson.dumps(self.part())))


@dataclass(slots=True)
class _Call:
    """An unfinished tool call."""

    id: str
    index: int
    name: str
    arguments: list[str] = field(default_factory=list)

    def object(self) -> Any:
        """Return the call in Ollama's form. Raises ValueError or BadRequest for incomplete arguments."""
        arguments = json_values.loads("".join(self.arguments).encode(), "arguments")
        return {"id": self.id, "function": {"index": self.index, "name": self.name, "arguments": arguments}}


@dataclass(slots=True)
class _Gained:
    """New parts of an answer: reasoning, text and complete calls."""

    thinking: str = ""
    text: str = ""
    calls: list[Any] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.thinking or self.text or self.calls)


class _Reader:
    """Splits the text of one answer into its parts."""

    def __init__(self, form: AnswerForm | None, rid: str) -> None:
        self._form = form
        self._rid = rid
        self._splitter = form.splitter() if form is not None else None
        self._call: _Call | None = None  # the unfinished call

    def read(self, text: str, *, ended: bool) -> _Gained:
        """Return the new parts of further text. ended: it is the last text."""
        gained = _Gained()
        if self._splitter is None:
            gained.text = text
            return gained
        parts = self._splitter.add(text)
        if ended:
            parts += self._splitter.finish()
        for part in parts:
            self._take(part, gained)
        if ended:
            self._end_call(gained)
        return gained

    def _take(self, part: Part, gained: _Gained) -> None:
        if part.kind == "reasoning":
            gained.thinking += part.text
        elif part.kind == "text":
            gained.text += part.text
        elif part.kind == "arguments" and self._call is not None:
            self._call.arguments.append(part.text)
        elif part.kind == "call":
            self._end_call(gained)
            assert self._form is not None
            self._call = _Call(self._form.call_id(self._rid, part.index), part.index, part.text)

    def _end_call(self, gained: _Gained) -> None:
        if self._call is None:
            return
        call, self._call = self._call, None
        try:
            gained.calls.append(call.object())
        except (ValueError, BadRequest):  # incomplete, so shown as text
            gained.text += f"{call.name}({''.join(call.arguments)}"


class OllamaWriter(Writer):
    """Writes the objects of `/api/chat` and `/api/generate`."""

    def __init__(
        self, objects: Objects, tokens: TokenTable, form: AnswerForm | None, rid: str, *, logprobs: bool
    ) -> None:
        """form, rid: of the only choice."""
        self._objects = objects
        self._tokens = tokens
        self._logprobs = logprobs
        self._form, self._rid = form, rid
        self._streamed = _Reader(form, rid)
        self.finish = ""

    def frames(self, piece: Piece) -> list[bytes]:
        """Return the line of a piece; none while it shows nothing."""
        self.finish = piece.finish or self.finish
        gained = self._streamed.read(piece.text, ended=bool(piece.finish))
        shows = self._logprobs and bool(piece.logprobs)
        if not gained and not shows:
            return []
        made = self._objects.part(gained.text, thinking=gained.thinking, calls=gained.calls)
        return [line(dumps({**made, **(self._entries(piece) if shows else {})}))]

    def whole(self, choices: Sequence[Piece], usage: CallUsage) -> dict[str, Any]:
        """Return the answer as one object, without counts and times."""
        [piece] = choices
        self.finish = piece.finish
        gained = _Reader(self._form, self._rid).read(piece.text, ended=True)
        made = self._objects.part(gained.text, thinking=gained.thinking, calls=gained.calls, done=True)
        return {**made, **(self._entries(piece) if self._logprobs else {})}

    def last(self) -> dict[str, Any]:
        """Return the last object of a stream, without counts and times."""
        return self._objects.part(done=True)

    def _entries(self, piece: Piece) -> dict[str, Any]:
        return {"logprobs": RowSlices(lambda: map(self._entry, piece.logprobs))}

    def _entry(self, token: TokenLogprob) -> dict[str, Any]:
        top = [self._scored(*pair) for pair in token.top]
        return {**self._scored(token.id, token.logprob), **({"top_logprobs": top} if top else {})}

    def _scored(self, id_: int, logprob: float) -> dict[str, Any]:
        tokens = self._tokens
        return {"token": tokens.text_of(id_), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(tokens.bytes_of(id_))}


class OllamaAnswer(GenerationAnswer):
    """The answer of `/api/chat` and `/api/generate`."""

    errors = OLLAMA_ERRORS

    def __init__(self, generation: Generation, objects: Objects, started_s: float) -> None:
        """Store the arrival of the call. started_s: monotonic."""
        [choice] = generation.choices
        shows = generation.call.parsed.options.num_shown is not None
        writer = OllamaWriter(objects, choice.prompt.files.tokens, choice.prompt.form, choice.rid, logprobs=shows)
        super().__init__(generation, writer)
        self._made = writer
        self._started_s = started_s
        self.framing = objects.framing()

    async def last_frames(self) -> bytes:
        """Return the last object of a stream."""
        numbers = await self._numbers()
        return line(orjson.dumps({**self._made.last(), **numbers}))

    async def whole(self, choices: list[Piece]) -> tuple[Any, dict[str, str]]:
        """Return the answer of a call that is not streamed, and its headers."""
        self._made.finish = choices[0].finish
        numbers = await self._numbers()
        return {**self.writer.whole(choices, self.generation.usage), **numbers}, {}

    async def _numbers(self) -> Mapping[str, Any]:
        usage = self.generation.usage
        counts = {"prompt_eval_count": usage.prompt_tokens, "eval_count": usage.completion_tokens}
        return {"done_reason": self._made.finish, **await durations(self.generation, self._started_s), **counts}


async def durations(generation: Generation, started_s: float) -> dict[str, int]:
    """Return the durations of a call's phases in ns. started_s: monotonic time of its arrival.

    load: from arrival to the assignment to a worker, including the waits for the adapter and in the queue; prompt_eval:
    to the first token; eval: to the end. The queue's times are whole milliseconds; if it has lost them, only the total
    is known.
    """
    total = {"total_duration": round((time.monotonic() - started_s) * 1e9)}
    known = await generation.facts()
    if known is None:
        return total
    arrived_ms = round(1000 * (generation.call.submitted_s - started_s))
    spans_ms = {
        "load_duration": arrived_ms + known.assigned_ms - known.submitted_ms,
        "prompt_eval_duration": known.first_ms - known.assigned_ms,
        "eval_duration": known.ended_ms - known.first_ms,
    }
    return total | {name: max(ms, 0) * NS_PER_MS for name, ms in spans_ms.items()}


class EmbedAnswer(EncoderAnswer):
    """The answer of `/api/embed`: vectors normalized to length 1, as in Ollama."""

    def __init__(self, generation: Generation, request: EmbedRequest, started_s: float) -> None:
        """Store the arrival of the call. started_s: monotonic."""
        model, dimensions = request.model, request.dimensions

        def shown(part: np.ndarray) -> np.ndarray:
            return _unit(shortened(part.view("<f4"), dimensions, unit_length=False))

        def write(numbers: list[np.ndarray], generation: Generation) -> Any:
            return {
                "model": model,
                "embeddings": RowSlices(lambda: map(shown, numbers), at_once=VECTORS),
                "total_duration": round((time.monotonic() - started_s) * 1e9),
                "prompt_eval_count": generation.usage.prompt_tokens,
            }

        super().__init__(generation, write, native=False)
        self.errors = OLLAMA_ERRORS


def _unit(vector: np.ndarray) -> np.ndarray:
    """Return a vector (float32) normalized to length 1."""
    length = float(np.linalg.norm(vector))
    return vector / np.float32(length) if length else vector

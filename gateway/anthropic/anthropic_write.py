"""*Write* for Anthropic's API: a message of content blocks, or the events that build it.

Both are made from the same steps, so that a message assembled from a stream equals the whole one.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
from pydantic_core import from_json

from gateway.answers.sse import GenerationAnswer
from gateway.anthropic.anthropic_errors import ANTHROPIC_ERRORS
from gateway.calls.choices import Piece
from gateway.calls.follow import Generation
from gateway.calls.writers import SSE, CallUsage, Framing, Writer
from gateway.text.answer_form import AnswerForm
from gateway.text.answer_parts import Part

PING = b'event: ping\ndata: {"type":"ping"}\n\n'


def event(kind: bytes, body: bytes) -> bytes:
    """Return a JSON text as a server-sent event of a kind."""
    return b"event: " + kind + b"\ndata: " + body + b"\n\n"


def _ping(text: str) -> bytes:
    return (f": {text}\n".encode() if text else b"") + PING


FRAMING = Framing(SSE.media_type, lambda body: event(b"error", body), _ping)
"""Frames errors and keep-alive parts in a stream."""


class BlockStep(NamedTuple):
    """One change of a message's blocks: a block begins, gets a delta, or ends."""

    kind: str  # open, text_delta, thinking_delta, signature_delta, input_json_delta or close
    text: str = ""
    block: Any = None  # initial content block of an `open` step


_GAINS = {
    "text_delta": "text",
    "thinking_delta": "thinking",
    "signature_delta": "signature",
    "input_json_delta": "partial_json",
}
"""Kind of a delta -> the field with its text, in the delta and the block."""


class Blocks:
    """Builds the content blocks of one answer from its text: reasoning, text, and tool calls."""

    def __init__(self, form: AnswerForm | None, rid: str, *, shows_thinking: bool) -> None:
        """form: None for plain text. rid: id of the request. shows_thinking: False leaves out reasoning."""
        self._form = form
        self._rid = rid
        self._shows_thinking = shows_thinking
        self._splitter = form.splitter() if form is not None else None
        self._open = ""  # type of the unfinished block, "" if there is none
        self._signed = hashlib.sha256()

    @property
    def num_calls(self) -> int:
        """Number of calls begun so far."""
        return self._splitter.num_calls if self._splitter is not None else 0

    def read(self, text: str, *, ended: bool) -> Iterator[BlockStep]:
        """Yield the steps of further text. ended: it is the last text."""
        if self._splitter is None:
            parts = [Part("text", text)] if text else []
        else:
            parts = [*self._splitter.add(text), *(self._splitter.finish() if ended else ())]
        for part in parts:
            yield from self._take(part)
        if ended:
            yield from self._close()

    def _take(self, part: Part) -> Iterator[BlockStep]:
        if part.kind == "text":
            yield from self._begin("text", {"type": "text", "text": ""})
            yield BlockStep("text_delta", part.text)
        elif part.kind == "reasoning":
            # White space alone means no reasoning.
            text = part.text if self._open == "thinking" else part.text.lstrip()
            if text:
                yield from self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                self._signed.update(text.encode())
                if self._shows_thinking:
                    yield BlockStep("thinking_delta", text)
        elif part.kind == "call":
            assert self._form is not None
            yield from self._close()
            id_ = self._form.call_id(self._rid, part.index, "toolu_")
            yield from self._begin("tool_use", {"type": "tool_use", "id": id_, "name": part.text, "input": {}})
        else:
            yield BlockStep("input_json_delta", part.text)

    def _begin(self, kind: str, block: dict[str, Any]) -> Iterator[BlockStep]:
        if self._open != kind:
            yield from self._close()
            self._open = kind
            yield BlockStep("open", block=block)

    def _close(self) -> Iterator[BlockStep]:
        if self._open == "thinking":  # clients drop reasoning without a signature
            yield BlockStep("signature_delta", base64.b64encode(self._signed.digest()).decode())
        if self._open:
            self._open = ""
            yield BlockStep("close")


def content_of(steps: Iterator[BlockStep]) -> list[Any]:
    """Return the blocks built by all steps of an answer."""
    content: list[Any] = []
    gained: defaultdict[str, list[str]] = defaultdict(list)  # kind of step -> deltas of the last block
    for step in steps:
        if step.kind == "open":
            content.append(dict(step.block))
        elif step.kind != "close":
            gained[step.kind].append(step.text)
        else:
            block = content[-1]
            for kind, texts in gained.items():
                if kind != "input_json_delta":
                    block[_GAINS[kind]] += "".join(texts)
            if block["type"] == "tool_use":
                block["input"] = orjson.Fragment(_input("".join(gained["input_json_delta"])))
            gained.clear()
    return content


def _input(arguments: str) -> bytes:
    """Return a call's arguments as written or, if they are incomplete, the complete part of the object.

    Anthropic's client reads a stream in the same way. Arguments that no parser takes, such as numbers of thousands of
    digits, become an empty object, so that the rest of the answer is not lost.
    """
    raw = arguments.encode()
    with suppress(ValueError):
        if isinstance(orjson.loads(raw), dict):
            return raw
    with suppress(ValueError):
        value = from_json(raw, allow_partial=True)
        if isinstance(value, dict):
            return json.dumps(value).encode()
    return b"{}"


@dataclass(frozen=True, slots=True)
class MessageHead:
    """The first fields of a message."""

    id: str
    model: str
    num_prompt_tokens: int

    def message(self, content: list[Any], stop: dict[str, Any], usage: dict[str, Any]) -> dict[str, Any]:
        """Return a message."""
        kind = {"id": self.id, "type": "message", "role": "assistant", "model": self.model}
        return {**kind, "content": content, **stop, "usage": usage}


def usage_json(usage: CallUsage) -> dict[str, Any]:
    """Return the `usage` of a message. Its input tokens exclude cached ones; creating cache entries is not counted."""
    return {
        "input_tokens": max(usage.prompt_tokens - usage.cached_tokens, 0),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


class MessagesWriter(Writer):
    """Writes the message of `/v1/messages`, and the events of its stream."""

    def __init__(
        self, head: MessageHead, form: AnswerForm | None, rid: str, *, max_tokens: int, shows_thinking: bool
    ) -> None:
        """form, rid: of the only choice. max_tokens: of the body; 0: no output is requested."""
        self._head = head
        self._max_tokens = max_tokens
        self._make_blocks = lambda: Blocks(form, rid, shows_thinking=shows_thinking)
        self._blocks = self._make_blocks()
        self._begun = False
        self._index = -1  # index of the latest block
        self._last = Piece(0)

    def frames(self, piece: Piece) -> list[bytes]:
        """Return the events of a piece, preceded at first by the message's start."""
        out = [] if self._begun else [self._start()]
        if piece.finish:
            self._last = piece
        for step in self._blocks.read(piece.text, ended=bool(piece.finish)):
            out += self._event(step)
        return out

    def _start(self) -> bytes:
        self._begun = True
        usage = usage_json(CallUsage(prompt_tokens=self._head.num_prompt_tokens))
        message = self._head.message([], {"stop_reason": None, "stop_sequence": None}, usage)
        return event(b"message_start", orjson.dumps({"type": "message_start", "message": message}))

    def _event(self, step: BlockStep) -> list[bytes]:
        if step.kind == "open":
            self._index += 1
            begun = {"type": "content_block_start", "index": self._index, "content_block": step.block}
            return [event(b"content_block_start", orjson.dumps(begun)), *([] if self._index else [PING])]
        if step.kind == "close":
            return [event(b"content_block_stop", b'{"type":"content_block_stop","index":%d}' % self._index)]
        kind, field = step.kind.encode(), _GAINS[step.kind].encode()
        delta = b'{"type":"%b","%b":%b}' % (kind, field, orjson.dumps(step.text))
        body = b'{"type":"content_block_delta","index":%d,"delta":%b}' % (self._index, delta)
        return [event(b"content_block_delta", body)]

    def last_frames(self, usage: CallUsage) -> bytes:
        """Return the final events, after those of all blocks."""
        delta = self._stop(self._last, self._blocks, usage)
        ended = {"type": "message_delta", "delta": delta, "usage": usage_json(usage)}
        return event(b"message_delta", orjson.dumps(ended)) + event(b"message_stop", b'{"type":"message_stop"}')

    def whole(self, choices: Sequence[Piece], usage: CallUsage) -> dict[str, Any]:
        """Return the answer as one message."""
        [piece] = choices
        blocks = self._make_blocks()
        content = content_of(blocks.read(piece.text, ended=True))
        return self._head.message(content, self._stop(piece, blocks, usage), usage_json(usage))

    def _stop(self, piece: Piece, blocks: Blocks, usage: CallUsage) -> dict[str, Any]:
        if piece.stop is not None:
            reason = "stop_sequence"
        elif piece.finish == "stop":
            reason = "tool_use" if blocks.num_calls else "end_turn"
        elif usage.completion_tokens >= self._max_tokens:
            reason = "max_tokens"
        else:  # the context was full
            reason = "model_context_window_exceeded"
        return {"stop_reason": reason, "stop_sequence": piece.stop}


class MessagesAnswer(GenerationAnswer):
    """The answer of `/v1/messages`."""

    errors = ANTHROPIC_ERRORS
    framing = FRAMING

    def __init__(self, generation: Generation, *, shows_thinking: bool) -> None:
        """shows_thinking: False empties reasoning blocks."""
        [choice] = generation.choices
        parsed = generation.call.parsed
        head = MessageHead(f"msg_{generation.call.id}", parsed.model_name, choice.prompt.num_tokens)
        max_tokens = 0 if parsed.options.scores_only else parsed.options.max_tokens or 0
        writer = MessagesWriter(
            head, choice.prompt.form, choice.rid, max_tokens=max_tokens, shows_thinking=shows_thinking
        )
        super().__init__(generation, writer)
        self._made = writer

    async def last_frames(self) -> bytes:
        """Return the end of a stream."""
        return self._made.last_frames(self.generation.usage)

"""*Write* for OpenAI's routes: an answer as one object, and as chunks of a stream.

Per token nothing but the changing parts is encoded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from gateway.calls.choices import Choice, Piece, TokenLogprob
from gateway.calls.follow import Generation
from gateway.calls.parse import Conversation
from gateway.calls.submit import SubmittedCall
from gateway.calls.writers import MIN_LOGPROB, Usage, Writer, shown_logprob
from gateway.http.sse import GenerationResponse
from gateway.openai.offsets import TextOffsets
from gateway.text.answer_form import AnswerForm
from gateway.text.answer_parts import AnswerParts, Part
from protocol.wire.tokens import TokenTable


def write(generation: Generation, keepalive_s: float) -> GenerationResponse:
    """Return the response that a call is answered with while it is followed."""
    writer = writer_of(generation.call, generation.choices)
    return GenerationResponse(generation, writer, keepalive_s=keepalive_s)


def writer_of(call: SubmittedCall, choices: Sequence[Choice]) -> Writer:
    """Return what writes the answer of a call's endpoint."""
    parsed, options = call.parsed, call.parsed.options
    shown = [choice for choice in choices if choice.index % options.n < (options.num_best or options.n)]
    kind = ChatWriter if isinstance(parsed.inputs, Conversation) else CompletionWriter
    num = len(shown) // len(parsed.models.names)
    model_of = [name for name in parsed.models.names for _ in range(num)] if parsed.names_each else []
    head = Head(
        kind.id_prefix + (parsed.answer_id or call.id),
        call.created_ms // 1000,
        parsed.model_name,
        fingerprint(call),
        model_of,
    )
    tokens = [choice.prompt.files.tokens for choice in shown]
    writer = kind(head, tokens, include_usage=options.include_usage, logprobs=options.shows_logprobs)
    if isinstance(writer, CompletionWriter) and options.shows_logprobs:
        writer.offsets = [TextOffsets(choice.prompt.files.tokens, choice.prompt.echo) for choice in shown]
    if isinstance(writer, ChatWriter):
        writer.forms = {choice.index: (choice.prompt.form, choice.rid) for choice in choices if choice.prompt.form}
    return writer


def fingerprint(call: SubmittedCall) -> str:
    """Return the `system_fingerprint`: the same as long as base weights and adapters are; "" while no base is known."""
    if call.base is None:
        return ""
    digests = ",".join(target.digest for target in call.targets)
    return "fp_" + hashlib.sha256(f"{call.base.fingerprint}:{digests}".encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Head:
    """The fields that an answer and all its chunks begin with."""

    id: str
    created: int  # unix seconds
    model: str
    fingerprint: str
    model_of: Sequence[str] = ()  # of each choice, if the call gave a list of models

    def choice(self, index: int) -> dict[str, Any]:
        """Return the first fields of a choice."""
        return {"index": index, "model": self.model_of[index]} if self.model_of else {"index": index}

    def choice_start(self, index: int) -> bytes:
        """Return the first fields of a choice as JSON without its closing brace."""
        return orjson.dumps(self.choice(index))[:-1]

    def json(self, kind: str) -> dict[str, Any]:
        """Return the fields as the object of a kind begins with them."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class _Frames:
    """The parts of a chunk that do not change, encoded once."""

    def __init__(self, head: Head, kind: str, include_usage: bool) -> None:
        self._start = b"data: " + orjson.dumps(head.json(kind))[:-1] + b',"choices":['
        self._end = self._role_end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._num_told = 0  # output tokens that earlier chunks told of

    def choice(self, body: bytes) -> bytes:
        return self._start + body + self._end

    def role(self, body: bytes) -> bytes:
        """Return the chunk before a choice's first tokens: it does not tell of these."""
        return self._start + body + self._role_end

    def show_usage(self, usage: Usage) -> None:
        """Let the chunks from now on tell the usage so far."""
        before, self._num_told = replace(usage, completion_tokens=self._num_told), usage.completion_tokens
        self._role_end = b'],"usage":' + orjson.dumps(before.json()) + b"}\n\n"
        self._end = b'],"usage":' + orjson.dumps(usage.json()) + b"}\n\n"

    def usage(self, usage: Usage) -> bytes:
        return self._start + b'],"usage":' + orjson.dumps(usage.json()) + b"}\n\n"


class ChatWriter:
    """`chat.completion` and its chunks."""

    id_prefix = "chatcmpl-"

    def __init__(self, head: Head, tokens: Sequence[TokenTable], *, include_usage: bool, logprobs: bool) -> None:
        self.forms: dict[int, tuple[AnswerForm, str]] = {}
        """Answer form and request id of each choice that may consist of more than text."""
        self._head = head
        self._tokens = tokens
        self._logprobs = logprobs
        self._frames = _Frames(head, "chat.completion.chunk", include_usage)
        self._splitters: dict[int, AnswerParts] = {}
        self._started: set[int] = set()

    def frames(self, piece: Piece) -> bytes:
        """Return the chunks of a piece; b"" when it shows nothing yet."""
        start = self._head.choice_start(piece.index) + b',"delta":'
        out = b""
        if piece.index not in self._started and (piece.text or piece.logprobs or piece.finish):
            self._started.add(piece.index)
            role = b'{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null}'
            out = self._frames.role(start + role)
        if piece.index in self.forms:
            return out + self._split_frames(piece, start)
        if piece.text or piece.logprobs:
            logprobs = orjson.dumps(self._content(piece)) if self._logprobs else b"null"
            body = b'{"content":%b},"logprobs":%b,"finish_reason":null}' % (orjson.dumps(piece.text), logprobs)
            out += self._frames.choice(start + body)
        if piece.finish:
            out += self._frames.choice(start + b'{},"logprobs":null,"finish_reason":"%b"}' % piece.finish.encode())
        return out

    def _split_frames(self, piece: Piece, start: bytes) -> bytes:
        """Return the frames of a piece of an answer that has a form."""
        form, rid = self.forms[piece.index]
        splitter = self._splitters.setdefault(piece.index, form.splitter())
        parts = splitter.add(piece.text)
        if piece.finish:
            parts += splitter.finish()
        deltas = [_delta(part, form, rid) for part in parts]
        logprobs = self._content(piece) if self._logprobs and piece.logprobs else None
        if logprobs is not None and not deltas:
            deltas = [{}]
        out = b""
        for i, delta in enumerate(deltas):
            body = {"logprobs": logprobs if i == 0 else None, "finish_reason": None}
            out += self._frames.choice(start + orjson.dumps(delta) + b"," + orjson.dumps(body)[1:])
        if piece.finish:
            finish = _finish(piece.finish, splitter)
            out += self._frames.choice(start + b'{},"logprobs":null,"finish_reason":"%b"}' % finish.encode())
        return out

    def usage_frame(self, usage: Usage) -> bytes:
        """Return the chunk after the last choice's end."""
        return self._frames.usage(usage)

    def show_usage(self, usage: Usage) -> None:
        """Let the chunks from now on tell the usage so far."""
        self._frames.show_usage(usage)

    def whole(self, choices: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """Return the answer as one object."""
        return {
            **self._head.json("chat.completion"),
            "choices": [self._choice(piece) for piece in choices],
            "usage": usage.json(),
        }

    def _choice(self, piece: Piece) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None}
        finish = piece.finish
        if piece.index in self.forms:
            form, rid = self.forms[piece.index]
            splitter = form.splitter()
            message |= _message([*splitter.add(piece.text), *splitter.finish()], form, rid)
            finish = _finish(finish, splitter)
        return {
            **self._head.choice(piece.index),
            "message": message,
            "logprobs": self._content(piece) if self._logprobs else None,
            "finish_reason": finish,
        }

    def _content(self, piece: Piece) -> dict[str, Any]:
        tokens = self._tokens[piece.index]
        entries = [
            {
                **_entry(tokens, token.id, token.logprob),
                "top_logprobs": [_entry(tokens, *pair) for pair in token.top],
            }
            for token in piece.logprobs
        ]
        return {"content": entries, "refusal": None}


def _delta(part: Part, form: AnswerForm, rid: str) -> dict[str, Any]:
    """Return the `delta` of a part."""
    if part.kind == "text":
        return {"content": part.text}
    if part.kind == "reasoning":
        return _reasoning(part.text)
    if part.kind == "arguments":
        return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}
    return {"tool_calls": [{"index": part.index, **_call(part, form, rid, "")}]}


def _message(parts: Sequence[Part], form: AnswerForm, rid: str) -> dict[str, Any]:
    """Return the fields of a message that consists of parts."""
    text = "".join(part.text for part in parts if part.kind == "text")
    calls = [
        _call(call, form, rid, "".join(p.text for p in parts if p.kind == "arguments" and p.index == call.index))
        for call in parts
        if call.kind == "call"
    ]
    message: dict[str, Any] = {"content": text or (None if calls else "")}
    if calls:
        message["tool_calls"] = calls
    if form.thought is not None:
        message |= _reasoning("".join(part.text for part in parts if part.kind == "reasoning") or None)
    return message


def _reasoning(text: str | None) -> dict[str, str | None]:
    """Return reasoning under both names that clients look for."""
    return {"reasoning": text, "reasoning_content": text}


def _call(part: Part, form: AnswerForm, rid: str, arguments: str) -> dict[str, Any]:
    function = {"name": part.text, "arguments": arguments}
    return {"id": form.call_id(rid, part.index), "type": "function", "function": function}


def _finish(finish: str, splitter: AnswerParts) -> str:
    return "tool_calls" if finish == "stop" and splitter.num_calls else finish


class CompletionWriter:
    """`text_completion`, whole and in chunks."""

    id_prefix = "cmpl-"

    def __init__(self, head: Head, tokens: Sequence[TokenTable], *, include_usage: bool, logprobs: bool) -> None:
        self.offsets: Sequence[TextOffsets] = ()
        """Where each choice's tokens begin in its text, if logprobs are shown."""
        self._head = head
        self._tokens = tokens
        self._logprobs = logprobs
        self._frames = _Frames(head, "text_completion", include_usage)

    def frames(self, piece: Piece) -> bytes:
        """Return the chunks of a piece; b"" when it shows nothing yet."""
        start = self._head.choice_start(piece.index) + b',"text":'
        out = b""
        if piece.text or piece.logprobs or piece.prompt:
            logprobs = orjson.dumps(self._lists(piece)) if self._logprobs else b"null"
            body = b'%b,"logprobs":%b,"finish_reason":null}' % (orjson.dumps(piece.text), logprobs)
            out = self._frames.choice(start + body)
        if piece.finish:
            out += self._frames.choice(start + b'"","logprobs":null,"finish_reason":"%b"}' % piece.finish.encode())
        return out

    def usage_frame(self, usage: Usage) -> bytes:
        """Return the chunk after the last choice's end."""
        return self._frames.usage(usage)

    def show_usage(self, usage: Usage) -> None:
        """Let the chunks from now on tell the usage so far."""
        self._frames.show_usage(usage)

    def whole(self, choices: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """Return the answer as one object."""
        return {
            **self._head.json("text_completion"),
            "choices": [
                {
                    **self._head.choice(piece.index),
                    "text": piece.text,
                    "logprobs": self._lists(piece) if self._logprobs else None,
                    "finish_reason": piece.finish,
                }
                for piece in choices
            ],
            "usage": usage.json(),
        }

    def _lists(self, piece: Piece) -> dict[str, Any]:
        tokens, offsets = [*piece.prompt, *piece.logprobs], self.offsets[piece.index]
        of_prompt = offsets.of_prompt([token.id for token in piece.prompt])
        return {
            "text_offset": of_prompt + offsets.of_output(token.id for token in piece.logprobs),
            "tokens": [self._tokens[piece.index].text_of(token.id) for token in tokens],
            "token_logprobs": [shown_logprob(token.logprob) for token in tokens],
            "top_logprobs": [_top(self._tokens[piece.index], token) for token in tokens],
        }


def _entry(tokens: TokenTable, id_: int, logprob: float) -> dict[str, Any]:
    return {"token": tokens.text_of(id_), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(tokens.bytes_of(id_))}


def _top(tokens: TokenTable, token: TokenLogprob) -> dict[str, float] | None:
    """Return the logprobs of the likeliest tokens and the chosen one, by text; of equal texts the likeliest."""
    if math.isnan(token.logprob):
        return None
    best: dict[str, float] = {}
    for id_, logprob in (*token.top, (token.id, token.logprob)):
        text = tokens.text_of(id_)
        best[text] = max(best.get(text, MIN_LOGPROB), logprob)
    return best

"""The output items of one response, built token by token, and the events that build them. Pure.

The same tokens yield the same items and events for every reader at any time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import orjson

from gateway.calls.choices import Piece
from gateway.calls.parsed_call import CallOptions
from gateway.calls.writers import MIN_LOGPROB
from gateway.responses.items import FIRST_OUTPUT, Item, is_object, item_id
from gateway.text.answer_form import AnswerForm
from gateway.text.answer_parts import Part
from protocol.wire.tokens import TokenTable

_ITEM_OF = {"text": "message", "reasoning": "reasoning", "call": "function_call", "arguments": "function_call"}
"""Kind of a part -> type of the item that contains it."""

_DELTA_OF = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}
"""Type of an item -> prefix of the types of its text events."""


class Event(NamedTuple):
    """One event of a stream, without its sequence number."""

    type: str
    fields: dict[str, Any]


class Output:
    """Builds the output items of one response."""

    def __init__(self, call: str, rid: str, form: AnswerForm | None, tokens: TokenTable, options: CallOptions) -> None:
        """call: id of the response, without prefix. rid: of its request. form: None for plain text."""
        self.items: list[Item] = []
        """The items so far; the last one may still grow."""
        self.num_reasoning_tokens = 0
        self._call = call
        self._rid = rid
        self._form = form
        self._tokens = tokens
        self._options = options
        self._namespaces = options.tools.namespaces if options.tools is not None else {}
        self._splitter = form.splitter() if form is not None else None
        self._open = ""  # type of the unfinished item, "" if there is none
        self._texts: list[str] = []  # its texts
        self._logprobs: list[bytes] = []  # logprobs of its tokens, as JSON
        self._waiting: list[bytes] = []  # logprobs of tokens whose text has not arrived
        self._reasons = form is not None and form.thought is not None

    def read(self, piece: Piece) -> Iterator[Event]:
        """Yield the events of a token, or of the end."""
        ended = bool(piece.finish)
        if self._options.num_shown is not None:
            self._waiting += self._entries(piece)
        if self._splitter is None:
            parts = [Part("text", piece.text)] if piece.text else []
        else:
            parts = [*self._splitter.add(piece.text), *(self._splitter.finish() if ended else ())]
        if parts:
            self._reasons = parts[0].kind == "reasoning"
        self.num_reasoning_tokens += self._reasons and not ended
        for part in parts:
            yield from self._take(part)
        if ended:
            if not self.items:
                yield from self._begin("message")
            yield from self._close("completed" if piece.finish == "stop" else "incomplete")

    def cut(self) -> None:
        """Close the unfinished item, because the response failed or was cancelled."""
        for _ in self._close("incomplete"):
            pass

    def _take(self, part: Part) -> Iterator[Event]:
        kind, text = _ITEM_OF[part.kind], part.text
        if part.kind == "call":
            yield from self._close("completed")
            yield from self._begin(kind, part)
            return
        if kind == "reasoning" and self._open != kind:
            text = text.lstrip()  # white space alone means no reasoning
            if not text:
                return
        if self._open != kind:
            yield from self._close("completed")
            yield from self._begin(kind)
        self._texts.append(text)
        logprobs, self._waiting = self._waiting, []
        fields = {**self._place(), "delta": text}
        if kind == "message":
            self._logprobs += logprobs
            fields["logprobs"] = _list(logprobs)
        yield Event(f"{_DELTA_OF[kind]}.delta", fields)

    def _begin(self, kind: str, call: Part | None = None) -> Iterator[Event]:
        id_ = item_id(kind, self._call, FIRST_OUTPUT + len(self.items))
        item: Item = {"id": id_, "type": kind, "status": "in_progress"}
        if call is not None:
            assert self._form is not None
            namespace, name = self._namespaces.get(call.text, ("", call.text))
            item |= {"namespace": namespace} if namespace else {}
            item |= {"call_id": self._form.call_id(self._rid, call.index), "name": name, "arguments": ""}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
        else:
            item |= {"role": "assistant", "content": []}
        self.items.append(item)
        self._open, self._texts, self._logprobs = kind, [], []
        yield Event("response.output_item.added", {"output_index": len(self.items) - 1, "item": dict(item)})
        if call is None:
            yield Event("response.content_part.added", {**self._place(), "part": self._part("")})

    def _close(self, status: str) -> Iterator[Event]:
        if not self._open:
            return
        item, text, place = self.items[-1], "".join(self._texts), self._place()
        if self._open == "function_call":
            item |= {"status": status if is_object(text) else "incomplete", "arguments": text}
            yield Event("response.function_call_arguments.done", {**place, "name": item["name"], "arguments": text})
        else:
            part = self._part(text)
            item |= {"status": status, "content": [part]}
            logprobs = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            yield Event(f"{_DELTA_OF[self._open]}.done", {**place, "text": text, **logprobs})
            yield Event("response.content_part.done", {**place, "part": part})
        self._open, self._texts = "", []
        yield Event("response.output_item.done", {"output_index": len(self.items) - 1, "item": item})

    def _place(self) -> dict[str, Any]:
        """Return the fields that identify the unfinished item, and its only part, in events."""
        place: dict[str, Any] = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return place if self._open == "function_call" else {**place, "content_index": 0}

    def _part(self, text: str) -> dict[str, Any]:
        """Return the content of the unfinished item. The logprobs of a text are complete once it has ended."""
        if self._open == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "annotations": [], "logprobs": _list(self._logprobs), "text": text}

    def _entries(self, piece: Piece) -> Iterator[bytes]:
        """Yield the logprobs of a piece's tokens as JSON."""
        for token in piece.logprobs:
            top = [self._entry(*pair) for pair in token.top[: self._options.num_shown]]
            yield orjson.dumps({**self._entry(token.id, token.logprob), "top_logprobs": top})

    def _entry(self, id_: int, logprob: float) -> dict[str, Any]:
        raw = list(self._tokens.bytes_of(id_))
        return {"token": self._tokens.text_of(id_), "logprob": max(logprob, MIN_LOGPROB), "bytes": raw}


def _list(entries: list[bytes]) -> Any:
    """Return JSON texts as a JSON list."""
    return orjson.Fragment(b"[" + b",".join(entries) + b"]") if entries else []

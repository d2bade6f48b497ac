"""*Write* for OpenAI's routes: an answer as one object, or as the chunks of a stream.

Per token, only the changing parts are encoded.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, islice, starmap
from typing import Any

import orjson
from msgspec import structs

from gateway.answers.sse import GenerationAnswer
from gateway.bodies.json_slices import ENTRIES, FieldSlices, RowSlices, dumps, joined
from gateway.calls.choices import NONE, Choice, Piece, TokenLogprob
from gateway.calls.follow import Generation
from gateway.calls.parsed_call import CallOptions, ChatPrompt
from gateway.calls.submit import SubmittedCall
from gateway.calls.tokenize import Prompt
from gateway.calls.writers import MIN_LOGPROB, CallUsage, Writer, shown_logprob
from gateway.openai.offsets import TextOffsets
from gateway.openai.timed import TimedAnswer
from gateway.text.answer_form import AnswerForm
from gateway.text.answer_parts import AnswerParts, Part
from protocol.wire import messages as m
from protocol.wire.tokens import TokenTable


def write(generation: Generation) -> GenerationAnswer:
    """Return the answer of a running generation."""
    writer = writer_of(generation.call, generation.choices)
    kind = TimedAnswer if generation.call.parsed.options.shows_metrics else GenerationAnswer
    return kind(generation, writer)


def writer_of(call: SubmittedCall, choices: Sequence[Choice]) -> Writer:
    """Return the writer for a call's endpoint."""
    parsed, options = call.parsed, call.parsed.options
    shown = [choice for choice in choices if choice.index % options.n < (options.num_best or options.n)]
    kind = ChatWriter if isinstance(parsed.inputs, ChatPrompt) else CompletionWriter
    num = len(shown) // len(parsed.models.names)
    model_of = [name for name in parsed.models.names for _ in range(num)] if parsed.names_each else []
    head = Head(
        kind.id_prefix + (parsed.answer_id or call.id),
        call.created_ms // 1000,
        parsed.model_name,
        fingerprint(call),
        model_of,
    )
    writer = kind(head, [choice.prompt for choice in shown], options)
    if isinstance(writer, ChatWriter):
        writer.forms = {choice.index: (choice.prompt.form, choice.rid) for choice in choices if choice.prompt.form}
    return writer


def fingerprint(call: SubmittedCall) -> str:
    """Return the `system_fingerprint`, which depends on the weights of base and adapters; "" if no base is known."""
    if call.base is None:
        return ""
    return _fingerprint(call.base.fingerprint, ",".join(target.digest for target in call.targets))


@lru_cache(256)
def _fingerprint(base: str, digests: str) -> str:
    return "fp_" + hashlib.sha256(f"{base}:{digests}".encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Head:
    """The first fields of an answer and of its chunks."""

    id: str
    created: int  # unix seconds
    model: str
    fingerprint: str
    model_of: Sequence[str] = ()  # model of each choice, if the call gave a list of models

    def choice(self, index: int) -> dict[str, Any]:
        """Return the first fields of a choice."""
        return {"index": index, "model": self.model_of[index]} if self.model_of else {"index": index}

    def choice_start(self, index: int) -> bytes:
        """Return the first fields of a choice as JSON without its closing brace."""
        return orjson.dumps(self.choice(index))[:-1]

    def json(self, kind: str) -> dict[str, Any]:
        """Return the first fields of an object of a kind."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class _Frames:
    """The constant parts of chunks, encoded once."""

    def __init__(self, head: Head, kind: str, include_usage: bool) -> None:
        self._start = b"data: " + orjson.dumps(head.json(kind))[:-1] + b',"choices":['
        self._end = self._role_end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._num_told = 0  # output tokens reported in earlier chunks

    def choice(self, *body: bytes) -> bytes:
        return b"".join((self._start, *body, self._end))

    def role(self, body: bytes, ids: bytes) -> bytes:
        """Return the chunk before a choice's first tokens, whose usage excludes them. ids: a field of the chunk."""
        return self._start + body + b"]" + ids + self._role_end[1:]

    def show_usage(self, usage: CallUsage) -> None:
        """Report the usage so far in all following chunks."""
        before, self._num_told = replace(usage, completion_tokens=self._num_told), usage.completion_tokens
        self._role_end = b'],"usage":' + orjson.dumps(before.json()) + b"}\n\n"
        self._end = b'],"usage":' + orjson.dumps(usage.json()) + b"}\n\n"

    def usage(self, usage: CallUsage) -> bytes:
        return self._start + b'],"usage":' + orjson.dumps(usage.json()) + b"}\n\n"


class _Details:
    """What the writers of both routes report about tokens in addition to text."""

    def __init__(self, prompts: Sequence[Prompt], options: CallOptions) -> None:
        """prompts: one per shown choice."""
        self.logprobs = options.num_shown is not None
        self.ids = options.shows_ids
        self.of_prompt = options.num_shown_of_prompt is not None
        self.only_calls = options.tools is not None and options.tools.required  # answers have no text
        self.hides_reasoning = options.hides_reasoning
        self.is_whole = options.sampling.vocabulary > 0  # shows logprobs of the whole vocabulary
        self.dumps = joined if self.is_whole else dumps
        self.rows = options.rows  # tokens whose logprobs are written at a time
        self._prompts = prompts
        self._options = options

    def tokens(self, index: int) -> TokenTable:
        """Return the token table of a choice."""
        return self._prompts[index].files.tokens

    def name(self, tokens: TokenTable, id_: int) -> str:
        """Return a token's name in logprobs."""
        return f"token_id:{id_}" if self._options.names_ids else tokens.text_of(id_)

    def top(self, token: TokenLogprob, *, beside: bool = False) -> Iterator[tuple[int, float]]:
        """Yield the tokens shown at a token's position: itself, then the requested or the most likely ones.

        beside: the token itself does not count towards the requested number.
        """
        asked = bool(self._options.sampling.logprob_token_ids) and not token.rank
        num = _shown(self._options.num_shown)
        others = token.top if asked else token.top[:num]
        shown = chain([(token.id, token.logprob)], (other for other in others if other[0] != token.id))
        return shown if asked or beside else islice(shown, num)

    def token_ids(self, piece: Piece) -> bytes:
        """Return the `token_ids` field of a chunk's choice; null if not requested."""
        return b',"token_ids":' + orjson.dumps(piece.ids) if self.ids else b',"token_ids":null'

    def end(self, piece: Piece, finish: str) -> dict[str, Any]:
        """Return the fields about a choice's end, of OpenAI, vLLM and SGLang. finish: OpenAI's finish reason."""
        of_client = piece.end_id if piece.end_id in self._options.stop_token_ids else None
        return {
            "finish_reason": finish,
            "stop_reason": of_client if piece.stop is None else piece.stop,
            "matched_stop": piece.end_id if piece.stop is None else piece.stop,
        }

    def prompt_ids(self, index: int) -> list[int]:
        """Return the token ids of a choice's prompt."""
        return memoryview(self._prompts[index].ids).cast("i").tolist()

    def fields(self, piece: Piece) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return further fields of a whole answer: those about a choice's output, and those about its prompt."""
        output: dict[str, Any] = {"token_ids": piece.ids if self.ids else None}
        prompt: dict[str, Any] = {"prompt_token_ids": self.prompt_ids(piece.index) if self.ids else None}
        prompt["prompt_logprobs"] = None
        if self.of_prompt:
            tokens, num = self.tokens(piece.index), _shown(self._options.num_shown_of_prompt)
            prompt["prompt_logprobs"] = RowSlices(
                lambda: (_ranked(tokens, one, one.top[:num], self.is_whole) for one in piece.prompt), self.rows
            )
        return output, prompt


def _shown(num: int | None) -> int | None:
    """Return the end of a slice of likely tokens, None for all."""
    return None if num == m.WHOLE else num


def _ranked(tokens: TokenTable, token: TokenLogprob, top: Sequence[tuple[int, float]], is_whole: bool) -> Any:
    """Return a prompt token and the most likely ones by id, in vLLM's form; None for the first token."""
    if math.isnan(token.logprob):
        return None

    def ranked(id_: int, logprob: float, rank: int) -> tuple[str, dict[str, Any]]:
        return str(id_), {"logprob": max(logprob, MIN_LOGPROB), "rank": rank, "decoded_token": tokens.text_of(id_)}

    own = ranked(token.id, token.logprob, token.rank)
    others = (ranked(*one, rank) for rank, one in enumerate(top, 1))
    if not is_whole:
        return dict([own, *others])
    return FieldSlices(lambda: chain([own], (other for other in others if other[0] != own[0])), ENTRIES)


class ChatWriter(Writer):
    """Writes `chat.completion` and its chunks."""

    id_prefix = "chatcmpl-"

    def __init__(self, head: Head, prompts: Sequence[Prompt], options: CallOptions) -> None:
        self.forms: dict[int, tuple[AnswerForm, str]] = {}
        """Answer form and request id of each choice that may contain more than text."""
        self._head = head
        self._details = _Details(prompts, options)
        self._echoes = [prompt.echo for prompt in prompts]
        self._frames = _Frames(head, "chat.completion.chunk", options.include_usage)
        self._starts = [head.choice_start(index) + b',"delta":' for index in range(len(prompts))]
        self._splitters: dict[int, AnswerParts] = {}
        self._started: set[int] = set()

    def frames(self, piece: Piece) -> list[bytes]:
        """Return the chunks of a piece; none while it shows nothing."""
        start, out = self._starts[piece.index], []
        if piece.index not in self._started and (piece.text or piece.logprobs or piece.ids or piece.finish):
            self._started.add(piece.index)
            out = self._first_frames(piece.index, start)
        if piece.index in self.forms:
            return out + self._split_frames(piece, start)
        if piece.text or piece.logprobs or piece.ids or piece.finish:
            logprobs = self._details.dumps(self._content(piece)) if self._details.logprobs else b"null"
            parts = (b'{"content":', orjson.dumps(piece.text), b'},"logprobs":', logprobs, b",", self._end(piece))
            out.append(self._frames.choice(start, *parts, self._details.token_ids(piece), b"}"))
        return out

    def _end(self, piece: Piece) -> bytes:
        """Return the fields about the end in a chunk's choice."""
        return orjson.dumps(self._details.end(piece, piece.finish))[1:-1] if piece.finish else b'"finish_reason":null'

    def _first_frames(self, index: int, start: bytes) -> list[bytes]:
        """Return the chunks before a choice's first tokens: its role and, if requested, the echo."""
        ids = b',"prompt_token_ids":' + orjson.dumps(self._details.prompt_ids(index) if self._details.ids else None)
        role = b'{"role":"assistant","content":%b,"refusal":null},"logprobs":null,"finish_reason":null}'
        out = [self._frames.role(start + role % (b"null" if self._details.only_calls else b'""'), ids)]
        if self._echoes[index]:
            content = orjson.dumps({"content": self._echoes[index]})
            out.append(self._frames.role(start + content + b',"logprobs":null,"finish_reason":null}', b""))
        return out

    def _split_frames(self, piece: Piece, start: bytes) -> list[bytes]:
        """Return the chunks of a piece of an answer with a form."""
        form, rid = self.forms[piece.index]
        splitter = self._splitters.setdefault(piece.index, form.splitter())
        parts = splitter.add(piece.text)
        if piece.finish:
            parts += splitter.finish()
        if self._details.hides_reasoning:
            parts = _without_reasoning(parts)
        deltas = [_delta(part, form, rid) for part in parts]
        logprobs = self._content(piece) if self._details.logprobs and piece.logprobs else None
        if (logprobs is not None or piece.ids or piece.finish) and not deltas:
            deltas = [{} if splitter.num_calls else {"content": ""}]
        if piece.finish and not splitter.num_calls:
            deltas[-1].setdefault("content", "")  # clients concatenate contents, also the last chunk's
        out: list[bytes] = []
        for i, delta in enumerate(deltas):
            body: dict[str, Any] = {"logprobs": logprobs if i == 0 else None, "finish_reason": None}
            if piece.finish and i == len(deltas) - 1:
                body |= self._details.end(piece, _finish(piece.finish, splitter))
            body["token_ids"] = (piece.ids if i == 0 else []) if self._details.ids else None
            out.append(self._frames.choice(start + orjson.dumps(delta) + b"," + self._details.dumps(body)[1:]))
        return out

    def usage_frame(self, usage: CallUsage) -> bytes:
        """Return the usage chunk, which follows the last choice's end."""
        return self._frames.usage(usage)

    def show_usage(self, usage: CallUsage) -> None:
        """Report the usage so far in all following chunks."""
        self._frames.show_usage(usage)

    def whole(self, choices: Sequence[Piece], usage: CallUsage) -> dict[str, Any]:
        """Return the answer as one object. With several models, the prompt's fields are in each choice."""
        answer: dict[str, Any] = {
            **self._head.json("chat.completion"),
            "choices": [self._choice(piece) for piece in choices],
            "usage": usage.json(),
        }
        for piece, choice in zip(choices, answer["choices"], strict=True):
            output, prompt = self._details.fields(piece)
            choice |= output
            (choice if self._head.model_of else answer).update(prompt)
        return answer

    def _choice(self, piece: Piece) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None, **_reasoning(None)}
        finish = piece.finish
        if piece.index in self.forms:
            form, rid = self.forms[piece.index]
            splitter = form.splitter()
            parts = [*splitter.add(piece.text), *splitter.finish()]
            message |= _message(_without_reasoning(parts) if self._details.hides_reasoning else parts, form, rid)
            finish = _finish(finish, splitter)
        if echo := self._echoes[piece.index]:
            message["content"] = echo + (message["content"] or "")
        return {
            **self._head.choice(piece.index),
            "message": message,
            "logprobs": self._content(piece) if self._details.logprobs else None,
            **self._details.end(piece, finish),
        }

    def _content(self, piece: Piece) -> dict[str, Any]:
        details, tokens = self._details, self._details.tokens(piece.index)

        def entry(id_: int, logprob: float) -> dict[str, Any]:
            name, raw = details.name(tokens, id_), list(tokens.bytes_of(id_))
            return {"token": name, "logprob": max(logprob, MIN_LOGPROB), "bytes": raw}

        def likeliest(token: TokenLogprob) -> Iterator[dict[str, Any]]:
            return starmap(entry, details.top(token))

        def entries() -> Iterator[dict[str, Any]]:
            for token in piece.logprobs:
                top: Any = RowSlices(partial(likeliest, token), ENTRIES) if details.is_whole else [*likeliest(token)]
                yield {**entry(token.id, token.logprob), "top_logprobs": top}

        return {"content": RowSlices(entries, details.rows), "refusal": None}


def _without_reasoning(parts: Sequence[Part]) -> list[Part]:
    return [part for part in parts if part.kind != "reasoning"]


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
    """Return the fields of a message with these parts."""
    text = "".join(part.text for part in parts if part.kind == "text")
    arguments: defaultdict[int, list[str]] = defaultdict(list)  # argument deltas by call
    for part in parts:
        if part.kind == "arguments":
            arguments[part.index].append(part.text)
    calls = [_call(part, form, rid, "".join(arguments[part.index])) for part in parts if part.kind == "call"]
    message: dict[str, Any] = {"content": text or (None if calls else "")}
    if calls:
        message["tool_calls"] = calls
    if form.thought is not None:
        message |= _reasoning("".join(part.text for part in parts if part.kind == "reasoning") or None)
    return message


def _reasoning(text: str | None) -> dict[str, str | None]:
    """Return reasoning under both names that clients use."""
    return {"reasoning": text, "reasoning_content": text}


def _call(part: Part, form: AnswerForm, rid: str, arguments: str) -> dict[str, Any]:
    function = {"name": part.text, "arguments": arguments}
    return {"id": form.call_id(rid, part.index), "type": "function", "function": function}


def _finish(finish: str, splitter: AnswerParts) -> str:
    return "tool_calls" if finish == "stop" and splitter.num_calls else finish


class CompletionWriter(Writer):
    """Writes `text_completion` and its chunks."""

    id_prefix = "cmpl-"

    def __init__(self, head: Head, prompts: Sequence[Prompt], options: CallOptions) -> None:
        self._head = head
        self._details = _Details(prompts, options)
        self._echoes = options.echo
        self._shows_prompt = options.echo and self._details.logprobs
        self._offsets = [TextOffsets(prompt.files.tokens, prompt.echo) for prompt in prompts if self._details.logprobs]
        self._frames = _Frames(head, "text_completion", options.include_usage)
        self._starts = [head.choice_start(index) + b',"text":' for index in range(len(prompts))]
        self._started: set[int] = set()  # choices whose prompt data was sent

    def frames(self, piece: Piece) -> Iterable[bytes]:
        """Return the chunks of a piece, several if it has a long prompt's logprobs; none while it shows nothing."""
        if self._shows_prompt and len(piece.prompt) > self._details.rows:
            return self._of_long_prompt(piece)
        if piece.text or piece.logprobs or piece.prompt or piece.ids or piece.finish:
            return (self._chunk(piece),)
        return ()

    def _chunk(self, piece: Piece, offsets: Sequence[int] | None = None) -> bytes:
        """Return one chunk. offsets: of the prompt tokens in it; None if it has the whole prompt."""
        details = self._details
        logprobs = details.dumps(self._lists(piece, offsets)) if details.logprobs else b"null"
        end = b'"finish_reason":null,"stop_reason":null'
        if piece.finish:
            end = orjson.dumps(details.end(piece, piece.finish))[1:-1]
        ids = details.token_ids(piece) if piece.index in self._started else self._first_ids(piece)
        text = orjson.dumps(piece.text)
        return self._frames.choice(self._starts[piece.index], text, b',"logprobs":', logprobs, b",", end, ids, b"}")

    def _of_long_prompt(self, piece: Piece) -> Iterator[bytes]:
        """Yield the chunks of a piece that begins with a prompt's tokens: each has some of them, with their text."""
        offsets = self._offsets[piece.index].of_prompt(piece.prompt.ids)
        begin, at, some = 0, 0, list(islice(offsets, self._details.rows))
        while some:
            later, end = list(islice(offsets, self._details.rows)), begin + len(some)
            prompt = piece.prompt.part(begin, end)
            if later:
                yield self._chunk(Piece(piece.index, piece.text[at : later[0]], prompt=prompt), some)
                at = later[0]
            else:
                yield self._chunk(structs.replace(piece, text=piece.text[at:], prompt=prompt), some)
            begin, some = end, later

    def _first_ids(self, piece: Piece) -> bytes:
        """Return the id fields of a choice's first chunk, including the prompt's ids."""
        self._started.add(piece.index)
        prompt_ids = self._details.prompt_ids(piece.index) if self._details.ids else None
        return self._details.token_ids(piece) + b',"prompt_token_ids":' + orjson.dumps(prompt_ids)

    def usage_frame(self, usage: CallUsage) -> bytes:
        """Return the usage chunk, which follows the last choice's end."""
        return self._frames.usage(usage)

    def show_usage(self, usage: CallUsage) -> None:
        """Report the usage so far in all following chunks."""
        self._frames.show_usage(usage)

    def whole(self, choices: Sequence[Piece], usage: CallUsage) -> dict[str, Any]:
        """Return the answer as one object."""
        return {
            **self._head.json("text_completion"),
            "choices": [self._choice(piece) for piece in choices],
            "usage": usage.json(),
        }

    def _choice(self, piece: Piece) -> dict[str, Any]:
        output, prompt = self._details.fields(piece)
        return {
            **self._head.choice(piece.index),
            "text": piece.text,
            "logprobs": self._lists(piece) if self._details.logprobs else None,
            **self._details.end(piece, piece.finish),
            **output,
            **prompt,
        }

    def _lists(self, piece: Piece, of_prompt: Sequence[int] | None = None) -> dict[str, Any]:
        """Return the logprobs of a piece. of_prompt: offsets of its prompt tokens; None if it has the whole prompt."""
        details, offsets, prompt = self._details, self._offsets[piece.index], piece.prompt if self._echoes else NONE
        names, both = details.tokens(piece.index), (prompt, piece.logprobs)

        def begins() -> Iterator[int]:
            yield from offsets.of_prompt(prompt.ids) if of_prompt is None else of_prompt
            yield from offsets.of_output(piece.logprobs.ids)

        return {
            "text_offset": RowSlices(begins),
            "tokens": RowSlices(lambda: (details.name(names, id_) for part in both for id_ in part.ids)),
            "token_logprobs": RowSlices(lambda: (shown_logprob(value) for part in both for value in part.values)),
            "top_logprobs": RowSlices(
                lambda: (self._top(names, token) for part in both for token in part), details.rows
            ),
        }

    def _top(self, tokens: TokenTable, token: TokenLogprob) -> Any:
        """Return the logprobs of a token and those shown beside it, by text; among equal texts, the maximum."""
        if math.isnan(token.logprob):
            return None
        best: dict[str, float] = {}
        for id_, logprob in self._details.top(token, beside=True):
            text = self._details.name(tokens, id_)
            best[text] = max(best.get(text, MIN_LOGPROB), logprob)
        return FieldSlices(best.items, ENTRIES) if self._details.is_whole else best

"""*Write* for LoRAX's native routes: each token with text and logprob; times and counts in headers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import orjson

from gateway.answers.sse import GenerationAnswer
from gateway.bodies.json_slices import RowSlices
from gateway.calls import lorax_metrics
from gateway.calls.choices import Piece, TokenLogprob, mean_logprob
from gateway.calls.follow import Generation
from gateway.calls.writers import MIN_LOGPROB, CallUsage, Writer, shown_logprob
from gateway.lorax.lorax_errors import LORAX_GENERATION_ERRORS
from gateway.lorax.lorax_parse import NativeCall
from gateway.text.tokenizer import ModelFiles
from protocol.wire import messages as m
from protocol.wire.tokens import Detokenizer


class TokenWriter:
    """Writes the tokens of one choice in order; their joined texts are the choice's text."""

    def __init__(self, files: ModelFiles, *, alternatives: bool) -> None:
        self._files = files
        self._alternatives = alternatives
        self._detokenizer = Detokenizer(files.tokens)
        self._last: dict[str, Any] | None = None
        self.text = ""

    def tokens(self, tokens: Iterable[TokenLogprob], *, ended: bool) -> Iterator[dict[str, Any]]:
        """Yield tokens as JSON. ended: the last one also gets the bytes of an incomplete character."""
        held: dict[str, Any] | None = None
        for token in tokens:
            if held is not None:
                yield held
            held = self._token(token)
        if ended and held is None and self._last is not None:
            # Clients expect a token with the end: without one, repeat the last token, without text.
            held = {**self._last, "text": "", "special": True, "skipped": True}
        if held is None:
            return
        if ended and (rest := self._detokenizer.flush()):
            held["text"] += rest
            self.text += rest
        self._last = held
        yield held

    def _token(self, token: TokenLogprob) -> dict[str, Any]:
        special = token.id in self._files.tokens.special
        text = self._detokenizer.add((token.id,))
        self.text += text
        written = {
            "id": token.id,
            # Special tokens are shown here, though not in the whole text.
            "text": self._files.tokens.text_of(token.id) if special else text,
            "logprob": max(token.logprob, MIN_LOGPROB),
            "special": special,
            "skipped": False,
        }
        if self._alternatives:
            written["alternative_tokens"] = [
                {"id": id_, "text": self._files.tokens.text_of(id_), "logprob": max(logprob, MIN_LOGPROB)}
                for id_, logprob in token.top
            ]
        return written


class NativeWriter(Writer):
    """Writes the answers of `/generate` and similar routes."""

    def __init__(self, files: ModelFiles, native: NativeCall, num_prompt_tokens: int) -> None:
        self._files = files
        self._native = native
        self._options = native.call.options
        self._prefix = native.prompt if native.full_text else ""
        self._eos_ids = frozenset() if self._options.sampling.ignore_eos else files.eos_ids
        self._streamed = self._token_writer()
        self._num_streamed = 0
        self._num_prompt_tokens = num_prompt_tokens

    def _token_writer(self) -> TokenWriter:
        return TokenWriter(self._files, alternatives=self._native.alternatives)

    def frames(self, piece: Piece) -> list[bytes]:
        """Return one SSE frame per token, numbered from 1 as in TGI; the last has the whole text."""
        tokens = list(self._streamed.tokens(piece.logprobs, ended=bool(piece.finish)))
        first = self._num_streamed + 1
        self._num_streamed += len(piece.logprobs)
        frames: list[bytes] = []
        for i, token in enumerate(tokens):
            ended = bool(piece.finish) and i + 1 == len(tokens)
            chunk: dict[str, Any] = {"index": first + i, "token": token, "generated_text": None, "details": None}
            if ended:
                chunk["generated_text"] = self._prefix + self._streamed.text
                if self._native.details:
                    chunk["details"] = {
                        "finish_reason": self._reason(piece.finish, token["id"], self._streamed.text),
                        "prompt_tokens": self._num_prompt_tokens,
                        "input_length": self._num_prompt_tokens,  # TGI's name for it
                        "generated_tokens": self._num_streamed,
                        "seed": self._native.seed,
                    }
            frames.append(b"data: " + orjson.dumps(chunk) + b"\n\n")
        return frames

    def whole(self, choices: Sequence[Piece], usage: CallUsage) -> dict[str, Any]:
        """Return the answer: the choice with the best mean logprob, and the others in its details."""
        order = sorted(choices, key=mean_logprob, reverse=True)
        best, *others = [self._sequence(piece) for piece in order]
        answer: dict[str, Any] = {"generated_text": best["generated_text"]}
        if self._native.details:
            details = {key: value for key, value in best.items() if key != "generated_text"}
            answer["details"] = {**details, "prompt_tokens": usage.prompt_tokens, "skipped_tokens": 0}
            if self._options.n > 1:
                answer["details"]["best_of_sequences"] = others
        return answer

    def _sequence(self, piece: Piece) -> dict[str, Any]:
        ids = piece.logprobs.ids
        text = self._files.tokens.decode(ids)

        def prefill() -> Iterator[dict[str, Any]]:
            for token in piece.prompt:
                shown = {"id": token.id, "text": self._files.tokens.text_of(token.id)}
                yield {**shown, "logprob": shown_logprob(token.logprob)}

        return {
            "generated_text": self._prefix + text,
            "finish_reason": self._reason(piece.finish, ids[-1] if ids else -1, text),
            "generated_tokens": len(ids),
            "seed": self._native.seed,
            "prefill": RowSlices(prefill),
            "tokens": RowSlices(lambda: self._token_writer().tokens(piece.logprobs, ended=True), self._options.rows),
        }

    def _reason(self, finish: str, last: int, text: str) -> str:
        if finish == "length":
            return "length"
        options = self._options
        # Output constrained by a grammar may end without an end token, where no text can follow.
        by_grammar = options.constraint is not None and not any(stop in text for stop in options.stop)
        return "eos_token" if last in self._eos_ids or by_grammar else "stop_sequence"


class NativeAnswer(GenerationAnswer):
    """The answer of a native call."""

    errors = LORAX_GENERATION_ERRORS
    done = b""

    def __init__(self, generation: Generation, native: NativeCall, started_s: float) -> None:
        """Store the arrival of the call. started_s: monotonic."""
        [prompt] = generation.call.prompts
        super().__init__(generation, NativeWriter(prompt.files, native, prompt.num_tokens))
        self._native = native
        self._started_s = started_s

    def stream_headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers of a streamed answer."""
        own = [(name.encode(), value.encode()) for name, value in self._headers().items()]
        return [*self.framing.headers, *own]

    async def whole(self, choices: list[Piece]) -> tuple[Any, dict[str, str]]:
        """Return the answer of a call that is not streamed, and its headers."""
        answer = self.writer.whole(choices, self.generation.usage)
        headers = {**self._headers(), **await times_of(self.generation, self._started_s)}
        return [answer] if self._native.as_list else answer, headers

    def _headers(self) -> dict[str, str]:
        """Return the headers other than those of tokens and times."""
        base, [target] = self.generation.call.base, self.generation.call.targets
        assert base is not None
        headers = {
            "x-compute-type": compute_type(base),
            "x-compute-characters": str(len(self._native.prompt)),
            "x-model-id": base.name,
        }
        if target.digest:
            headers["x-adapter-id"] = _ascii(self._native.adapter_id)
            headers["x-adapter-source"] = _ascii(target.source)
        return headers


async def times_of(generation: Generation, started_s: float) -> dict[str, str]:
    """Return headers with token counts and, in whole ms, the durations of a call's phases. started_s: monotonic."""
    usage = generation.usage
    total_ms = 1000 * (time.monotonic() - started_s)
    validation_ms = 1000 * max(generation.call.submitted_s - started_s, 0.0)  # 0 for an earlier call
    known = await generation.facts()
    queue_ms = first_ms = output_ms = 0.0
    if known is not None:  # None: the queue has lost the request
        queue_ms = max(known.assigned_ms - known.submitted_ms, 0)
        first_ms = validation_ms + max(known.first_ms - known.submitted_ms, 0)
        output_ms = max(known.ended_ms - known.first_ms, 0) / max(known.num_output_tokens - 1, 1)
    inference_ms = max(total_ms - validation_ms - queue_ms, 0.0)
    lorax_metrics.timed(validation_ms / 1000, queue_ms / 1000, inference_ms / 1000)
    values = {
        "x-compute-time": total_ms,
        "x-total-time": total_ms,
        "x-validation-time": validation_ms,
        "x-queue-time": queue_ms,
        "x-inference-time": inference_ms,
        "x-time-per-token": inference_ms / max(usage.completion_tokens, 1),
        "x-time-to-first-token": first_ms,
        "x-time-per-output-token": output_ms,
        "x-prompt-tokens": usage.prompt_tokens,
        "x-generated-tokens": usage.completion_tokens,
        "x-skipped-tokens": 0,
        "x-total-tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    return {name: str(round(value)) for name, value in values.items()}


def compute_type(base: m.ServedModel) -> str:
    """Return the value of LoRAX's header `x-compute-type`."""
    return "gpu+optimized" if base.device == "cuda" else "cpu+optimized"


def _ascii(value: str) -> str:
    """Return a value in characters allowed in a header."""
    return value.encode("ascii", "backslashreplace").decode().replace("\n", "\\n").replace("\r", "\\r")

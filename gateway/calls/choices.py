"""One choice of an answer: from the deltas of its request to text, logprobs and an end. Pure."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from gateway.calls.parse import Options
from gateway.calls.replies import Cursor
from gateway.calls.tokenize import Prompt
from protocol.wire import messages as m
from protocol.wire.error_codec import error_from
from protocol.wire.errors import Conflict
from protocol.wire.text import OutputText, StopRule


class TokenLogprob(NamedTuple):
    """A token's logprob, NaN for a prompt's first, and the most likely tokens at its place."""

    id: int
    logprob: float
    top: list[tuple[int, float]]  # or those that were asked for
    rank: int = 0  # of a prompt's token: how many are as likely, itself among them


@dataclass(slots=True)
class Piece:
    """What a choice has gained since the piece before."""

    index: int
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt: list[TokenLogprob] = field(default_factory=list)  # of the prompt's tokens, if they are wanted
    ids: list[int] = field(default_factory=list)  # of the output's tokens, if they are wanted
    finish: str = ""  # "stop" or "length" at the end


class Choice:
    """The state of one choice, which is one request in the queue."""

    def __init__(self, index: int, rid: str, prompt: Prompt, options: Options) -> None:
        self.index = index
        self.rid = rid
        self.prompt = prompt
        self.cursor = Cursor()
        self.num_cached_tokens = 0
        self.options = options
        self.needs_prompt = options.sampling.prompt_logprobs is not None
        """Whether `give_prompt` is still to be called, before the first token is taken."""
        self._prompt: list[TokenLogprob] = []
        self._echo = prompt.echo if options.echo else ""
        self._record_bytes = options.record_bytes
        self._shown, self._shown_records = bytearray(), bytearray()  # everything taken so far, as in the log
        self._output = OutputText(
            prompt.files.tokens,
            StopRule.of(options.stop, options.stop_token_ids, options.sampling, prompt.files.eos_ids),
            shown=prompt.form.shown if prompt.form is not None else {},
            includes_stop=options.includes_stop,
        )

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, the one that ended the text included."""
        return 0 if self.options.scores_only or self.options.output == "numbers" else self.cursor.next

    @property
    def shown(self) -> tuple[bytes, bytes]:
        """The ids and logprob records delivered so far, to mend a log that has lost its end."""
        return bytes(self._shown), bytes(self._shown_records)

    @property
    def record_bytes(self) -> int:
        """Size of a token's logprob record, 0 without logprobs."""
        return self._record_bytes

    def give_prompt(self, ids: bytes, records: bytes) -> None:
        """Take the prompt's tokens (int32) and their logprob records, to be shown with the next piece."""
        self.needs_prompt = False
        self._prompt = unpack(ids, records, of_prompt=True)

    def take(self, delta: m.Delta, piece: Piece) -> None:
        """Add a delta that leaves no gap to `piece`. Raises the error that ended the request."""
        if self.cursor.is_stale(delta):
            return
        ids, records = self.cursor.take(delta, self._record_bytes)
        self._shown += ids
        self._shown_records += records
        if self._echo:
            piece.text, self._echo = self._echo, ""
        if self._prompt:
            piece.prompt, self._prompt = self._prompt, []
        if ids and not self.options.scores_only:
            self.absorb(ids, records, piece)
        if delta.usage is not None:
            self.num_cached_tokens = delta.usage.num_cached_tokens
        if delta.finish == "error":
            raise error_from(delta.error)
        if delta.finish == "cancelled":
            raise Conflict("the request was cancelled", code="cancelled")
        if delta.finish and self.options.scores_only:
            piece.finish = "length"
        elif delta.finish:
            piece.text += self._output.finish()
            piece.finish = delta.finish

    def skip(self, piece: Piece) -> None:
        """End a choice of which no token is wanted: its text is the echoed prompt."""
        self.cursor.ended = True
        piece.text, piece.finish = self._echo, "length"

    def absorb(self, ids: bytes, records: bytes, piece: Piece) -> None:
        """Add to `piece` new tokens (int32) and their logprob records, if there are any."""
        if self.options.output == "numbers":  # read from `shown` at the end
            return
        if self.options.shows_ids:
            piece.ids += memoryview(ids).cast("i")
        if not self._record_bytes:
            piece.text += self._output.add(memoryview(ids).cast("i"))
            return
        tokens = unpack(ids, records)
        if self.options.output == "tokens":
            piece.logprobs += tokens
            return
        for token in tokens:
            if self._output.ended:
                break
            piece.text += self._output.add((token.id,))
            piece.logprobs.append(token)  # an end token too: it is no part of the text, but counted in the usage


def mean_logprob(piece: Piece) -> float:
    """Return the mean logprob of a choice's output, 0 without one."""
    return sum(token.logprob for token in piece.logprobs) / max(len(piece.logprobs), 1)


def best_of(pieces: Sequence[Piece], options: Options) -> Sequence[Piece]:
    """Return the choices that are shown: for each prompt all `n`, or those with the best mean logprob, best first."""
    n, num_best = options.n, options.num_best or options.n
    if num_best == n:
        return pieces
    shown: list[Piece] = []
    for start in range(0, len(pieces), n):
        ranked = sorted(pieces[start : start + n], key=mean_logprob, reverse=True)
        shown += ranked[:num_best]
    return [replace(piece, index=i) for i, piece in enumerate(shown)]


def unpack(ids: bytes, records: bytes, *, of_prompt: bool = False) -> list[TokenLogprob]:
    """Return tokens (int32, at least one) with the logprobs of their records, all of one size.

    A record is the token's logprob (float32), of a prompt's token its rank (int32), then the most likely ids and
    logprobs (int32, float32).
    """
    num_top = (len(records) * 4 // len(ids) - 4) // 8
    layout = struct.Struct("<f" + "i" * of_prompt + "if" * num_top)
    return [
        TokenLogprob(id_, logprob, list(zip(rest[of_prompt::2], rest[of_prompt + 1 :: 2], strict=True)),
                     rest[0] if of_prompt else 0)
        for id_, (logprob, *rest) in zip(memoryview(ids).cast("i"), layout.iter_unpack(records), strict=True)
    ]  # fmt: skip

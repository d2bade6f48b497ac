"""One choice of an answer: from the deltas of its request to text, logprobs and an end. Pure."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from gateway.openai_api import Options
from gateway.replies import Cursor
from gateway.tokenizer import ModelFiles
from protocol import messages as m
from protocol.bus import error_from
from protocol.errors import Conflict
from protocol.text import OutputText


class TokenLogprob(NamedTuple):
    """A token's logprob, and the most likely tokens at its place."""

    id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(slots=True)
class Piece:
    """What a choice gained since it was last looked at."""

    index: int
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str = ""  # "stop" or "length" at the end


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a call."""

    ids: bytes  # int32; b"" when it has been submitted before and is not needed again
    num_tokens: int
    text: str  # to be echoed, or ""
    files: ModelFiles  # of who answers it
    grammar: str = ""  # that the answers must follow, as in `messages.Body`


class Choice:
    """The state of one choice, which is one request in the queue."""

    def __init__(self, index: int, rid: str, prompt: Prompt, options: Options) -> None:
        end_ids = frozenset(options.stop_token_ids)
        if not options.sampling.ignore_eos:
            end_ids |= prompt.files.eos_ids
        self.index = index
        self.rid = rid
        self.prompt = prompt
        self.cursor = Cursor()
        self.num_cached_tokens = 0
        self._echo = prompt.text if options.echo else ""
        self._record_bytes = options.record_bytes
        self._shown, self._shown_records = bytearray(), bytearray()  # as in the log
        self._output = OutputText(
            prompt.files.tokenizer, stop=options.stop, end_ids=end_ids, min_tokens=options.sampling.min_tokens
        )

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, the one that ended the text included."""
        return self.cursor.next

    @property
    def shown(self) -> tuple[bytes, bytes]:
        """The ids and logprob records delivered so far, to mend a log that has lost its end."""
        return bytes(self._shown), bytes(self._shown_records)

    @property
    def record_bytes(self) -> int:
        """Size of a token's logprob record, 0 without logprobs."""
        return self._record_bytes

    def take(self, delta: m.Delta, piece: Piece) -> None:
        """Add to `piece` what a delta that needs no log brings. Raises the error that ended the request."""
        if self.cursor.is_stale(delta):
            return
        ids, records = self.cursor.take(delta, self._record_bytes)
        self._shown += ids
        self._shown_records += records
        if self._echo:
            piece.text, self._echo = self._echo, ""
        if ids:
            self.absorb(ids, records, piece)
        if delta.usage is not None:
            self.num_cached_tokens = delta.usage.num_cached_tokens
        if delta.finish == "error":
            raise error_from(delta.error)
        if delta.finish == "cancelled":
            raise Conflict("the request was cancelled", code="cancelled")
        if delta.finish:
            piece.text += self._output.finish()
            piece.finish = delta.finish

    def skip(self, piece: Piece) -> None:
        """End a choice for which no token is wanted: it is its prompt."""
        self.cursor.ended = True
        piece.text, piece.finish = self._echo, "length"

    def absorb(self, ids: bytes, records: bytes, piece: Piece) -> None:
        """Add to `piece` new tokens (int32) and their logprob records, if there are any."""
        if not self._record_bytes:
            piece.text += self._output.add(memoryview(ids).cast("i"))
            return
        for token in unpack(ids, records):
            if self._output.ended:
                break
            piece.text += self._output.add((token.id,))
            # The token that only says "end" is no part of the text.
            if not self._output.ended or self._output.stop is not None:
                piece.logprobs.append(token)


def unpack(ids: bytes, records: bytes) -> list[TokenLogprob]:
    """Return tokens (int32, at least one) with what their logprob records, all of one size, say."""
    num_top = (len(records) * 4 // len(ids) - 4) // 8
    layout = struct.Struct("<f" + "if" * num_top)
    return [
        TokenLogprob(id_, logprob, list(zip(top[::2], top[1::2], strict=True)))
        for id_, (logprob, *top) in zip(memoryview(ids).cast("i"), layout.iter_unpack(records), strict=True)
    ]

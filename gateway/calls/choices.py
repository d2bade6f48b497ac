"""Turns the deltas of one choice's request into text, logprobs and a finish reason. Pure."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray

from gateway.bodies.json_slices import ENTRIES
from gateway.calls.parsed_call import CallOptions
from gateway.calls.replies import Cursor
from gateway.calls.tokenize import Prompt
from protocol.wire import messages as m
from protocol.wire.error_codec import error_from
from protocol.wire.errors import Conflict
from protocol.wire.text import OutputText, StopRule


class TokenLogprob(NamedTuple):
    """A token, its logprob (NaN for the first of a prompt), and the most likely tokens at its position."""

    id: int
    logprob: float
    top: Sequence[tuple[int, float]]  # the most likely tokens, or the requested ones
    rank: int = 0  # rank of a prompt token: number of tokens at least as likely, itself included


class Ranking(Sequence[tuple[int, float]]):
    """Token ids with their logprobs, converted to Python objects on access: a list of a whole vocabulary is large."""

    __slots__ = ("_ids", "_logprobs")

    def __init__(self, ids: NDArray[np.intp], logprobs: NDArray[np.float32]) -> None:
        """Store arrays of equal length."""
        self._ids = ids
        self._logprobs = logprobs

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> tuple[int, float]: ...
    @overload
    def __getitem__(self, index: slice) -> Ranking: ...
    def __getitem__(self, index: int | slice) -> tuple[int, float] | Ranking:
        if isinstance(index, slice):
            return Ranking(self._ids[index], self._logprobs[index])
        return int(self._ids[index]), float(self._logprobs[index])

    def __iter__(self) -> Iterator[tuple[int, float]]:
        for begin in range(0, len(self), ENTRIES):  # tolist() holds the GIL until it is done
            part = slice(begin, begin + ENTRIES)
            yield from zip(self._ids[part].tolist(), self._logprobs[part].tolist(), strict=True)


class Logprobs:
    """Tokens with their logprobs, packed as in the log: Python objects would take twenty times the memory."""

    __slots__ = ("_is_whole", "_of_prompt", "_records", "packed")

    def __init__(
        self,
        packed: bytes | bytearray = b"",
        records: bytes | bytearray = b"",
        *,
        of_prompt: bool = False,
        is_whole: bool = False,
    ) -> None:
        """packed: token ids (int32). records: one record per token, see below.

        A record is the logprob (float32), for a prompt token its rank (int32), then id and logprob (int32, float32) of
        each other token. is_whole: these pairs are replaced by the logprobs of all tokens, in order of id (float32).
        """
        self.packed = packed
        self._records = records
        self._of_prompt = of_prompt
        self._is_whole = is_whole

    def __len__(self) -> int:
        return len(self.packed) // 4

    @property
    def ids(self) -> memoryview[int]:
        """The token ids."""
        return memoryview(self.packed).cast("i")

    @property
    def values(self) -> memoryview[float]:
        """The logprobs of the tokens, without the other tokens at their positions."""
        return memoryview(self._records).cast("f")[:: max(len(self._records) // max(len(self.packed), 1), 1)]

    def __iter__(self) -> Iterator[TokenLogprob]:
        """Yield the tokens as objects, one at a time."""
        if not self.packed:
            return
        if self._is_whole:
            yield from self._whole()
            return
        num_top = (len(self._records) * 4 // len(self.packed) - 4) // 8
        first = int(self._of_prompt)
        layout = struct.Struct("<f" + "i" * first + "if" * num_top)
        for id_, (logprob, *rest) in zip(self.ids, layout.iter_unpack(self._records), strict=True):
            top = list(zip(rest[first::2], rest[first + 1 :: 2], strict=True))
            yield TokenLogprob(id_, logprob, top, rest[0] if first else 0)

    def _whole(self) -> Iterator[TokenLogprob]:
        """Yield tokens whose records list the whole vocabulary, sorted by logprob; each takes milliseconds."""
        first = 1 + self._of_prompt
        rows = np.frombuffer(self._records, "<f4").reshape(len(self), -1)
        ranks = rows[:, 1].view("<i4").tolist() if self._of_prompt else [0] * len(rows)
        for id_, rank, row in zip(self.ids, ranks, rows, strict=True):
            order = np.argsort(-row[first:], kind="stable")
            yield TokenLogprob(id_, float(row[0]), Ranking(order, row[first:][order]), rank)

    def part(self, begin: int, end: int) -> Logprobs:
        """Return the tokens [begin, end)."""
        if begin == 0 and end == len(self):
            return self
        size = len(self._records) // max(len(self), 1)
        records = self._records[begin * size : end * size]
        return self._with(self.packed[4 * begin : 4 * end], records)

    def joined(self, more: Logprobs) -> Logprobs:
        """Return these tokens followed by `more`. The result may be this object, extended in place."""
        if not more.packed or not self.packed:
            return self if self.packed else more
        if not isinstance(self.packed, bytearray):
            packed, records = bytearray(self.packed) + more.packed, bytearray(self._records) + more._records
            return self._with(packed, records)
        assert isinstance(self._records, bytearray)
        self.packed += more.packed
        self._records += more._records
        return self

    def _with(self, packed: bytes | bytearray, records: bytes | bytearray) -> Logprobs:
        return Logprobs(packed, records, of_prompt=self._of_prompt, is_whole=self._is_whole)


NONE = Logprobs()


class Piece(Struct):
    """The output of a choice since its previous piece."""

    index: int
    text: str = ""
    logprobs: Logprobs = NONE
    prompt: Logprobs = NONE  # logprobs of the prompt's tokens, if requested
    ids: list[int] = []  # ids of the output's tokens, if requested
    finish: str = ""  # "stop" or "length" at the end
    stop: str | None = None  # the stop string that ended it, if one did
    end_id: int | None = None  # the token that ended it, if one did

    def add(self, piece: Piece) -> None:
        """Append a later piece of the same choice."""
        self.text += piece.text
        self.logprobs = self.logprobs.joined(piece.logprobs)
        self.prompt = self.prompt.joined(piece.prompt)
        self.ids += piece.ids
        self.finish, self.stop = piece.finish or self.finish, piece.stop or self.stop
        self.end_id = self.end_id if piece.end_id is None else piece.end_id


class Choice:
    """The state of one choice, which is one request in the queue."""

    def __init__(self, index: int, rid: str, prompt: Prompt, options: CallOptions) -> None:
        self.index = index
        self.rid = rid
        self.prompt = prompt
        self.cursor = Cursor()
        self.num_cached_tokens = 0
        self.options = options
        self.needs_prompt = options.sampling.prompt_logprobs is not None
        """Whether `give_prompt` must be called before the first output token is taken."""
        self._prompt = NONE
        self._echo = prompt.echo if options.echo else ""
        self._record_bytes = options.record_bytes
        self._shown, self._shown_records = bytearray(), bytearray()  # all ids and records taken so far, as in the log
        self._output = OutputText(
            prompt.files.tokens,
            StopRule.of(options.stop, options.stop_token_ids, options.sampling, prompt.files.eos_ids),
            shown=prompt.form.shown if prompt.form is not None else {},
            includes_stop=options.includes_stop,
        )

    @property
    def num_output_tokens(self) -> int:
        """Number of tokens generated so far, including the one that ended the text."""
        return 0 if self.options.scores_only or self.options.output == "numbers" else self.cursor.next

    @property
    def shown(self) -> tuple[bytes, bytes]:
        """The ids and logprob records delivered so far, to repair a log that has lost its end."""
        return bytes(self._shown), bytes(self._shown_records)

    @property
    def record_bytes(self) -> int:
        """Size of a token's logprob record, 0 without logprobs."""
        return self._record_bytes

    def give_prompt(self, ids: bytes, records: bytes) -> None:
        """Store the prompt's token ids (int32) and logprob records for the next piece."""
        self.needs_prompt = False
        self._prompt = Logprobs(ids, records, of_prompt=True, is_whole=self.options.sampling.prompt_logprobs == m.WHOLE)

    def take(self, delta: m.Delta, piece: Piece) -> None:
        """Add a delta's new tokens to `piece`; there must be no gap before them.

        Raises the error that ended the request.
        """
        if self.cursor.is_stale(delta):
            return
        self._gain(*self.cursor.take(delta, self._record_bytes), piece)
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
            piece.finish, piece.stop, piece.end_id = delta.finish, self._output.stop, self._output.end_id

    def next_piece(self, delta: m.Delta) -> Piece | None:
        """Return the piece of a delta that has only the next tokens; None for any other delta, which is left unread."""
        if delta.finish or delta.timing is not None or self.needs_prompt or not self.cursor.take_next(delta):
            return None
        piece = Piece(self.index)
        self._gain(delta.ids, delta.logprobs, piece)
        return piece

    def _gain(self, ids: bytes, records: bytes, piece: Piece) -> None:
        self._shown += ids
        if records:
            self._shown_records += records
        if self._echo:
            piece.text, self._echo = self._echo, ""
        if self._prompt is not NONE:
            piece.prompt, self._prompt = self._prompt, NONE
        if ids and not self.options.scores_only:
            self.absorb(ids, records, piece)

    def skip(self, piece: Piece) -> None:
        """End a choice for which no token was requested: its text is the echoed prompt."""
        self.cursor.ended = True
        piece.text, piece.finish = self._echo, "length"

    def absorb(self, ids: bytes, records: bytes, piece: Piece) -> None:
        """Add new token ids (int32) and their logprob records, if any, to `piece`."""
        options = self.options
        if options.output == "numbers":  # read from `shown` at the end
            return
        numbers = memoryview(ids).cast("i")
        if options.shows_ids:
            piece.ids += numbers
        if not self._record_bytes:
            piece.text += self._output.add(numbers)
            return
        tokens = Logprobs(ids, records, is_whole=options.sampling.num_logprobs == m.WHOLE)
        if options.output != "tokens":
            num = 0
            for id_ in numbers:
                if self._output.ended:
                    break
                piece.text += self._output.add((id_,))
                num += 1  # also an end token: it is not in the text, but counts in the usage
            tokens = tokens.part(0, num)
        piece.logprobs = piece.logprobs.joined(tokens)


def tokens_of(delta: m.Delta, record_bytes: int) -> list[m.Delta]:
    """Split a delta into deltas of one token each, followed by one that ends the request if the delta did.

    record_bytes: size of a token's logprob record.
    """
    parts = [
        m.Delta(
            delta.rid,
            delta.epoch,
            delta.seq0 + i,
            delta.ids[4 * i : 4 * i + 4],
            delta.logprobs[record_bytes * i : record_bytes * (i + 1)],
        )
        for i in range(len(delta.ids) // 4)
    ]
    if delta.finish:
        end = delta.seq0 + len(delta.ids) // 4
        parts.append(m.Delta(delta.rid, delta.epoch, end, finish=delta.finish, error=delta.error, usage=delta.usage))
    return parts


def mean_logprob(piece: Piece) -> float:
    """Return the mean logprob of a choice's output tokens, 0 if it has none."""
    return sum(piece.logprobs.values) / max(len(piece.logprobs), 1)


def best_of(pieces: Sequence[Piece], options: CallOptions) -> Sequence[Piece]:
    """Return the choices to show: for each prompt all `n`, or the `num_best` of highest mean logprob, best first."""
    n, num_best = options.n, options.num_best or options.n
    if num_best == n:
        return pieces
    shown: list[Piece] = []
    for start in range(0, len(pieces), n):
        ranked = sorted(pieces[start : start + n], key=mean_logprob, reverse=True)
        shown += ranked[:num_best]
    return [structs.replace(piece, index=i) for i, piece in enumerate(shown)]

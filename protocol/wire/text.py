"""Tokens to text, shared by gateway and worker, so that a stop string ends a request at the same token in both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Decodes ids one at a time and never returns half a UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._length = 0  # characters given out

    def add(self, ids: Iterable[int]) -> str:
        """Return the text that these further ids complete."""
        pieces: list[str] = []
        for id_ in ids:
            self._ids.append(id_)
            piece = self._stream.step(self._tokenizer, id_)
            if piece:
                pieces.append(piece)
        text = "".join(pieces)
        self._length += len(text)
        return text

    def flush(self) -> str:
        """Return the text still held back, after the last id: the bytes of an incomplete character as U+FFFD."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
        rest = whole[self._length :]
        self._length = len(whole)
        return rest


class StopMatcher:
    """Finds the first stop string in a growing text and holds back text that may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.matched: str | None = None

    def add(self, text: str) -> str:
        """Take new text; return the text that can be shown. Returns "" once `matched` is set."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        buffer = self._held + text
        # Of matches at the same position, the first in the caller's order counts.
        found = [(at, i) for i, stop in enumerate(self._stops) if (at := buffer.find(stop)) >= 0]
        if found:
            at, i = min(found)
            self.matched, self._held = self._stops[i], ""
            return buffer[:at]
        keep = max(overlap(buffer, stop) for stop in self._stops)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def flush(self) -> str:
        """Return the text still held back, after the last of the text."""
        rest, self._held = self._held, ""
        return rest


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0


class OutputText:
    """The text of one request's output tokens, as far as it can be shown, and where it ends.

    It ends before the first stop string and before the first token of `end_ids`. Neither ends it within the first
    `min_tokens` tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        end_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
        shown: Mapping[int, str] = {},
    ) -> None:
        """`shown`: special tokens that are part of the text, and how each is written."""
        self._detokenizer = Detokenizer(tokenizer)
        self._matcher = StopMatcher(stop)
        self._end_ids = end_ids
        self._min_tokens = min_tokens
        self._shown = shown
        self.num_tokens = 0  # taken, including the one that ended the text
        self.ended = False

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._matcher.matched

    def add(self, ids: Iterable[int]) -> str:
        """Return the text that these further ids make visible; "" once the text has ended."""
        pieces: list[str] = []
        for id_ in ids:
            if self.ended:
                break
            self.num_tokens += 1
            may_end = self.num_tokens > self._min_tokens
            if may_end and id_ in self._end_ids:
                self.ended = True
                break
            text = self._shown.get(id_) or self._detokenizer.add((id_,))
            if may_end:
                text = self._matcher.add(text)
                self.ended = self._matcher.matched is not None
            pieces.append(text)
        return "".join(pieces)

    def finish(self) -> str:
        """Return the text still held back, after the last id."""
        if self._matcher.matched is not None:
            return ""
        self.ended = True
        return self._matcher.add(self._detokenizer.flush()) + self._matcher.flush()

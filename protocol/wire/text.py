"""Tokens to text, shared by gateway and worker, so that a stop string ends a request at the same token in both."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from protocol.wire import messages as m
from protocol.wire.stop_regex import Search, automaton_of
from protocol.wire.tokens import Detokenizer, TokenTable


@dataclass(frozen=True, slots=True)
class StopRule:
    """Where the output of a request ends: the worker generates no further, and the gateway shows no more.

    It ends before the first stop string in the text, or the first text that matches one of `stop_regex`, and with the
    first token of `end_ids`; none counts within the first `min_tokens` tokens. The text is without special tokens
    unless the request wants them.
    """

    stop: Sequence[str] = ()
    end_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    with_special: bool = False  # special tokens are part of the text
    stop_regex: Sequence[str] = ()

    @property
    def reads_text(self) -> bool:
        """Whether something is looked for in the text."""
        return any(self.stop) or bool(self.stop_regex)

    @classmethod
    def of(
        cls, stop: Sequence[str], stop_token_ids: Iterable[int], sampling: m.Sampling, eos_ids: frozenset[int]
    ) -> StopRule:
        """Return the rule of a request. eos_ids: tokens that end the model's texts, unless the request ignores them."""
        end_ids = frozenset(stop_token_ids)
        if not sampling.ignore_eos:
            end_ids |= eos_ids
        return cls(stop, end_ids, sampling.min_tokens, sampling.shows_special, sampling.stop_regex)


class StopMatcher:
    """Finds the first stop string in a growing text and holds back text that may be the beginning of one.

    Held is the longest end of the text that some stop string begins with. What begins a stop string is found by
    bisection in their sorted list, and an end only ever loses characters at its beginning, so a character costs about
    one look-up however many and long the stop strings are. Nothing is built for a request but the sorted list.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._order = {stop: i for i, stop in reversed(list(enumerate(stops))) if stop}
        self._sorted = sorted(self._order)
        self._ends = tuple(self._sorted)  # as `str.endswith` takes them
        self._held = ""
        self.matched: str | None = None

    @property
    def ending(self) -> str:
        """The text that has matched, "" if none has."""
        return self.matched or ""

    def add(self, text: str) -> str:
        """Take new text; return the text that can be shown. Returns "" once `matched` is set."""
        if self.matched is not None:
            return ""
        if not self._sorted:
            return text
        buffer, start = self._held + text, 0
        found: tuple[int, int, str] | None = None  # the first in the caller's order counts among those that begin alike
        for end in range(len(self._held) + 1, len(buffer) + 1):
            while not self._begins_one(buffer[start:end]):
                start += 1
            if found is not None and start > found[0]:
                break  # what ends from here on begins later
            if buffer.endswith(self._ends, start, end):
                stop = max((stop for stop in self._sorted if buffer.endswith(stop, start, end)), key=len)
                match = end - len(stop), self._order[stop], stop
                found = match if found is None else min(found, match)
        if found is not None:
            self.matched, self._held = found[2], ""
            return buffer[: found[0]]
        self._held = buffer[start:]
        return buffer[:start]

    def _begins_one(self, text: str) -> bool:
        """Return whether a stop string begins with, or is, `text`."""
        at = bisect_left(self._sorted, text)
        return at < len(self._sorted) and self._sorted[at].startswith(text)

    def flush(self) -> str:
        """Return the text still held back, after the last of the text."""
        rest, self._held = self._held, ""
        return rest


class RegexMatcher:
    """Finds the first text that matches an expression, or is a stop string, and holds back what may become one.

    What is held back of a text depends on nothing but the text: on the place where the earliest match under way began.
    """

    def __init__(self, stops: Sequence[str], expressions: Sequence[str]) -> None:
        """Begin a text. Raises BadRequest for expressions that are not served, see `stop_regex`."""
        self._strings = StopMatcher(stops)
        self._expressions = expressions
        self._search = Search(automaton_of(tuple(expressions)))
        self._held: list[str] = []
        self._num_shown = 0  # characters given out, and below, of all that were read, those free of stop strings
        self._num_free = 0
        self.matched: str | None = None  # the stop string, or the expression
        self.ending = ""  # the text that has matched

    def add(self, text: str) -> str:
        """Take new text; return the text that can be shown. Returns "" once `matched` is set."""
        if self.matched is not None:
            return ""
        self._held.append(text)
        self._num_free += len(self._strings.add(text))
        self._search.add(text)
        match, stop = self._search.match, self._strings.matched
        if stop is not None and (match is None or self._num_free <= match.begin):
            shown = self._release(self._num_free)
            self.matched = self.ending = stop
        elif match is not None:
            shown = self._release(match.begin)
            self.matched = self._expressions[match.expression]
            self.ending = "".join(self._held)[: match.end - match.begin]
        else:
            return self._release(min(self._num_free, self._search.earliest))
        self._held = []
        return shown

    def _release(self, end: int) -> str:
        """Give out what is held of the text up to a place in it."""
        num = end - self._num_shown
        if not num:
            return ""
        text, self._num_shown = "".join(self._held), end
        self._held = [text[num:]]
        return text[:num]

    def flush(self) -> str:
        """Return the text still held back, after the last of the text."""
        rest, self._held = "".join(self._held), []
        return rest


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0


class OutputText:
    """The output of one request: what of its text can be shown so far, and where it ends by its `StopRule`.

    Gateway and worker feed it the same tokens one by one, so that both end a request at the same one.
    """

    def __init__(
        self, tokens: TokenTable | None, rule: StopRule, *, shown: Mapping[int, str] = {}, includes_stop: bool = False
    ) -> None:
        """tokens: None where no text is wanted, and there is nothing to look for in it.

        shown: special tokens that are written into the text, and how; stop strings are looked for without them. Of a
        text with all special tokens they are part already. includes_stop: what ended the text is shown, if it is text.
        Raises BadRequest if ids of this tokenizer cannot be decoded, and for expressions that are not served.
        """
        assert tokens is not None or not rule.reads_text
        self._detokenizer = None if tokens is None else Detokenizer(tokens, special=rule.with_special)
        self._matcher = RegexMatcher(rule.stop, rule.stop_regex) if rule.stop_regex else StopMatcher(rule.stop)
        self._reads_text = rule.reads_text
        self._min_tokens, self._end_ids = rule.min_tokens, rule.end_ids
        self._shown: Mapping[int, str] = {} if rule.with_special else shown
        self._includes_stop = includes_stop
        self._markers: deque[tuple[int, str]] = deque()  # special tokens to be written: after how many characters
        self._num_read = 0  # characters before the next token's, and below, of them given out; only with `shown`
        self._num_given = 0
        self.num_tokens = 0  # seen, the one that ended the text included
        self.ended = False
        self.end_id: int | None = None  # the token that ended the text, if one of `end_ids` did

    @property
    def stop(self) -> str | None:
        """The stop string, or the expression, that ended the text, if one did."""
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
                self.ended, self.end_id = True, id_
                if self._includes_stop and self._detokenizer is not None:
                    pieces.append(self._shown_text(self._matcher.add(self._detokenizer.add_one(id_))))
                break
            if self._detokenizer is None:
                continue
            text = self._detokenizer.add_one(id_)
            if self._shown:
                self._num_read += len(text)
                if id_ in self._shown:
                    self._markers.append((self._num_read, self._shown[id_]))
            if may_end and self._reads_text:
                text = self._matcher.add(text)
                self.ended = self._matcher.matched is not None
                if self.ended and self._includes_stop:
                    text += self._matcher.ending
            pieces.append(self._with_markers(text) if self._shown else text)
        return pieces[0] if len(pieces) == 1 else "".join(pieces)

    def finish(self) -> str:
        """Return the text still held back, after the last id."""
        if self._matcher.matched is not None:
            return ""
        self.ended = True
        rest = self._detokenizer.flush() if self._detokenizer is not None else ""
        text = self._matcher.add(rest) + self._matcher.flush()
        if self._includes_stop:
            text += self._matcher.ending
        return self._shown_text(text)

    def _shown_text(self, text: str) -> str:
        return self._with_markers(text) if self._shown else text

    def _with_markers(self, text: str) -> str:
        """Return the characters that are given out next, with the special tokens that stand before or among them."""
        pieces: list[str] = []
        start, end = self._num_given, self._num_given + len(text)
        while self._markers and self._markers[0][0] <= end:
            place, marker = self._markers.popleft()
            pieces += [text[self._num_given - start : place - start], marker]
            self._num_given = place
        pieces.append(text[self._num_given - start :])
        self._num_given = end
        return "".join(pieces)

"""Text from tokens, shared by gateway and worker so that both end a request at the same token."""

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
    """When the output of a request ends: the worker stops generating, and the gateway shows nothing further.

    The output ends before the first stop string or the first match of `stop_regex`, or with the first token of
    `end_ids`. None of these counts within the first `min_tokens` tokens. The searched text contains special tokens only
    if the request wants them.
    """

    stop: Sequence[str] = ()
    end_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    with_special: bool = False  # whether special tokens are part of the text
    stop_regex: Sequence[str] = ()

    @property
    def reads_text(self) -> bool:
        """Whether the text must be searched for stop strings or expressions."""
        return any(self.stop) or bool(self.stop_regex)

    @classmethod
    def of(
        cls, stop: Sequence[str], stop_token_ids: Iterable[int], sampling: m.Sampling, eos_ids: frozenset[int]
    ) -> StopRule:
        """Return the rule of a request. eos_ids: the model's end tokens, used unless the request ignores them."""
        end_ids = frozenset(stop_token_ids)
        if not sampling.ignore_eos:
            end_ids |= eos_ids
        return cls(stop, end_ids, sampling.min_tokens, sampling.shows_special, sampling.stop_regex)


class StopMatcher:
    """Finds the first stop string in a growing text and holds back text that may be the beginning of one.

    It holds back the longest suffix of the text that is a prefix of some stop string. Prefixes are found by bisection
    in the sorted list of stop strings, and the suffix only ever loses characters at its beginning. So a character costs
    about one lookup, however many and long the stop strings are. Nothing is built per request but that sorted list.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._order = {stop: i for i, stop in reversed(list(enumerate(stops))) if stop}
        self._sorted = sorted(self._order)
        self._ends = tuple(self._sorted)  # tuple for `str.endswith`
        self._held = ""
        self.matched: str | None = None

    @property
    def ending(self) -> str:
        """The stop string that was found, "" if none."""
        return self.matched or ""

    def add(self, text: str) -> str:
        """Append text and return the text that may be shown; "" once `matched` is set."""
        if self.matched is not None:
            return ""
        if not self._sorted:
            return text
        buffer, start = self._held + text, 0
        found: tuple[int, int, str] | None = None  # among equal positions, the first in the caller's order
        for end in range(len(self._held) + 1, len(buffer) + 1):
            while not self._begins_one(buffer[start:end]):
                start += 1
            if found is not None and start > found[0]:
                break  # any stop string that ends later also begins later
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
        """Return whether some stop string equals `text` or begins with it."""
        at = bisect_left(self._sorted, text)
        return at < len(self._sorted) and self._sorted[at].startswith(text)

    def flush(self) -> str:
        """Return the text still held back, at the end of the output."""
        rest, self._held = self._held, ""
        return rest


class RegexMatcher:
    """Finds the first match of an expression or stop string, and holds back text that may become one.

    The held text begins where the earliest unfinished match begins, so it depends on nothing but the text.
    """

    def __init__(self, stops: Sequence[str], expressions: Sequence[str]) -> None:
        """Begin a text. Raises BadRequest for unsupported expressions, see `stop_regex`."""
        self._strings = StopMatcher(stops)
        self._expressions = expressions
        self._search = Search(automaton_of(tuple(expressions)))
        self._held: list[str] = []
        self._num_shown = 0  # characters returned so far
        self._num_free = 0  # characters read that are free of stop strings
        self.matched: str | None = None  # the stop string or the expression that was found
        self.ending = ""  # the text that matched it

    def add(self, text: str) -> str:
        """Append text and return the text that may be shown; "" once `matched` is set."""
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
        """Return the held text up to position `end` of the whole text, and stop holding it."""
        num = end - self._num_shown
        if not num:
            return ""
        text, self._num_shown = "".join(self._held), end
        self._held = [text[num:]]
        return text[:num]

    def flush(self) -> str:
        """Return the text still held back, at the end of the output."""
        rest, self._held = "".join(self._held), []
        return rest


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0


class OutputText:
    """The output text of one request: what can be shown so far, and where its `StopRule` ends it.

    Gateway and worker feed it the same tokens one at a time, so that both end a request at the same token.
    """

    def __init__(
        self, tokens: TokenTable | None, rule: StopRule, *, shown: Mapping[int, str] = {}, includes_stop: bool = False
    ) -> None:
        """tokens: None if no text is wanted and the rule searches none.

        shown: special token id -> text written in its place. Stop strings are searched without these texts. Ignored if
        the rule's text already contains all special tokens. includes_stop: show what ended the text, if it is text.
        Raises BadRequest if this tokenizer's ids cannot be decoded, or for unsupported expressions.
        """
        assert tokens is not None or not rule.reads_text
        self._detokenizer = None if tokens is None else Detokenizer(tokens, special=rule.with_special)
        self._matcher = RegexMatcher(rule.stop, rule.stop_regex) if rule.stop_regex else StopMatcher(rule.stop)
        self._reads_text = rule.reads_text
        self._min_tokens, self._end_ids = rule.min_tokens, rule.end_ids
        self._shown: Mapping[int, str] = {} if rule.with_special else shown
        self._includes_stop = includes_stop
        self._markers: deque[tuple[int, str]] = deque()  # special tokens still to be written: (characters before, text)
        self._num_read = 0  # characters before the next token; only with `shown`
        self._num_given = 0  # characters returned of them; only with `shown`
        self.num_tokens = 0  # tokens read, including the one that ended the text
        self.ended = False
        self.end_id: int | None = None  # the token of `end_ids` that ended the text; None: something else did

    @property
    def stop(self) -> str | None:
        """The stop string or the expression that ended the text; None: something else did."""
        return self._matcher.matched

    def add(self, ids: Iterable[int]) -> str:
        """Return the text that these ids make visible; "" once the text has ended."""
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
        """Return `text`, the next characters to show, with the special tokens before or inside it."""
        pieces: list[str] = []
        start, end = self._num_given, self._num_given + len(text)
        while self._markers and self._markers[0][0] <= end:
            place, marker = self._markers.popleft()
            pieces += [text[self._num_given - start : place - start], marker]
            self._num_given = place
        pieces.append(text[self._num_given - start :])
        self._num_given = end
        return "".join(pieces)

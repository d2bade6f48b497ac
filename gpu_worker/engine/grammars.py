"""Structured output: llguidance's matchers, compiled in threads, and the tokens that they allow next.

Each request with a grammar has a matcher of its own, which has consumed the request's output so far. Preemption leaves
it alone, as it does the tokens; on another worker a new matcher consumes the output again.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from gpu_worker.engine.masks import Filling, MaskCost, MaskFiller
from protocol.wire.errors import BadRequest, Internal
from protocol.wire.grammar_limits import GRAMMAR_LIMITS

NUM_COMPILERS = 2

MAX_COMPILED = 128
"""Compiled grammars that are kept, the most recently used."""

MAX_TOKENIZERS = 4
"""Tokenizers that are kept as llguidance sees them, the most recently used."""

LIMITS = LLParserLimits(**GRAMMAR_LIMITS, verbose_errors=False)


class Vocabulary:
    """A tokenizer as llguidance sees it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]) -> None:
        """vocab_size: entries of the logits; the tokenizer may know fewer tokens. Takes 0.25 s for 50,000 tokens."""
        self.source = tokenizer
        ends = sorted(id_ for id_ in eos_ids if id_ < vocab_size)
        self.tokens = LLTokenizer(tokenizer.to_str(), n_vocab=vocab_size, eos_token=ends or None)
        self.ends = tuple(self.tokens.eos_tokens)

    def is_special(self, id_: int) -> bool:
        """Return whether a token stands for no text, as end-of-text does."""
        return self.tokens.is_special_token(id_)


class Matcher:
    """One request's matcher, and which tokens may end its output besides the grammar's own end."""

    def __init__(self, state: LLMatcher, vocabulary: Vocabulary, stop_ids: Sequence[int], max_mask_s: float) -> None:
        """stop_ids: tokens that end the request. Special ones among them are allowed wherever the output may end.

        max_mask_s: see `MaskCost`.
        """
        self.state = state
        self.vocab_size = vocabulary.tokens.vocab_size
        self.ends = tuple(vocabulary.ends)
        more = (id_ for id_ in stop_ids if id_ not in vocabulary.ends and vocabulary.is_special(id_))
        self._more_ends = words_of(more, self.vocab_size)
        self._banned: tuple[np.ndarray, np.ndarray] | None = None  # ids, and the same as words
        self.cost = MaskCost(max_mask_s)
        self.filling: Filling | None = None  # its next mask, from when it was asked for until it is taken
        self._failure: BaseException | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the output is complete, so that nothing can follow."""
        return self.state.is_stopped() and not self.state.is_error()

    @property
    def is_filling(self) -> bool:
        """Whether the next mask is being computed, so that nothing else may be asked of `state`."""
        return self.filling is not None and not self.filling.is_done

    def take_mask(self) -> np.ndarray | None:
        """Return the next mask, int32 [n, W], once it is filled; None before."""
        filling = self.filling
        if filling is None or not filling.is_done:
            return None
        self.filling, self._failure = None, filling.failure
        return filling.mask

    def check(self) -> None:
        """Raise why the output cannot go on, if it cannot."""
        if self._failure is not None:
            raise self._failure
        if self.state.is_error():
            raise BadRequest(f"the output's grammar cannot be followed: {one_line(self.state.get_error())}")
        if self.cost.error is not None:
            raise self.cost.error

    def consume(self, token: int) -> None:
        """Take the next token of the output. Sets `error` if the grammar does not allow it."""
        self.state.consume_token(token)

    def possible(self, draft: list[int]) -> list[int]:
        """Return the draft tokens up to the first that the grammar does not allow."""
        try:
            return draft[: self.state.validate_tokens(draft)]
        except BaseException as error:  # noqa: BLE001  a request's edge: `check` tells of it
            self._failure = error
            return []

    def settle_ends(self, mask: np.ndarray, banned: np.ndarray) -> None:
        """Allow in a mask, int32 [W], what else may end the output, and forbid `banned`, which may not end it yet.

        Where the grammar allows nothing but an end, that stays allowed: it decides what is complete, not `min_tokens`.
        """
        if any(_has(mask, id_) for id_ in self.ends):
            mask |= self._more_ends
        if len(banned):
            if self._banned is None or len(self._banned[0]) != len(banned):
                self._banned = banned, words_of(banned.tolist(), self.vocab_size)
            rest = mask & ~self._banned[1]
            if rest.any():
                mask[:] = rest


def words_of(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """Return ids as the bits of int32 [W]."""
    bits = np.zeros(32 * -(-vocab_size // 32), np.uint8)
    bits[[id_ for id_ in ids if id_ < vocab_size]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def _has(mask: np.ndarray, id_: int) -> bool:
    return bool(mask.view(np.uint32)[id_ >> 5] >> np.uint32(id_ & 31) & np.uint32(1))


MatcherRow = tuple[Matcher, list[int]]
"""A matcher, and the draft tokens that follow what it has seen."""


class Grammars:
    """Compiles grammars and fills the masks of steps, in threads of its own."""

    def __init__(self, vocab_size: int, eos_ids: frozenset[int], max_mask_s: float) -> None:
        """vocab_size: entries of the model's logits. eos_ids: its end-of-text tokens. max_mask_s: see `MaskCost`."""
        self.on_ready: Callable[[], object] = lambda: None  # called from a thread when one is made or filled
        self.num_compiled = 0  # grammars compiled since the start
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._max_mask_s = max_mask_s
        self._lock = threading.Lock()
        # _lock guards these.
        self._vocabularies: list[Vocabulary] = []  # last used last
        self._compiled: OrderedDict[tuple[int, bytes], LLMatcher] = OrderedDict()  # each has consumed nothing
        self._compilers = ThreadPoolExecutor(NUM_COMPILERS, thread_name_prefix="grammar")
        self._filler = MaskFiller(lambda: self.on_ready())

    def close(self) -> None:
        """Compile and fill nothing more; does not wait for what is in progress."""
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self._filler.close()

    def make(
        self, grammar: str, tokenizer: Tokenizer | None, output: Sequence[int], stop_ids: Sequence[int]
    ) -> Future[Matcher]:
        """Start making the matcher of a request whose output so far is `output`.

        The future raises BadRequest and Internal. grammar: as in `messages.Body`. stop_ids: tokens that end it.
        """
        future = self._compilers.submit(self._make, grammar, tokenizer, output, stop_ids)
        future.add_done_callback(lambda _: self.on_ready())
        return future

    def _make(
        self, grammar: str, tokenizer: Tokenizer | None, output: Sequence[int], stop_ids: Sequence[int]
    ) -> Matcher:
        if tokenizer is None:
            raise BadRequest("this model has no tokenizer.json: structured output cannot be served")
        vocabulary = self.vocabulary(tokenizer)
        matcher = Matcher(self._compile(grammar, vocabulary), vocabulary, stop_ids, self._max_mask_s)
        if output and not matcher.state.consume_tokens(list(output)):
            raise Internal(f"a request's output is not its grammar's: {one_line(matcher.state.get_error())}")
        return matcher

    def vocabulary(self, tokenizer: Tokenizer) -> Vocabulary:
        """Return a tokenizer as llguidance sees it.

        The first time takes 0.25 s for 50,000 tokens and holds the interpreter meanwhile: call it before steps begin
        for a tokenizer that is known then.
        """
        with self._lock:
            found = next((known for known in self._vocabularies if known.source is tokenizer), None)
            if found is None:
                found = Vocabulary(tokenizer, max(self._vocab_size, tokenizer.get_vocab_size()), self._eos_ids)
            else:
                self._vocabularies.remove(found)
            self._vocabularies.append(found)
            for old in self._vocabularies[:-MAX_TOKENIZERS]:
                self._vocabularies.remove(old)
                self._compiled = OrderedDict((k, v) for k, v in self._compiled.items() if k[0] != id(old))
            return found

    def _compile(self, grammar: str, vocabulary: Vocabulary) -> LLMatcher:
        """Return a copy of a grammar's matcher that has consumed nothing. Raises BadRequest."""
        key = (id(vocabulary), hashlib.blake2b(grammar.encode(), digest_size=16).digest())
        with self._lock:
            known = self._compiled.get(key)
            if known is not None:
                self._compiled.move_to_end(key)
        if known is None:
            known = LLMatcher(vocabulary.tokens, grammar, log_level=0, limits=LIMITS)
            if known.is_error():
                raise BadRequest(f"the output's grammar cannot be compiled: {one_line(known.get_error())}")
            with self._lock:
                self.num_compiled += 1
                self._compiled[key] = known
                if len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
        return known.deep_copy()

    def fill(self, rows: Sequence[MatcherRow], timeout_s: float) -> list[np.ndarray | None]:
        """Return the tokens allowed next and after each draft token, of each row: bits of int32 [1 + draft tokens, W].

        W is the row's vocabulary size divided by 32, rounded up. Bits after a draft token that the grammar does not
        allow mean nothing. None: it is not known after `timeout_s`; the matcher `is_filling` until it is, and its next
        mask is that of the next token alone. A matcher that reached its limits has an error afterwards.
        """
        for vocab_size in {matcher.vocab_size for matcher, _ in rows}:
            mine = [row for row in rows if row[0].vocab_size == vocab_size and row[0].filling is None]
            ends = np.cumsum([1 + len(draft) for _, draft in mine]).tolist()
            whole = np.full((ends[-1] if ends else 0, -(-vocab_size // 32)), -1, np.int32)
            for (matcher, draft), end in zip(mine, ends, strict=True):
                own = whole[end - 1 - len(draft) : end]
                matcher.filling = Filling(matcher.state, draft, matcher.cost, own)
            self._filler.start(_fillings(mine), whole)
        self._filler.wait(_fillings(rows), timeout_s)
        return [matcher.take_mask() for matcher, _ in rows]


def _fillings(rows: Iterable[MatcherRow]) -> list[Filling]:
    return [matcher.filling for matcher, _ in rows if matcher.filling is not None]


def one_line(text: str) -> str:
    """Return an error text of llguidance without its line breaks."""
    return " ".join(text.split())

"""Structured output: llguidance's matchers, compiled in threads, and the tokens that they allow next.

Each request with a grammar has a matcher of its own, which has consumed the request's output so far. Preemption leaves
it alone, as it does the tokens; on another worker a new matcher consumes the output again.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import (
    fill_next_token_bitmask,
    fill_next_token_bitmask_par,
    fill_next_token_bitmask_par_with_draft_tokens,
)
from tokenizers import Tokenizer

from protocol.wire.errors import BadRequest, Internal

NUM_COMPILERS = 2
NUM_FILLERS = max(1, min(8, (os.cpu_count() or 1) // 2))
MIN_PARALLEL = 4
"""Masks that are worth waking threads for: one takes some ten microseconds."""

MAX_COMPILED = 128
"""Compiled grammars that are kept, the most recently used."""

MAX_TOKENIZERS = 4
"""Tokenizers that are kept as llguidance sees them, the most recently used."""

LIMITS = LLParserLimits(step_lexer_fuel=100_000, step_max_items=20_000, max_lexer_states=50_000, verbose_errors=False)
"""Bounds one token of one request to some milliseconds, and the states of one request to tens of MB."""


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

    def __init__(self, state: LLMatcher, vocabulary: Vocabulary, stop_ids: Sequence[int]) -> None:
        """stop_ids: tokens that end the request. Special ones among them are allowed wherever the output may end."""
        self.state = state
        self.vocab_size = vocabulary.tokens.vocab_size
        self.ends = tuple(vocabulary.ends)
        self._more_ends = tuple(id_ for id_ in stop_ids if vocabulary.is_special(id_) and id_ not in vocabulary.ends)

    @property
    def is_complete(self) -> bool:
        """Whether the output is complete, so that nothing can follow."""
        return self.state.is_stopped() and not self.state.is_error()

    @property
    def error(self) -> BadRequest | None:
        """Why the output cannot go on, None if it can."""
        if not self.state.is_error():
            return None
        return BadRequest(f"the output's grammar cannot be followed: {one_line(self.state.get_error())}")

    def consume(self, token: int) -> None:
        """Take the next token of the output. Sets `error` if the grammar does not allow it."""
        self.state.consume_token(token)

    def possible(self, draft: list[int]) -> list[int]:
        """Return the draft tokens up to the first that the grammar does not allow."""
        return draft[: self.state.validate_tokens(draft)]

    def settle_ends(self, mask: np.ndarray, banned: Sequence[int]) -> None:
        """Allow in a mask, int32 [W], what else may end the output, and forbid `banned`, which may not end it yet.

        Where the grammar allows nothing but an end, that stays allowed: it decides what is complete, not `min_tokens`.
        """
        if self._more_ends and any(_has(mask, id_) for id_ in self.ends):
            for id_ in self._more_ends:
                mask.view(np.uint32)[id_ >> 5] |= np.uint32(1 << (id_ & 31))
        if banned:
            rest = mask.copy()
            for id_ in banned:
                rest.view(np.uint32)[id_ >> 5] &= ~np.uint32(1 << (id_ & 31))
            if rest.any():
                mask[:] = rest


def _has(mask: np.ndarray, id_: int) -> bool:
    return bool(mask.view(np.uint32)[id_ >> 5] >> np.uint32(id_ & 31) & np.uint32(1))


MatcherRow = tuple[Matcher, list[int]]
"""A matcher, and the draft tokens that follow what it has seen."""


class Grammars:
    """Compiles grammars in threads of its own, and fills the masks of a step on several cores."""

    def __init__(self, vocab_size: int, eos_ids: frozenset[int]) -> None:
        """vocab_size: entries of the model's logits. eos_ids: its end-of-text tokens."""
        self.on_ready: Callable[[], object] = lambda: None  # called from a thread when a matcher has been made
        self.num_compiled = 0  # grammars compiled since the start
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._lock = threading.Lock()
        # _lock guards these.
        self._vocabularies: list[Vocabulary] = []  # last used last
        self._compiled: OrderedDict[tuple[int, bytes], LLMatcher] = OrderedDict()  # each has consumed nothing
        self._compilers = ThreadPoolExecutor(NUM_COMPILERS, thread_name_prefix="grammar")
        self._executor: LLExecutor | None = None

    def close(self) -> None:
        """Compile nothing more; does not wait for what is being compiled."""
        self._compilers.shutdown(wait=False, cancel_futures=True)

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
        matcher = Matcher(self._compile(grammar, vocabulary), vocabulary, stop_ids)
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

    def fill(self, rows: Sequence[MatcherRow]) -> list[np.ndarray]:
        """Return the tokens allowed next and after each draft token, of each row: bits of int32 [1 + draft tokens, W].

        W is the row's vocabulary size divided by 32, rounded up. Bits after a draft token that the grammar does not
        allow mean nothing. A matcher that reached its limits has an error afterwards.
        """
        masks: list[np.ndarray] = [np.empty(0)] * len(rows)
        for vocab_size in {matcher.vocab_size for matcher, _ in rows}:
            mine = [i for i, (matcher, _) in enumerate(rows) if matcher.vocab_size == vocab_size]
            ends = np.cumsum([1 + len(rows[i][1]) for i in mine]).tolist()
            whole = np.full((ends[-1], -(-vocab_size // 32)), -1, np.int32)
            plain: list[tuple[LLMatcher, int]] = []
            speculating: list[tuple[LLMatcher, int, list[int]]] = []
            for i, end in zip(mine, ends, strict=True):
                matcher, draft = rows[i]
                first = end - 1 - len(draft)
                masks[i] = whole[first:end]
                if draft:
                    speculating.append((matcher.state, first, draft))
                else:
                    plain.append((matcher.state, first))
            if len(plain) < MIN_PARALLEL or NUM_FILLERS == 1:
                for state, first in plain:
                    fill_next_token_bitmask(state, whole, first)
            elif plain:
                fill_next_token_bitmask_par(self._threads(), plain, whole)
            if speculating:
                fill_next_token_bitmask_par_with_draft_tokens(self._threads(), speculating, whole)
        return masks

    def _threads(self) -> LLExecutor:
        if self._executor is None:
            self._executor = LLExecutor(NUM_FILLERS)
        return self._executor


def one_line(text: str) -> str:
    """Return an error text of llguidance without its line breaks."""
    return " ".join(text.split())

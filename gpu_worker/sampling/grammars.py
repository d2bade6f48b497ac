"""Structured output: llguidance's matchers, compiled in threads, and their masks of the tokens allowed next.

Each request with a grammar has its own matcher, which has consumed the request's output so far. Preemption does not
affect it; on another worker a new matcher consumes the output again.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from weakref import ref

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from gpu_worker.sampling.masks import Filling, MaskCost, MaskFiller
from protocol.wire.errors import BadRequest, Internal, LorafleetError, panics_as
from protocol.wire.grammar_limits import GRAMMAR_LIMITS
from protocol.wire.tokens import TokenTable

logger = logging.getLogger(__name__)

NUM_COMPILERS = 2

MAX_COMPILED = 128
"""Maximum number of compiled grammars in the cache, an LRU."""

MAX_VOCABULARIES = 16
"""Maximum number of cached llguidance tokenizers of adapters that add tokens; some 20 MB each."""

MAX_BUILD_SHARE = 0.1
"""Maximum share of time spent on building vocabularies, during which steps stand still."""

BASE_SLICES = LLTokenizer.general_slices()
OWN_SLICES = BASE_SLICES[-1:]
"""Sets of tokens indexed separately for an adapter's vocabulary: those that occur in JSON strings.

They make masks inside a string six times as fast, and take 15 ms to build; the three others take 60 ms and gain little.
"""

LIMITS = LLParserLimits(**GRAMMAR_LIMITS, verbose_errors=False)


class Vocabulary:
    """A tokenizer in llguidance's form. Building it from all tokens holds the GIL: 80 ms for 57,000 tokens."""

    def __init__(
        self, tokens: TokenTable, vocab_size: int, eos_ids: frozenset[int], slices: list[str],
        tokenizer: str | None = None,
    ) -> None:  # fmt: skip
        """vocab_size: number of logits; the tokenizer may have fewer tokens.

        slices: expressions of token sets that are indexed separately, as in `LLTokenizer`. tokenizer: the
        tokenizer.json with which llguidance may tokenize text that a grammar forces; without it the longest tokens are
        taken. Raises BadRequest if the tokenizer is unusable for grammars.
        """
        self.key = tokens.key
        self._special = tokens.special
        vocab_size = max(vocab_size, len(tokens.pieces))
        ends = sorted(id_ for id_ in eos_ids if id_ < vocab_size)
        source = tokenizer if tokenizer is not None else _Tokens(tokens, vocab_size, ends, self)
        try:
            with panics_as(BadRequest):
                self.tokens = LLTokenizer(source, n_vocab=vocab_size, eos_token=ends or None, slices=slices)
        except ValueError as error:
            raise BadRequest(
                f"structured output cannot be served with this tokenizer: {one_line(str(error))}"
            ) from error
        self.ends = tuple(self.tokens.eos_tokens)
        self.not_first = _not_first(tokens, self.tokens.vocab_size)

    def is_special(self, id_: int) -> bool:
        """Return whether a token has no text, like end-of-text."""
        return id_ in self._special or self.tokens.is_special_token(id_)


class _Tokens(TokenizerWrapper):
    """The interface through which llguidance uses a tokenizer that it cannot read itself."""

    def __init__(self, tokens: TokenTable, vocab_size: int, ends: Sequence[int], vocabulary: Vocabulary) -> None:
        self.is_tokenizer_wrapper = True
        self.bos_token_id = None
        self.tokens = [*tokens.pieces, *[b""] * (vocab_size - len(tokens.pieces))]
        self.special_token_ids = sorted(tokens.special)
        end: Any = ends[0] if ends else None  # llguidance also accepts None, and adds a token of its own
        self.eos_token_id = end
        self._vocabulary = ref(vocabulary)  # weak, because the vocabulary holds this object through llguidance

    def __call__(self, text: str) -> list[int]:
        """Return the tokens of a text by greedy longest match."""
        vocabulary = self._vocabulary()
        assert vocabulary is not None, "matchers hold it"
        return vocabulary.tokens.greedy_tokenize(text)


def _not_first(tokens: TokenTable, vocab_size: int) -> np.ndarray | None:
    """Return the tokens whose text differs at the beginning of an output, as bits of int32 [W], None if none do."""
    if tokens.first is None:
        return None
    both = enumerate(zip(tokens.first, tokens.pieces, strict=True))
    return words_of((id_ for id_, (first, piece) in both if first != piece and id_ not in tokens.special), vocab_size)


class GrammarMatcher:
    """One request's matcher, and the tokens besides the grammar's own end that may end its output."""

    def __init__(self, state: LLMatcher, vocabulary: Vocabulary, stop_ids: Sequence[int], max_mask_s: float) -> None:
        """stop_ids: tokens that end the request; special ones are allowed wherever the output may end.

        max_mask_s: see `MaskCost`.
        """
        self.state = state
        self.vocab_size = vocabulary.tokens.vocab_size
        self.ends = vocabulary.ends
        self._vocabulary = vocabulary
        self._is_fresh = True  # nothing has been consumed
        more = (id_ for id_ in stop_ids if id_ not in vocabulary.ends and vocabulary.is_special(id_))
        self._more_ends = words_of(more, self.vocab_size)
        self._banned: tuple[np.ndarray, np.ndarray] | None = None  # ids, and the same as bits
        self.cost = MaskCost(max_mask_s)
        self.filling: Filling | None = None  # its next mask, from the request for it until it is taken
        self._failure: BaseException | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the output is complete, so that nothing can follow."""
        return self.state.is_stopped() and not self.state.is_error()

    @property
    def is_filling(self) -> bool:
        """Whether the next mask is being computed, during which `state` must not be used."""
        return self.filling is not None and not self.filling.is_done

    def take_mask(self) -> np.ndarray | None:
        """Return the next mask, int32 [n, W], once it is filled; None before."""
        filling = self.filling
        if filling is None or not filling.is_done:
            return None
        self.filling, self._failure = None, filling.failure
        self._begin(filling.mask[0])
        return filling.mask

    def _begin(self, mask: np.ndarray) -> None:
        """Forbid, in the first mask (int32 [W]), tokens whose text differs at the beginning of an output.

        Some tokenizers drop the leading space of the first token.
        """
        if self._is_fresh and self._vocabulary.not_first is not None and self._failure is None:
            mask &= ~self._vocabulary.not_first
            if not mask.any():
                self._failure = BadRequest("the output's grammar cannot be satisfied: no token can begin it")

    def check(self) -> None:
        """Raise the error that stops the output, if any."""
        if self._failure is not None:
            raise self._failure
        if self.state.is_error():
            raise BadRequest(f"the output's grammar cannot be satisfied: {one_line(self.state.get_error())}")
        if self.cost.error is not None:
            raise self.cost.error

    def consume(self, token: int) -> None:
        """Consume the next output token. `check` raises an error afterwards if the grammar does not allow it."""
        self._is_fresh = False
        self.state.consume_token(token)

    def resume(self, output: Sequence[int]) -> bool:
        """Consume an output from its beginning; return whether the grammar allows it."""
        self._is_fresh = False
        return self.state.consume_tokens(list(output))

    def possible(self, draft: list[int]) -> list[int]:
        """Return the draft tokens up to the first that the grammar does not allow."""
        try:
            return draft[: self.state.validate_tokens(draft)]
        except BaseException as error:  # noqa: BLE001  a request's edge: `check` reports it
            self._failure = error
            return []

    def settle_ends(self, mask: np.ndarray, banned: np.ndarray) -> None:
        """Allow the request's stop tokens, in a mask (int32 [W]), wherever the output may end, and forbid `banned`.

        If the grammar allows nothing but an end, that stays allowed: completeness takes precedence over `min_tokens`.
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


MatcherRow = tuple[GrammarMatcher, list[int]]
"""A matcher, and the draft tokens that follow its consumed tokens."""


class Grammars:
    """Compiles grammars and fills the masks of steps, in its own threads."""

    def __init__(
        self, vocab_size: int, eos_ids: frozenset[int], max_mask_s: float, tokens: TokenTable | None = None,
        tokenizer: str | None = None,
    ) -> None:  # fmt: skip
        """vocab_size: number of logits. eos_ids: the model's end-of-text tokens. max_mask_s: see `MaskCost`.

        tokens, tokenizer: the base model's token table and tokenizer.json, None without a tokenizer.
        """
        self.on_ready: Callable[[], object] = lambda: None  # called from a thread when a matcher or mask is ready
        self.num_compiled = 0  # grammars compiled since the start
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._max_mask_s = max_mask_s
        self._tokens, self._tokenizer = tokens, tokenizer
        self._base: Vocabulary | BadRequest | None = None  # or the reason why there is none
        self._lock = threading.Lock()
        # Guarded by _lock:
        self._vocabularies: OrderedDict[str, Vocabulary] = OrderedDict()  # by token table, least recently used first
        self._compiled: OrderedDict[tuple[str, bytes], LLMatcher] = OrderedDict()  # each has consumed nothing
        self._compilers = ThreadPoolExecutor(NUM_COMPILERS, thread_name_prefix="grammar")
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="vocabulary")
        self._closed = threading.Event()
        self._may_build_s = 0.0  # time.monotonic at which the builder may build the next vocabulary
        self._filler = MaskFiller(lambda: self.on_ready())

    def close(self) -> None:
        """Stop compiling and filling; does not wait for running work."""
        self._closed.set()
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self._builder.shutdown(wait=False, cancel_futures=True)
        self._filler.close()

    def prepare(self) -> None:
        """Build the base model's vocabulary. Takes half a second: call it before there are requests.

        If that fails, each request with a grammar gets the error.
        """
        if self._tokens is None or self._base is not None:
            return
        try:
            self._base = Vocabulary(self._tokens, self._vocab_size, self._eos_ids, BASE_SLICES, self._tokenizer)
        except BadRequest as error:
            logger.info("llguidance cannot read the base's tokenizer, so it gets a list of tokens: %s", error.message)
            try:
                self._base = Vocabulary(self._tokens, self._vocab_size, self._eos_ids, BASE_SLICES)
            except BadRequest as refusal:
                logger.warning("%s", refusal.message)
                self._base = refusal
        self._tokenizer = None  # ten megabytes, not needed any more

    def make(
        self, grammar: str, tokens: TokenTable | None, output: Sequence[int], stop_ids: Sequence[int]
    ) -> Future[GrammarMatcher]:
        """Start making the matcher of a request that has emitted `output` so far.

        The future raises BadRequest or Internal. grammar: as in `messages.Body`. stop_ids: tokens that end the request.
        """
        ready = tokens is None or tokens is self._tokens or tokens.key in self._vocabularies
        future = (self._compilers if ready else self._builder).submit(self._make, grammar, tokens, output, stop_ids)
        future.add_done_callback(lambda _: self.on_ready())
        return future

    def _make(
        self, grammar: str, tokens: TokenTable | None, output: Sequence[int], stop_ids: Sequence[int]
    ) -> GrammarMatcher:
        if tokens is None:
            raise BadRequest("this model has no tokenizer.json: structured output cannot be served")
        try:
            with panics_as(BadRequest):
                vocabulary = self.vocabulary(tokens)
                matcher = GrammarMatcher(self._compile(grammar, vocabulary), vocabulary, stop_ids, self._max_mask_s)
                if output and not matcher.resume(output):
                    raise Internal(
                        f"the output does not match the request's grammar: {one_line(matcher.state.get_error())}"
                    )
                return matcher
        except LorafleetError:
            raise
        except Exception as error:  # a thread's top level: any error is the request's
            logger.exception("a grammar cannot be compiled")
            raise BadRequest(f"the output's grammar cannot be compiled: {one_line(str(error))}") from error

    def vocabulary(self, tokens: TokenTable) -> Vocabulary:
        """Return a tokenizer in llguidance's form, building it at first use. Raises BadRequest.

        Builds are rationed, since steps wait for them.
        """
        if tokens is self._tokens:
            self.prepare()
            if isinstance(self._base, BadRequest):
                raise BadRequest(self._base.message)
            assert self._base is not None
            return self._base
        with self._lock:
            found = self._vocabularies.get(tokens.key)
            if found is not None:
                self._vocabularies.move_to_end(tokens.key)
                return found
        self._closed.wait(max(0.0, self._may_build_s - time.monotonic()))
        started = time.monotonic()
        found = Vocabulary(tokens, self._vocab_size, self._eos_ids, OWN_SLICES)
        self._may_build_s = time.monotonic() + (time.monotonic() - started) / MAX_BUILD_SHARE
        with self._lock:
            self._vocabularies[tokens.key] = found
            while len(self._vocabularies) > MAX_VOCABULARIES:
                old, _ = self._vocabularies.popitem(last=False)
                self._compiled = OrderedDict((k, v) for k, v in self._compiled.items() if k[0] != old)
        return found

    def _compile(self, grammar: str, vocabulary: Vocabulary) -> LLMatcher:
        """Return a fresh copy of a grammar's matcher. Raises BadRequest."""
        key = (vocabulary.key, hashlib.blake2b(grammar.encode(), digest_size=16).digest())
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
        """Return each row's masks for its next token and after each draft token: bits of int32 [1 + draft tokens, W].

        W is the row's vocabulary size divided by 32, rounded up. Masks after a draft token that the grammar does not
        allow are undefined. None: not ready after `timeout_s` seconds; the matcher `is_filling` until its mask is
        ready, and the mask is then for the next token only. A matcher that reached its limits has an error afterwards.
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
    """Return an llguidance error text without line breaks."""
    return " ".join(text.split())

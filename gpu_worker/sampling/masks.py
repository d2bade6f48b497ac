"""Fills the masks of a step: the tokens that the grammars of its sequences allow.

Most masks take some ten microseconds, a hostile grammar's 20 ms, and the cost shows only afterwards. So no mask is
computed in the engine's thread, which waits for a limited time; a sequence whose mask is late joins a later step.
Matchers proven to be quick are filled together. New ones, and those that were ever slow, are filled one at a time, so
that the cost of each is known. Each kind has its own threads, so that none delays another.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import (
    fill_next_token_bitmask,
    fill_next_token_bitmask_par,
    fill_next_token_bitmask_par_with_draft_tokens,
)

from gpu_worker.adapters.priority import lower_priority
from protocol.wire.errors import BadRequest

NUM_FILLERS = max(1, min(8, (os.cpu_count() or 1) // 2))

QUICK_S = 2e-3
"""Maximum CPU seconds of a quick mask, including that of its token."""

NUM_PROOFS = 32
"""Quick masks after which a matcher that was never slow is proven."""


class MaskCost:
    """The cost of one request's masks so far, which determines how the next is filled."""

    def __init__(self, max_s: float) -> None:
        """max_s: maximum CPU seconds of all the request's measured masks together; beyond, the request fails."""
        self._max_s = max_s
        self._num_quick = 0
        self.spent_s = 0.0
        self.is_slow = False  # permanent after one slow mask

    @property
    def is_proven(self) -> bool:
        """Whether its masks may be filled together with others."""
        return self._num_quick >= NUM_PROOFS and not self.is_slow

    @property
    def error(self) -> BadRequest | None:
        """The error that stops the request, None if there is none."""
        if self.spent_s <= self._max_s:
            return None
        return BadRequest(
            "the output's grammar is too ambiguous: computing its token masks took "
            f"{self.spent_s:.1f} s, the limit is {self._max_s:g} s"
        )

    def note(self, seconds: float) -> None:
        """Add the cost of a mask that was filled by itself."""
        self.spent_s += seconds
        self.is_slow = self.is_slow or seconds > QUICK_S
        self._num_quick += 1

    def doubt(self) -> None:
        """Require the next masks to be filled singly: one of the masks filled together was slow."""
        self._num_quick = 0


class Filling:
    """A mask in progress: for one sequence's next token, and for the tokens after its draft tokens."""

    def __init__(self, state: LLMatcher, draft: list[int], cost: MaskCost, mask: np.ndarray) -> None:
        """mask: int32 [1 + draft tokens, W], all ones."""
        self.state = state
        self.draft = draft
        self.cost = cost
        self.mask = mask
        self.job: Future[None] | None = None
        self.is_done = False
        self.failure: BaseException | None = None  # the error that prevented filling


class MaskFiller:
    """Threads that fill masks. `start` and `wait` are for the engine's thread."""

    def __init__(self, on_filled: Callable[[], object]) -> None:
        """on_filled: called from a thread when masks are filled."""
        self._on_filled = on_filled
        self._proven = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._new = ThreadPoolExecutor(1, thread_name_prefix="new-masks")
        self._slow = ThreadPoolExecutor(NUM_FILLERS, thread_name_prefix="slow-masks", initializer=lower_priority)
        self._executor: LLExecutor | None = None

    def close(self) -> None:
        """Stop filling; does not wait for running work."""
        for pool in (self._proven, self._new, self._slow):
            pool.shutdown(wait=False, cancel_futures=True)

    def start(self, fillings: Sequence[Filling], whole: np.ndarray) -> None:
        """Start filling masks, which are consecutive rows of `whole`, int32 [n, W]."""
        proven: list[tuple[Filling, int]] = []
        new: list[Filling] = []
        first = 0
        for filling in fillings:
            if filling.cost.is_proven:
                proven.append((filling, first))
            elif filling.cost.is_slow:
                self._submit(self._slow, partial(self._fill_each, [filling]), [filling])
            else:
                new.append(filling)
            first += len(filling.mask)
        if proven:
            self._submit(self._proven, partial(self._fill_all, proven, whole), [filling for filling, _ in proven])
        if new:
            self._submit(self._new, partial(self._fill_each, new), new)

    def wait(self, fillings: Iterable[Filling], timeout_s: float) -> None:
        """Wait until all of these are filled, for at most `timeout_s` seconds."""
        wait({filling.job for filling in fillings if filling.job is not None and not filling.is_done}, timeout_s)
        for filling in fillings:
            if not filling.is_done:
                filling.cost.doubt()

    def _submit(self, pool: ThreadPoolExecutor, fill: Callable[[], None], fillings: list[Filling]) -> None:
        job = pool.submit(fill)
        for filling in fillings:
            filling.job = job
        job.add_done_callback(lambda _: self._on_filled())

    def _fill_each(self, fillings: list[Filling]) -> None:
        """Fill masks one after another, and record the cost of each."""
        for filling in fillings:
            started_s = time.thread_time()
            try:
                if filling.draft:
                    row = (filling.state, 0, filling.draft)
                    fill_next_token_bitmask_par_with_draft_tokens(self._threads(), [row], filling.mask)
                else:
                    fill_next_token_bitmask(filling.state, filling.mask, 0)
            except BaseException as error:  # noqa: BLE001  a request's edge: it fails alone
                filling.failure = error
            filling.cost.note(time.thread_time() - started_s)
            filling.is_done = True

    def _fill_all(self, proven: list[tuple[Filling, int]], whole: np.ndarray) -> None:
        """Fill masks together, on several cores. On an error, each is filled again by itself."""
        plain = [(filling.state, first) for filling, first in proven if not filling.draft]
        drafting = [(filling.state, first, filling.draft) for filling, first in proven if filling.draft]
        try:
            if plain:
                fill_next_token_bitmask_par(self._threads(), plain, whole)
            if drafting:
                fill_next_token_bitmask_par_with_draft_tokens(self._threads(), drafting, whole)
        except BaseException:  # noqa: BLE001  unknown which one caused it
            self._fill_each([filling for filling, _ in proven])
        for filling, _ in proven:
            filling.is_done = True

    def _threads(self) -> LLExecutor:
        if self._executor is None:
            self._executor = LLExecutor(NUM_FILLERS)
        return self._executor

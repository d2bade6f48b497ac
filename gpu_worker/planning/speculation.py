"""Speculation by prompt lookup: the draft is what followed the same tokens earlier in the sequence. Pure.

Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding): a step computes the draft
tokens together with the token before them, and keeps them as long as they equal the chosen tokens.
"""

from __future__ import annotations

import numpy as np

GRAM_SIZES = (3, 2)
"""Lengths of the n-grams of newest tokens that are looked up; the longer match is preferred."""

FIRST_DRAFT_TOKENS = 4
"""Draft tokens of a sequence's first proposal."""

MAX_PAUSE = 32
"""Maximum consecutive proposals skipped after wrong draft tokens."""


class Drafter:
    """Draft tokens for one sequence: more after right ones, fewer or a pause after wrong ones."""

    def __init__(self, max_tokens: int) -> None:
        """max_tokens: maximum draft tokens of one proposal."""
        self._max = max_tokens
        self._length = min(FIRST_DRAFT_TOKENS, max_tokens)  # length of the next draft
        self._pause = 0  # length of the last pause
        self._rest = 0  # proposals still to be skipped
        self._continuations: dict[tuple[int, ...], int] = {}  # n-gram -> the position after its last occurrence
        self._num_indexed = 0  # n-grams that end before this position are indexed

    def propose(self, tokens: np.ndarray, limit: int) -> list[int]:
        """Propose up to `limit` tokens to follow `tokens` (int32 [n]), which extend those of the last call."""
        if self._rest:
            self._rest -= 1
            return []
        num = len(tokens)
        start = self._index(tokens[max(0, self._num_indexed - GRAM_SIZES[0] + 1) :].tolist(), num)
        length = min(self._length, limit)
        if not start or length < 1:
            return []
        draft = tokens[start : start + length].tolist()
        while len(draft) < length:  # the continuation overlaps the newest tokens: the text repeats
            draft.append(draft[len(draft) - (num - start)])
        return draft

    def learn(self, num_drafted: int, num_right: int) -> None:
        """Record that the first `num_right` draft tokens of a proposal were right."""
        if num_right == num_drafted:
            self._length = min(2 * self._length, self._max)
        else:
            self._length = max(1, min(self._length, num_right + 1))
        if num_right:
            self._pause = 0
        else:
            self._pause = self._rest = min(2 * self._pause + 1, MAX_PAUSE)

    def _index(self, tail: list[int], num: int) -> int:
        """Index all n-grams but the newest; return the position after its previous occurrence, 0 if it is new.

        tail: the last of all `num` tokens, enough to cover the n-grams not indexed yet.
        """
        offset = num - len(tail)
        for end in range(self._num_indexed, num - 1):
            for size in GRAM_SIZES:
                first = end - size + 1
                if first >= 0:
                    self._continuations[tuple(tail[first - offset : end - offset + 1])] = end + 1
        self._num_indexed = max(self._num_indexed, num - 1)
        for size in GRAM_SIZES:
            start = self._continuations.get(tuple(tail[-size:]), 0) if num >= size else 0
            if start:
                return start
        return 0

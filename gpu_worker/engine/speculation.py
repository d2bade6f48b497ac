"""Guesses of a sequence's next tokens from its own text: what followed the last time it said the same. Pure.

Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding): a step computes the guesses
with the token they follow, and keeps them as far as they are what it would have chosen anyway.
"""

from __future__ import annotations

import numpy as np

GRAM_SIZES = (3, 2)
"""Newest tokens that must have occurred before, the longer the surer."""

FIRST_GUESSES = 4
MAX_PAUSE = 32


class Drafter:
    """Guesses for one sequence, as many as its guesses have lately been worth."""

    def __init__(self, max_tokens: int) -> None:
        self._max = max_tokens
        self._length = min(FIRST_GUESSES, max_tokens)
        self._pause = 0  # length of the last pause
        self._rest = 0  # calls still to be passed over
        self._continuations: dict[tuple[int, ...], int] = {}  # n-gram → the position after its last occurrence
        self._num_indexed = 0  # positions at which n-grams end that are in the index

    def propose(self, tokens: np.ndarray, limit: int) -> list[int]:
        """Guess up to `limit` tokens that follow `tokens`, int32 [n]: those of the last call, or more."""
        if self._rest:
            self._rest -= 1
            return []
        num = len(tokens)
        start = self._index(tokens[max(0, self._num_indexed - GRAM_SIZES[0] + 1) :].tolist(), num)
        length = min(self._length, limit)
        if not start or length < 1:
            return []
        guesses = tokens[start : start + length].tolist()
        while len(guesses) < length:  # the newest tokens overlap what followed: the text goes round in a circle
            guesses.append(guesses[len(guesses) - (num - start)])
        return guesses

    def learn(self, num_guessed: int, num_right: int) -> None:
        """Note how many of the guesses were right, from the first on."""
        if num_right == num_guessed:
            self._length = min(2 * self._length, self._max)
        else:
            self._length = max(1, min(self._length, num_right + 1))
        if num_right:
            self._pause = 0
        else:
            self._pause = self._rest = min(2 * self._pause + 1, MAX_PAUSE)

    def _index(self, tail: list[int], num: int) -> int:
        """Index all n-grams but the newest; return where the continuation of the newest one began, 0 if it is new.

        tail: the tokens that n-grams not yet indexed are made of, the last of all `num` tokens.
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

"""What a request wants changed in its logits, kept from token to token, so that each costs no more than the last. Pure.

Counting a text of 30,000 tokens anew takes longer than a step of a small model.
"""

from __future__ import annotations

import numpy as np

from protocol.wire.messages import Sampling

MANY = 64
"""New tokens that are counted faster by sorting them."""


class TokenCounts:
    """How often each token occurs in a growing text."""

    def __init__(self) -> None:
        self.total = 0  # tokens counted
        self._places: dict[int, int] = {}  # token -> its place in the arrays
        self._ids = np.empty(256, np.int64)
        self._counts = np.empty(256, np.int64)

    @property
    def ids(self) -> np.ndarray:
        """The distinct tokens: int64 [d], a view."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> np.ndarray:
        """How often each of `ids` occurs: int64 [d], a view."""
        return self._counts[: len(self._places)]

    def add(self, text: np.ndarray) -> None:
        """Count the tokens that follow, int32 [n]."""
        self.total += len(text)
        if len(text) > MANY:
            ids, counts = np.unique(text, return_counts=True)
            for token, count in zip(ids.tolist(), counts.tolist(), strict=True):
                self._count(token, count)
        else:
            for token in text.tolist():
                self._count(token, 1)

    def _count(self, token: int, num: int) -> None:
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = len(self._places)
            if place == len(self._ids):
                self._ids, self._counts = np.resize(self._ids, 2 * place), np.resize(self._counts, 2 * place)
            self._ids[place], self._counts[place] = token, 0
        self._counts[place] += num


class Adjustment:
    """One sequence's bias, and the tokens in its text where penalties need them."""

    def __init__(self, sampling: Sampling, prompt: np.ndarray) -> None:
        """prompt: int32 [P]."""
        bias = sampling.logit_bias
        self.bias_ids = np.fromiter(bias, np.int64, len(bias))
        self.bias = np.fromiter(bias.values(), np.float32, len(bias))
        self._prompt = prompt
        self._of_output: TokenCounts | None = None
        self._of_text: TokenCounts | None = None

    def output_counts(self, output: np.ndarray) -> TokenCounts:
        """Return the counts of the output, int32 [n], which begins with that of the last call."""
        if self._of_output is None:
            self._of_output = TokenCounts()
        self._of_output.add(output[self._of_output.total :])
        return self._of_output

    def text_counts(self, output: np.ndarray) -> TokenCounts:
        """Return the counts of prompt and output; see `output_counts`."""
        if self._of_text is None:
            self._of_text = TokenCounts()
            self._of_text.add(self._prompt)
        self._of_text.add(output[self._of_text.total - len(self._prompt) :])
        return self._of_text

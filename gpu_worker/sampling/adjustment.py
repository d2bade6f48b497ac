"""A request's changes to its logits, updated token by token at constant cost. Pure.

Recounting a text of 30,000 tokens would take longer than a step of a small model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from gpu_worker.sampling.grammars import words_of
from protocol.wire.messages import Sampling

MANY = 64
"""Number of new tokens from which counting by sorting is faster."""


class TokenCounts:
    """The number of occurrences of each token in a growing text."""

    def __init__(self) -> None:
        self.total = 0  # tokens counted
        self._places: dict[int, int] = {}  # token -> its index in the arrays
        self._ids = np.empty(256, np.int64)
        self._counts = np.empty(256, np.int64)

    @property
    def ids(self) -> np.ndarray:
        """The distinct tokens: int64 [d], a view."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> np.ndarray:
        """The number of occurrences of each of `ids`: int64 [d], a view."""
        return self._counts[: len(self._places)]

    def add(self, text: np.ndarray) -> None:
        """Count the tokens that follow. text: int32 [n]."""
        self.total += len(text)
        if len(text) > MANY:
            ids, counts = np.unique(text, return_counts=True)
            for token, count in zip(ids.tolist(), counts.tolist(), strict=True):
                self._count(token, count)
        else:
            for token in text.tolist():
                self._count(token, 1)

    def copy(self) -> TokenCounts:
        """Return an independent copy of the counts."""
        own = copy.copy(self)
        own._places, own._ids, own._counts = self._places.copy(), self._ids.copy(), self._counts.copy()
        return own

    def _count(self, token: int, num: int) -> None:
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = len(self._places)
            if place == len(self._ids):
                self._ids, self._counts = np.resize(self._ids, 2 * place), np.resize(self._counts, 2 * place)
            self._ids[place], self._counts[place] = token, 0
        self._counts[place] += num


class Adjustment:
    """One sequence's logit bias, allowed tokens, and token counts for penalties."""

    def __init__(self, sampling: Sampling, prompt: np.ndarray) -> None:
        """prompt: int32 [P]."""
        bias = sampling.logit_bias
        self.prompt = prompt
        self.bias_ids = np.fromiter(bias, np.int64, len(bias))
        self.bias = np.fromiter(bias.values(), np.float32, len(bias))
        self._sampling = sampling
        allowed = sampling.allowed_token_ids
        self._allowed = words_of(allowed, max(allowed) + 1) if allowed else None  # as bits of int32 [W]
        self._bad_ends: dict[int, dict[bytes, list[int]]] = {}  # length -> start of a bad word -> last tokens
        for word in sampling.bad_words:
            ends = self._bad_ends.setdefault(len(word) - 1, {})
            ends.setdefault(np.array(word[:-1], np.int32).tobytes(), []).append(word[-1])
        self._of_output: TokenCounts | None = None
        self._of_text: TokenCounts | None = None

    @classmethod
    def of(cls, sampling: Sampling, prompt: np.ndarray) -> Adjustment | None:
        """Return a sequence's adjustment; None for a request that changes no logit and allows any token."""
        s = sampling
        penalises = s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0
        changes = penalises or s.logit_bias or s.watermark or s.allowed_token_ids or s.bad_words
        return cls(sampling, prompt) if changes else None

    def copy(self) -> Adjustment:
        """Return an independent copy, for a text that continues with draft tokens."""
        own = copy.copy(self)
        own._of_output = None if self._of_output is None else self._of_output.copy()
        own._of_text = None if self._of_text is None else self._of_text.copy()
        return own

    def changes(self, num_output: int) -> bool:
        """Return whether any logit is changed after `num_output` output tokens."""
        s = self._sampling
        counts = (s.presence_penalty or s.frequency_penalty) and (num_output or s.penalties == "lorax")
        return bool(counts or s.logit_bias or s.watermark or s.repetition_penalty != 1.0)

    def restricted(
        self, output: np.ndarray, banned: Sequence[int] | np.ndarray, mask: np.ndarray | None
    ) -> tuple[Sequence[int] | np.ndarray, np.ndarray | None]:
        """Return the ids that may not follow the output (int32 [n]), and the mask of those that may.

        banned, mask: the same without the request's own restrictions, as in `SampleRow`; if there is a mask, it
        includes all restrictions. The returned mask may allow no token.
        """
        forbidden = self._bad_ends_after(output)
        if mask is None:
            forbidden = [*banned, *forbidden] if forbidden else banned
            if self._allowed is None:
                return forbidden, None
            mask = self._allowed
        elif self._allowed is not None:
            num = min(len(mask), len(self._allowed))
            mask = mask[:num] & self._allowed[:num]
        return (), (mask & ~words_of(forbidden, 32 * len(mask)) if len(forbidden) else mask)

    def _bad_ends_after(self, output: np.ndarray) -> list[int]:
        """Return the tokens that would complete a bad word after the output (int32 [n])."""
        found: list[int] = []
        for num, ends in self._bad_ends.items():
            if num <= len(output):
                found += ends.get(output[len(output) - num :].tobytes(), ())
        return found

    def output_counts(self, output: np.ndarray) -> TokenCounts:
        """Return the counts of the output (int32 [n]), which must extend the output of the last call."""
        if self._of_output is None:
            self._of_output = TokenCounts()
        self._of_output.add(output[self._of_output.total :])
        return self._of_output

    def repeated(self, output: np.ndarray) -> np.ndarray:
        """Return the tokens to which the repetition penalty applies, perhaps with duplicates; see `output_counts`."""
        window = self._sampling.repetition_window
        if not window or window >= len(self.prompt) + len(output):
            return self.text_counts(output).ids
        recent = output[-window:]
        if len(recent) < window:
            recent = np.concatenate([self.prompt[len(recent) - window :], recent])
        return recent

    def text_counts(self, output: np.ndarray) -> TokenCounts:
        """Return the counts of prompt and output; see `output_counts`."""
        if self._of_text is None:
            self._of_text = TokenCounts()
            self._of_text.add(self.prompt)
        self._of_text.add(output[self._of_text.total - len(self.prompt) :])
        return self._of_text

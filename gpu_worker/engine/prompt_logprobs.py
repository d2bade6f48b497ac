"""Logprobs of a prompt's own tokens: what the model thought of each, given those before it.

They come chunk by chunk as the prompt is computed, all of it: no block of it may come from the prefix cache.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from gpu_worker.engine.sampling import pack_logprobs
from protocol.wire.messages import logprob_record_bytes

if TYPE_CHECKING:
    from gpu_worker.engine.request import Sequence


class PromptLogprobs:
    """The records of one prompt, as `messages.logprob_record_bytes` has them; the first token's is NaN and zeros."""

    def __init__(self, prompt: np.ndarray, num_top: int) -> None:
        self._prompt = prompt
        self._num_top = num_top
        self._size = logprob_record_bytes(num_top)
        self._records = bytearray(self._size * len(prompt))
        self._records[:4] = np.float32(np.nan).tobytes()

    def num_rows(self, start: int, end: int) -> int:
        """Return how many of the tokens [start, end), from the first on, have one of the prompt's after them."""
        return max(0, min(end, len(self._prompt) - 1) - start)

    def take(self, start: int, logits: Tensor) -> None:
        """Record the tokens after `start`, `start + 1`, …, by the logits [n, V] of these. May be repeated."""
        num = len(logits)
        ids = self._prompt[start + 1 : start + 1 + num].astype(np.int64)
        records = pack_logprobs(logits.float().log_softmax(-1), [self._num_top] * num, ids)
        first = (start + 1) * self._size
        self._records[first : first + num * self._size] = b"".join(records)

    @property
    def records(self) -> bytes:
        """One record per token of the prompt, once all of it has been computed."""
        return bytes(self._records)


class PromptPart(NamedTuple):
    """Rows of a step that tell of a prompt."""

    seq: Sequence
    start: int  # position of the first row's token
    num_rows: int


def take_parts(logits: Tensor, parts: Sequence_[PromptPart]) -> Tensor:
    """Record prompts by the last rows of a step's logits, which are theirs in order. Returns the rows before them."""
    first = row = len(logits) - sum(part.num_rows for part in parts)
    for part in parts:
        assert part.seq.prompt_logprobs is not None
        part.seq.prompt_logprobs.take(part.start, logits[row : row + part.num_rows])
        row += part.num_rows
    return logits[:first]

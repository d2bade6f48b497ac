"""Logprobs in the queue's format: of chosen tokens, and of a prompt's own tokens.

A record has `messages.logprob_record_bytes` bytes: the token's logprob (float32), then id (int32) and logprob (float32)
of each of the most likely, or the requested, tokens. In a prompt's record, the token's rank (int32) follows its
logprob: the number of tokens at least as likely, including itself. For a whole vocabulary, the logprobs of all tokens
are listed by id, unsorted and without ids: half the bytes, and no sort delays the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from gpu_worker.memory import Arriving, send
from protocol.wire.messages import WHOLE, prompt_record_bytes

_TOP = np.dtype([("id", "<i4"), ("logprob", "<f4")])


class LogprobRows:
    """The logprobs of rows, computed on the device and copied to the host asynchronously."""

    def __init__(
        self, logprobs: Tensor, ids: Tensor, num_top: Sequence[int], listed: Sequence[Sequence[int]] = (),
        *, whole: Sequence[int] = (), ranks: bool = False,
    ) -> None:  # fmt: skip
        """Launch the computation and copy of the requested parts of `logprobs`, fp32 [n, V]; does not block.

        ids: int64 [n] on the same device, the chosen tokens. num_top: for each row, how many of the most likely tokens
        to list. listed: for each row, further tokens to list, whatever their logprobs; empty: none. whole: for each
        row, the vocabulary size if the whole vocabulary is listed instead, else 0; empty: for no row. ranks: whether
        records include the ranks of the chosen tokens.
        """
        self._num_top, self._listed, self._has_ranks = num_top, listed or [()] * len(num_top), ranks
        self._whole = whole or [0] * len(num_top)
        chosen = logprobs.gather(-1, ids[:, None])
        values, tokens = logprobs.topk(max(num_top), dim=-1)
        wanted = [chosen[:, 0], values, tokens, *([(logprobs >= chosen).sum(-1)] if ranks else [])]
        for row, own, size in zip(logprobs, self._listed, self._whole, strict=True):
            if size:
                wanted.append(row[:size].contiguous())
            elif own:
                wanted.append(row[send(np.array(own, np.int64), logprobs.device)])
        self._arriving = Arriving(wanted)

    def pack(self) -> list[bytes]:
        """Return a record for each row. Waits for the device."""
        chosen, values, tokens, *others = self._arriving.arrays()
        top = np.empty(values.shape, _TOP)
        top["id"], top["logprob"] = tokens, values
        heads = [value.tobytes() for value in chosen.astype("<f4")]
        if self._has_ranks:
            found, *others = others
            heads = [head + rank.tobytes() for head, rank in zip(heads, found.astype("<i4"), strict=True)]
        own = iter(others)
        return [
            head + (next(own).astype("<f4").tobytes() if size else
                    row[:num].tobytes() + (_records(ids, next(own)) if ids else b""))
            for head, row, num, ids, size in zip(heads, top, self._num_top, self._listed, self._whole, strict=True)
        ]  # fmt: skip


def _records(ids: Sequence[int], logprobs: np.ndarray) -> bytes:
    """Return the part of a record that lists requested tokens with their logprobs, fp32 [n]."""
    top = np.empty(len(ids), _TOP)
    top["id"], top["logprob"] = ids, logprobs
    return top.tobytes()


class PromptLogprobs:
    """The logprobs of one prompt's own tokens, each given the tokens before it; recorded chunk by chunk.

    Every chunk must be computed here: blocks from the prefix cache have no logits.
    """

    def __init__(self, prompt: np.ndarray, num_top: int, vocabulary: int = 0) -> None:
        """prompt: int32 [P]. num_top: number of most likely tokens to list for each; `WHOLE`: all `vocabulary`."""
        self.num_before = 0  # virtual tokens before the prompt, which have no logprobs
        self._prompt = prompt
        self._num_top, self._whole = (0, vocabulary) if num_top == WHOLE else (num_top, 0)
        self._record_bytes = prompt_record_bytes(num_top, vocabulary)
        self._records = bytearray(self._record_bytes * len(prompt))
        self._records[:4] = np.float32(np.nan).tobytes()

    def rows(self, start: int, end: int) -> range:
        """Return the positions in [start, end) at which both this token and the next belong to the prompt."""
        return range(max(start, self.num_before), min(end, self.num_before + len(self._prompt) - 1))

    def record(self, position: int, logits: Tensor) -> None:
        """Record the tokens from `position` + 1 on. logits: [n, V], each of the position before. May be repeated."""
        start, num = position - self.num_before, len(logits)
        ids = self._prompt[start + 1 : start + 1 + num].astype(np.int64)
        logprobs = logits.float().log_softmax(-1)
        num_top, whole = [self._num_top] * num, [self._whole] * num
        records = LogprobRows(logprobs, send(ids, logits.device), num_top, whole=whole, ranks=True).pack()
        first = (start + 1) * self._record_bytes
        self._records[first : first + num * self._record_bytes] = b"".join(records)

    @property
    def records(self) -> bytes:
        """One record per prompt token, once all are computed; the first token's is NaN and zeros."""
        return bytes(self._records)


class PromptRows(NamedTuple):
    """Rows of a step's logits that belong to a prompt whose logprobs are recorded."""

    recorder: PromptLogprobs
    seq_index: int  # index of its sequence in the step
    start: int  # position of the first row's token
    num_rows: int


def record_prompts(logits: Tensor, prompts: Sequence[PromptRows]) -> None:
    """Record prompts from the last rows of a step's logits [n, V], in the order given."""
    row = len(logits) - sum(prompt.num_rows for prompt in prompts)
    for prompt in prompts:
        prompt.recorder.record(prompt.start, logits[row : row + prompt.num_rows])
        row += prompt.num_rows

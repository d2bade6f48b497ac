"""Logprobs as the queue carries them: of the tokens chosen, and of a prompt's own tokens.

A record is `messages.logprob_record_bytes` long: the token's logprob (float32), then id (int32) and logprob (float32)
of each of the most likely tokens, or of those that were asked for. In a prompt's, the token's rank (int32) follows its
logprob: how many tokens are as likely, itself among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from protocol.wire.messages import prompt_record_bytes

_TOP = np.dtype([("id", "<i4"), ("logprob", "<f4")])


def pack_logprobs(logprobs: Tensor, num_top: Sequence[int], ids: np.ndarray, *, ranks: bool = False) -> list[bytes]:
    """Return a record for each row of `logprobs`, fp32 [n, V]. Waits for the device.

    num_top: for each row, how many of the most likely tokens to list. ids: int64 [n], the tokens chosen. ranks: whether
    the records have those of the chosen tokens.
    """
    chosen = logprobs.gather(-1, torch.from_numpy(ids).to(logprobs.device)[:, None])
    values, tokens = logprobs.topk(max(num_top), dim=-1)
    top = np.empty((len(num_top), max(num_top)), _TOP)
    top["id"], top["logprob"] = tokens.cpu().numpy(), values.cpu().numpy()
    heads = [value.tobytes() for value in chosen[:, 0].cpu().numpy().astype("<f4")]
    if ranks:
        found = (logprobs >= chosen).sum(-1).cpu().numpy().astype("<i4")
        heads = [head + rank.tobytes() for head, rank in zip(heads, found, strict=True)]
    return [head + top[i, :num].tobytes() for i, (head, num) in enumerate(zip(heads, num_top, strict=True))]


def pack_listed(logprobs: Tensor, listed: Sequence[int]) -> bytes:
    """Return the end of a record that lists these tokens, whatever their logprobs [V] are. Waits for the device."""
    top = np.empty(len(listed), _TOP)
    top["id"] = listed
    top["logprob"] = logprobs[torch.tensor(listed, device=logprobs.device)].cpu().numpy()
    return top.tobytes()


class PromptLogprobs:
    """The logprobs of one prompt's own tokens, each given those before it: recorded chunk by chunk.

    Every chunk must be computed here: a block from the prefix cache has no logits.
    """

    def __init__(self, prompt: np.ndarray, num_top: int) -> None:
        """prompt: int32 [P]. num_top: how many of the most likely tokens to list for each."""
        self._prompt = prompt
        self._num_top = num_top
        self._record_bytes = prompt_record_bytes(num_top)
        self._records = bytearray(self._record_bytes * len(prompt))
        self._records[:4] = np.float32(np.nan).tobytes()

    def num_rows(self, start: int, end: int) -> int:
        """Return how many of the tokens at positions [start, end) are followed by another token of the prompt."""
        return max(0, min(end, len(self._prompt) - 1) - start)

    def record(self, start: int, logits: Tensor) -> None:
        """Record the tokens at positions start + 1, start + 2, … by logits [n, V] of those before. May be repeated."""
        num = len(logits)
        ids = self._prompt[start + 1 : start + 1 + num].astype(np.int64)
        records = pack_logprobs(logits.float().log_softmax(-1), [self._num_top] * num, ids, ranks=True)
        first = (start + 1) * self._record_bytes
        self._records[first : first + num * self._record_bytes] = b"".join(records)

    @property
    def records(self) -> bytes:
        """One record per token of the prompt, once all of it is computed; the first token's is NaN and zeros."""
        return bytes(self._records)


class PromptRows(NamedTuple):
    """Rows of a step's logits that belong to a prompt whose logprobs are recorded."""

    recorder: PromptLogprobs
    seq_index: int  # which of the step's sequences it is
    start: int  # position of the first row's token
    num_rows: int


def record_prompts(logits: Tensor, prompts: Sequence[PromptRows]) -> None:
    """Record prompts by the last rows of a step's logits [n, V], in the order given."""
    row = len(logits) - sum(prompt.num_rows for prompt in prompts)
    for prompt in prompts:
        prompt.recorder.record(prompt.start, logits[row : row + prompt.num_rows])
        row += prompt.num_rows

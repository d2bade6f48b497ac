"""Requests for an embedding or scores: accumulates a text's hidden states and computes its result.

Such a request runs like any prompt, in the same steps, and ends with its prompt: no token is sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_worker.layers.extras import Extras
from gpu_worker.planning.request import TokenOutput
from gpu_worker.planning.sequence import Sequence
from gpu_worker.tasks.model_tasks import ModelTasks
from protocol.wire.errors import Internal


@dataclass(frozen=True, slots=True)
class PooledRows:
    """The rows of a step that belong to a request for an embedding or scores."""

    seq: Sequence
    seq_index: int  # index of its sequence in the step
    first: int  # row of its first token in the step
    num: int
    start: int  # position of that token in its text
    is_complete: bool  # whether the text ends in this step

    @property
    def needs_logits(self) -> bool:
        """Whether the result is computed from the logits of its last token."""
        return self.is_complete and self.seq.is_scored_by_tokens


def gather(pooled: Many[PooledRows], hidden: Tensor) -> None:
    """Add the rows of a step's hidden states [T, D] to the pools of their texts."""
    for rows in pooled:
        pool = rows.seq.pool
        if pool is not None and (pool.needs_all or rows.is_complete):
            pool.add(hidden[rows.first : rows.first + rows.num], rows.start)


def head_of(seq: Sequence, tasks: ModelTasks, extras: Mapping[str, Extras]) -> Tensor | None:
    """Return the classification head [labels, D] that scores a text: its adapter's or the model's; None without one."""
    own = extras.get(seq.request.digest)
    return own.head if own is not None and own.head is not None else tasks.head


def outputs_of(
    pooled: Many[PooledRows], logits: Tensor, tasks: ModelTasks, extras: Mapping[str, Extras]
) -> list[TokenOutput]:
    """Return the final outputs of the texts that this step completes: float32 numbers, as int32 in `ids`.

    logits: [n, V], one row per text scored by tokens, in order. Waits for the device.
    """
    ended = [rows.seq for rows in pooled if rows.is_complete]
    if not ended:
        return []
    with torch.inference_mode():
        rows = iter(logits)
        values = [_values_of(seq, tasks, extras, rows) for seq in ended]
        flat = torch.cat(values).cpu().numpy()
    ends = np.cumsum([len(value) for value in values])[:-1]
    return [_output(seq, numbers) for seq, numbers in zip(ended, np.split(flat, ends), strict=True)]


def _values_of(seq: Sequence, tasks: ModelTasks, extras: Mapping[str, Extras], rows: Iterator[Tensor]) -> Tensor:
    """Return a text's result, fp32 [width] or [labels]."""
    if seq.is_scored_by_tokens:
        row = next(rows).float()
        assert tasks.score_tokens is not None
        yes, no = tasks.score_tokens
        return (row[yes] - row[no] if no >= 0 else row[yes])[None]
    assert seq.pool is not None
    vector = seq.pool.vector
    if seq.request.task == "embed":
        return F.normalize(vector, dim=0) if tasks.pooling is not None and tasks.pooling.unit_length else vector
    head = head_of(seq, tasks, extras)
    assert head is not None
    return F.linear(vector, head.float())


def _output(seq: Sequence, numbers: np.ndarray) -> TokenOutput:
    output = TokenOutput(seq.rid, seq.request.epoch, 0, num_cached_tokens=seq.num_cached or 0)
    if np.isfinite(numbers).all():
        output.ids, output.finish = numbers.astype("<f4").view("<i4").tolist(), "stop"
    else:
        output.finish, output.error = "error", Internal("the model's output is not finite")
    return output

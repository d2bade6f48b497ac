"""Which keys a model's queries see, learned from the masks it asks transformers for.

A model may leave its sliding window to the mask and not tell the attention function. In steps no mask is made at all;
in a trial run one is, and the function that defines it is asked where it begins to hide keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface

from gpu_worker.model.attention import ATTENTION, AttentionCall

FAR = 1 << 24
"""Positions that no text reaches."""


@dataclass(frozen=True, slots=True)
class MaskShape:
    """What a query sees among the keys up to its own: all (both 0), the last `window`, or those of its `chunk`."""

    window: int = 0
    chunk: int = 0


AS_TOLD = MaskShape(window=-1)
"""Nothing but causal for the trial's tokens and not defined for others: the attention function knows the window."""


class RecordedMasks:
    """The masks of one trial run, told apart by their memory."""

    def __init__(self) -> None:
        self._shapes: dict[int, MaskShape | None] = {}
        self._kept: list[Tensor] = []

    def add(self, mask: Tensor, shape: MaskShape | None) -> None:
        self._kept.append(mask)
        self._shapes[mask.untyped_storage().data_ptr()] = shape

    def shape_of(self, call: AttentionCall) -> MaskShape | None:
        """Return what a call's queries see, None if it is nothing that can be served."""
        told = MaskShape(window=call.window)
        shape = told if call.mask is None else self._shapes.get(call.mask.untyped_storage().data_ptr())
        return told if shape == AS_TOLD else shape


@contextmanager
def record_masks() -> Iterator[RecordedMasks]:
    """Let transformers make masks for our attention, and note what they hide."""
    masks = RecordedMasks()

    def make(q_length: int, kv_length: int, mask_function: Any, device: Any, **_: Any) -> Tensor:
        mask = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=device).tril()
        masks.add(mask, read_shape(mask_function, q_length, device))
        return mask

    AttentionMaskInterface.register(ATTENTION, make)
    try:
        yield masks
    finally:
        del AttentionMaskInterface._global_mapping[ATTENTION]


def read_shape(mask_function: Callable[..., Tensor], num_tokens: int, device: Any) -> MaskShape | None:
    """Return the shape of a mask given as a function of (batch, head, query, key); None if it has another one."""
    zero = torch.zeros((), dtype=torch.long, device=device)

    def sees(query: int, key: int) -> bool:
        return bool(mask_function(zero, zero, zero + query, zero + key))

    if any(sees(query, key) for query in range(num_tokens) for key in range(query + 1, num_tokens)):
        return None
    try:
        if sees(FAR, 0):
            return MaskShape()
        low, high = 0, FAR  # the first query that does not see key 0 is in (low, high]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sees(middle, 0) else (low, middle)
    except IndexError:  # it looks things up by position, such as which tokens are an image
        return AS_TOLD
    return MaskShape(window=high) if sees(high, high - 1) else MaskShape(chunk=high)

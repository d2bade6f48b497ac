"""Which keys a model's queries see, derived from the masks that it requests from transformers.

A model may implement its sliding window in the mask alone, without passing it to the attention function, but steps
build no masks. So a trial run builds one, and its mask function is evaluated to find where keys are hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface

from gpu_worker.layers.attention import ATTENTION, AttentionCall

FAR = 1 << 24
"""A position beyond any text."""


@dataclass(frozen=True, slots=True)
class MaskShape:
    """The earlier keys that a query sees: all (both fields 0), the last `window`, or those of its `chunk`."""

    window: int = 0
    chunk: int = 0


AS_CALLED = MaskShape(window=-1)
"""The shape of a mask that is causal for the trial's tokens and undefined beyond: the call's own window applies."""


class RecordedMasks:
    """The masks of one trial run, identified by their memory."""

    def __init__(self) -> None:
        self._shapes: dict[int, MaskShape | None] = {}
        self._kept: list[Tensor] = []

    def add(self, mask: Tensor, shape: MaskShape | None) -> None:
        """Record a mask built for transformers. shape: None if it is not supported."""
        self._kept.append(mask)
        self._shapes[mask.untyped_storage().data_ptr()] = shape

    def shape_of(self, call: AttentionCall) -> MaskShape | None:
        """Return which keys a call's queries see, None if paged attention does not support it."""
        own = MaskShape(window=call.window)
        shape = own if call.mask is None else self._shapes.get(call.mask.untyped_storage().data_ptr())
        return own if shape == AS_CALLED else shape


@contextmanager
def record_masks() -> Iterator[RecordedMasks]:
    """Make transformers build masks for our attention, and record their shapes."""
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
    """Return the shape of a mask given as a function of (batch, head, query, key), None if unsupported.

    num_tokens: queries and keys of the trial run. device: for the function's tensor arguments.
    """
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
    except IndexError:  # the function looks up positions in a table, for example of image tokens
        return AS_CALLED
    return MaskShape(window=high) if sees(high, high - 1) else MaskShape(chunk=high)

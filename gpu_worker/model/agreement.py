"""Compares a block with the module it replaces, on the arguments that a trial run recorded."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from gpu_worker.layers.attention import StepContext
from gpu_worker.layers.mixers import MixerStates
from gpu_worker.model.trial import NUM_TOKENS, ModuleCall
from lora_kernels import ops

logger = logging.getLogger(__name__)

LARGE_INPUT_FACTOR = 32.0
"""Scale of the inputs in the second comparison, which exposes modules that clip their input."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Maximum difference between a module and a block, relative to the largest output; allows for rounding only."""


def agrees(
    module: nn.Module,
    block: Any,
    call: ModuleCall,
    context: StepContext,
    mixers: MixerStates,
    *,
    large_inputs: bool = False,
    exact: bool = False,
) -> bool:
    """Return whether a block computes the same as a module on a recorded call, up to rounding.

    large_inputs: also compare one token with larger inputs, for which attention only passes its values on. exact:
    require bit-identical results. Writes to the first KV block and states, and to the step's work lists.
    """
    device = next(value.device for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor))
    _set_tokens(context, mixers, NUM_TOKENS, device)
    if not _same(module, block, call, exact=exact):
        return False
    if not large_inputs:
        return True
    _set_tokens(context, mixers, 1, device)
    enlarged = ModuleCall(_last_token_enlarged(call.args), _last_token_enlarged(call.kwargs))
    return _same(module, block, enlarged, exact=exact)


def close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether numbers differ by at most `tolerance` of the largest expected magnitude.

    Returns True if expected numbers are not finite: they overflow the dtype, which proves nothing.
    """
    if not expected.isfinite().all():
        return True
    difference = (got.float() - expected.float()).abs().max()
    return bool(difference <= tolerance * expected.float().abs().max())


def _same(module: nn.Module, block: Any, call: ModuleCall, *, exact: bool) -> bool:
    expected = module.forward(*_copies(call.args), **_copies(call.kwargs))
    try:
        got = block.forward(*_copies(call.args), **_copies(call.kwargs))
    except (TypeError, ValueError, RuntimeError) as error:  # the block does not support these arguments or shapes
        logger.debug("no shortcut for %s: %s", type(module).__name__, error)
        return False
    if type(got) is not type(expected):
        return False
    if isinstance(expected, (tuple, ModelOutput)):
        expected, got = expected[0], got[0]
    if not isinstance(got, Tensor) or not isinstance(expected, Tensor) or got.shape != expected.shape:
        return False
    return torch.equal(got, expected) if exact else close(got, expected, TOLERANCE[expected.dtype])


def _set_tokens(context: StepContext, mixers: MixerStates, num: int, device: torch.device) -> None:
    """Set up a step of `num` tokens of one sequence, in the first block."""
    mixers.begin_one(num, device)
    num_tokens = np.array([num])
    context.attention = ops.build_attention_batch(num_tokens, num_tokens, np.zeros((1, 1), np.int32), device)


def _last_token_enlarged(values: Any) -> Any:
    """Return a module's arguments for their last token only, with its hidden state times LARGE_INPUT_FACTOR.

    The last token, because the first may be padding. Tensors in a tuple are rotary embeddings, which are not scaled.
    """

    def cut(value: Any, factor: float) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(part, 1.0) for part in value)
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != NUM_TOKENS:
            return value
        return value[:, -1:] * factor if value.is_floating_point() else value[:, -1:]

    if isinstance(values, dict):
        return {key: cut(value, LARGE_INPUT_FACTOR) for key, value in values.items()}
    return tuple(cut(value, LARGE_INPUT_FACTOR) for value in values)


def _copies(values: Any) -> Any:
    """Copy the tensors of a module's arguments: blocks may change them in place."""
    if isinstance(values, Tensor):
        return values.clone()
    if isinstance(values, (tuple, list)):
        return type(values)(_copies(value) for value in values)
    if isinstance(values, dict):
        return {key: _copies(value) for key, value in values.items()}
    return values

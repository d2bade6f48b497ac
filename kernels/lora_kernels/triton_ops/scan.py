"""Selective scan on a GPU with torch's kernels: processes a chunk of tokens in a few steps over all its tokens.

The effect of consecutive tokens on a state is a (decay, gain) pair, and two adjacent effects compose to another such
pair. So spans can be doubled: after log2(n) rounds every token has the pair of all tokens up to it (Hillis and Steele,
1986). Token by token, a chunk would take n rounds of small kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = 64
"""Tokens per chunk; their states take 4 × CHUNK_TOKENS × C × N bytes, and their decays as much again."""


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, *, skip: Tensor | None = None,
    gate: Tensor | None = None, dt_bias: Tensor | None = None, softplus: bool = False,
) -> Tensor:  # fmt: skip
    """See `ops.selective_scan`."""
    inputs, steps, rates = x.float(), dt.float(), a.float()
    if dt_bias is not None:
        steps = steps + dt_bias.float()
    if softplus:
        steps = F.softplus(steps)
    out = torch.empty_like(inputs)
    for first in range(0, len(x), CHUNK_TOKENS):
        part = slice(first, first + CHUNK_TOKENS)
        decay = torch.exp(steps[part, :, None] * rates)
        gain = (steps[part] * inputs[part])[..., None] * b[part, None].float()
        gain[0] += decay[0] * state
        span = 1
        while span < len(gain):
            gain = torch.cat((gain[:span], gain[span:] + decay[span:] * gain[:-span]))
            decay = torch.cat((decay[:span], decay[span:] * decay[:-span]))
            span *= 2
        out[part] = torch.einsum("tcn,tn->tc", gain, c[part].float())
        state.copy_(gain[-1])
    if skip is not None:
        out = out + inputs * skip.float()
    if gate is not None:
        out = out * F.silu(gate.float())
    return out.to(x.dtype)

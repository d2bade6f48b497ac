"""Lightning attention (MiniMax), which transformers implements in the layer, with a cache of its own.

Linear attention whose past decays at a rate per head (Qin et al., Lightning Attention-2, 2024). A layer is recognized
by its attributes. Our forward computes the same, with the token mixing in a function that supports states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpu_worker.layers.mixers import MixerCall, StateBatch, switch
from gpu_worker.loading.checkpoint import CACHE_NAMES

PARTS = ("qkv_proj", "out_proj", "output_gate", "norm", "act_fn", "slope_rate", "num_attention_heads", "head_dim")
"""Attributes by which a layer is recognized."""

BLOCK = 64
"""Tokens computed at once."""


def attend(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the attention [1, H, T, D] of q, k and v [1, H, T, D], and the state [1, H, D, D] after it.

    rate: [H, 1, 1], decay per token. state: the state before the first token; None: zero.
    """
    state = v.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]) if state is None else state
    outs: list[Tensor] = []
    for first in range(0, q.shape[2], BLOCK):
        part = slice(first, first + BLOCK)
        own_q, own_k, own_v = q[:, :, part], k[:, :, part], v[:, :, part]
        num = own_q.shape[2]
        steps = torch.arange(1, num + 1, device=q.device)[:, None]
        decay = torch.exp(-rate * (steps - steps.T).clamp(min=0)).tril()
        inside = (own_q @ own_k.transpose(-1, -2) * decay) @ own_v
        outs.append(inside + (own_q * torch.exp(-rate * steps)) @ state)
        kept = own_k * torch.exp(-rate * (num - steps))
        state = state * torch.exp(-rate * num) + kept.transpose(-1, -2) @ own_v
    return torch.cat(outs, 2), state


def attend_one(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention [n, H, D] of one token each of n sequences, and the states [n, H, D, D] after it."""
    states = states * torch.exp(-rate) + k[..., None] * v[..., None, :]
    return (q[..., None, :] @ states)[..., 0, :], states


class LightningAttention(MixerCall):
    """attend(q, k, v [1, H, T, D], rate): a state is [H, D, D], in the dtype of v."""

    def state_of(self, args: tuple[Any, ...], kwargs: Any) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and dtype of a state."""
        _, k, v, _ = args
        return (k.shape[1], k.shape[3], v.shape[3]), v.dtype

    def run(self, batch: StateBatch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, None]:
        """Return the attention [1, H, T, D], and None for the state."""
        *inputs, rate = args
        states = self.states
        assert states is not None
        out = torch.empty_like(inputs[2])
        if batch.singles is not None:
            at = batch.singles
            rows = [x[0, :, at.rows].transpose(0, 1) for x in inputs]
            new, states[at.writes] = self.one(*rows, rate, states[at.reads])
            out[0, :, at.rows] = new.transpose(0, 1)
        for run in batch.runs:
            part = [x[:, :, run.start : run.end] for x in inputs]
            out[:, :, run.start : run.end], own = self.many(*part, rate, states[run.read][None])
            self.put(run, own[0])
        return out, None


_attend = switch("lightning_attention", LightningAttention, attend, attend_one)


def install_lightning(model: nn.Module) -> None:
    """Make a model's lightning attention support packed steps; calls with a cache are unchanged."""
    for layer in model.modules():
        if all(hasattr(layer, name) for name in PARTS) and "forward" not in vars(layer):
            layer.forward = _forward(layer, layer.forward)


def _forward(layer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if any(kwargs.get(name) is not None for name in CACHE_NAMES):
            return original(hidden_states, *args, **kwargs)
        qkv = layer.act_fn(layer.qkv_proj(hidden_states))
        qkv = qkv.reshape(*hidden_states.shape[:2], layer.num_attention_heads, 3 * layer.head_dim)
        q, k, v = (part.transpose(1, 2) for part in qkv.split(layer.head_dim, 3))
        out = layer.norm(_attend(q, k, v, layer.slope_rate)[0].transpose(1, 2).flatten(2))
        return layer.out_proj(torch.sigmoid(layer.output_gate(hidden_states)) * out), None

    return forward

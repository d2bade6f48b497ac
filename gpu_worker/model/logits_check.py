"""The untouched model's logits for a few random prompts, against which the finished engine is checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gpu_worker.loading.checkpoint import quantisation_of, takes_positions
from gpu_worker.quantised.modules import has_rounded_inputs

CHECK_LIMITS = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}
"""Maximum difference of logits caused by rounding: 0.06 measured in bf16 with 30 layers.

Wrong attention gives about 1.
"""

CODED_LIMIT = 0.3
"""The same limit with int8 keys and values."""

MAX_OVER_SENSITIVITY = 3.0
"""Maximum difference of a model with quantized activations, as a multiple of the effect of last-digit changes of its
embeddings."""

LAST_DIGITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative differences of a number that rounding and another order of sums can cause."""


@dataclass(frozen=True, slots=True)
class LogitsCheck:
    """Random prompts with their logits, each computed alone, and the blocks compared with the model's modules."""

    prompts: list[Tensor]  # int64 [T]
    logits: list[Tensor]  # [T, V] of each prompt
    sensitivity: float = 0.0  # `spread_of` after changing the embeddings' last digits; 0 without rounded activations
    origin: str = ""  # the file in which an earlier start cached them
    agreed: frozenset[str] | None = None  # see `install_shortcuts`; None: no block was compared

    def limit(self, dtype: torch.dtype) -> float:
        """Return the maximum `spread_of` of a correct engine that computes in `dtype`."""
        return max(CHECK_LIMITS[dtype], MAX_OVER_SENSITIVITY * self.sensitivity)


def ask_untouched(module: PreTrainedModel, config: Any) -> LogitsCheck:
    """Run random prompts with Hugging Face's own attention. They exceed the sliding window, if it is short."""
    window = getattr(config, "sliding_window", None) or 0
    longest = window + 8 if 16 < window <= 512 else 24
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(config.vocab_size, (num,), generator=generator) for num in (longest, longest - 7)]
    prompts = [ids.to(module.device) for ids in prompts]
    logits = _logits_of(module, prompts)
    if not quantisation_of(module.config) and not has_rounded_inputs(module):
        return LogitsCheck(prompts, logits)
    with last_digits_changed(module):
        return LogitsCheck(prompts, logits, spread_of(_logits_of(module, prompts), logits))


def _logits_of(module: PreTrainedModel, prompts: list[Tensor]) -> list[Tensor]:
    found = []
    for ids in prompts:
        positions = {"position_ids": torch.arange(len(ids), device=ids.device)[None]} if takes_positions(module) else {}
        found.append(module(input_ids=ids[None], use_cache=False, **positions).logits[0])
    return found


@contextlib.contextmanager
def last_digits_changed(module: PreTrainedModel) -> Iterator[None]:
    """Perturb the embeddings, inside the block, as little as another order of sums would.

    Layers that round their input, to int8 for example, amplify this: a number near a rounding boundary moves to the
    other side.
    """
    generator = torch.Generator().manual_seed(1)

    def hook(_: nn.Module, _args: Any, out: Tensor) -> Tensor:
        noise = torch.randn(out.shape, generator=generator).to(out.device)
        return (out.float() * (1 + LAST_DIGITS[out.dtype] * noise)).to(out.dtype)

    handle = module.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def spread_of(logits: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the RMS difference of logits from the expected ones, relative to the standard deviation of the latter.

    Both hold tensors of equal shapes [rows, V].
    """
    got, right = torch.cat(list(logits)).float(), torch.cat(list(expected)).float()
    return ((got - right).square().mean().sqrt() / right.std()).item()

"""Adapters with virtual tokens of every kind that PEFT saves, and PEFT's results for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from oracle.adapters.peft_kinds import LLAMA, MIXTRAL, Base, Kind, model_logits
from oracle.peft_oracle import TINY_VOCAB, prompts
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from torch import Tensor

GPT2: Base = ("gpt2", {"n_inner": 96, "num_key_value_heads": 4})
GEMMA: Base = (
    "gemma3_text",
    {"head_dim": 16, "sliding_window": 12, "tie_word_embeddings": True,
     "layer_types": ["sliding_attention", "full_attention"]},
)  # fmt: skip
QWEN3: Base = ("qwen3", {"head_dim": 24})
SLIDING: Base = ("mistral", {"sliding_window": 20})
NUM = 21
"""Usual number of virtual tokens: more than one cache block, and not a multiple of one."""

SOME: dict[str, Any] = {"num_virtual_tokens": NUM}
SOFT, PREFIX = PromptTuningConfig, PrefixTuningConfig

CASES: dict[str, Kind] = {
    "prompt_tuning": Kind(LLAMA, SOME, config=SOFT),
    "multitask": Kind(LLAMA, {**SOME, "num_ranks": 3}, config=MultitaskPromptTuningConfig),
    "p_tuning": Kind(LLAMA, {**SOME, "encoder_hidden_size": 32}, config=PromptEncoderConfig),
    "p_tuning, lstm": Kind(
        LLAMA,
        {**SOME, "encoder_hidden_size": 32, "encoder_reparameterization_type": "LSTM"},
        config=PromptEncoderConfig,
    ),
    "cpt": Kind(
        LLAMA, {"cpt_token_ids": list(range(3, 3 + NUM)), "cpt_tokens_type_mask": [1, 2, 3] * 7},
        config=CPTConfig,
    ),
    "prefix_tuning": Kind(LLAMA, SOME, config=PREFIX),
    "prefix_tuning, projected": Kind(
        LLAMA, {**SOME, "encoder_hidden_size": 32, "prefix_projection": True}, config=PREFIX
    ),
    "cartridge": Kind(LLAMA, {**SOME, "num_virtual_tokens": 40}, config=CartridgeConfig),
}  # fmt: skip
"""One case per kind, and per module that PEFT runs when it saves."""

BASES: dict[str, Kind] = {
    "prompt_tuning on qwen3": Kind(QWEN3, SOME, config=SOFT),
    "prompt_tuning on mixtral": Kind(MIXTRAL, SOME, config=SOFT),
    "prompt_tuning on gpt2": Kind(GPT2, SOME, config=SOFT),
    "prompt_tuning on scaled embeddings": Kind(GEMMA, SOME, config=SOFT),
    "prompt_tuning on a hybrid": Kind(("falcon_h1", {"tiny": True}), SOME, config=SOFT),
    "prompt_tuning on delta rules": Kind(("qwen3_next", {"tiny": True}), SOME, config=SOFT),
    "prompt_tuning, unbatched": Kind(("falcon", {"tiny": True}), SOME, config=SOFT),
    "prompt_tuning in a window": Kind(SLIDING, SOME, config=SOFT),
    "prefix_tuning on qwen3": Kind(QWEN3, SOME, config=PREFIX),
    "prefix_tuning on mixtral": Kind(MIXTRAL, SOME, config=PREFIX),
    "prefix_tuning on gpt2": Kind(GPT2, SOME, config=PREFIX),
    "prefix_tuning in layers with windows": Kind(GEMMA, SOME, config=PREFIX),
    "prefix_tuning in a window": Kind(SLIDING, SOME, config=PREFIX),
}
"""The same kinds on other bases."""


def is_prefix(kind: Kind) -> bool:
    return kind.config in (PrefixTuningConfig, CartridgeConfig)


def task_of(kind: Kind) -> dict[str, Any]:
    """Return the arguments that PEFT needs besides the text."""
    is_multitask = kind.config is MultitaskPromptTuningConfig
    return {"task_ids": torch.zeros(1, dtype=torch.int64)} if is_multitask else {}


def virtual_logits(kind: Kind, model: PeftModel, prompt: np.ndarray, output: Sequence[int]) -> Tensor:
    """Return PEFT's logits for each output token [n, V]; its forward also returns those of virtual tokens."""
    return model_logits(model, prompt, output, use_cache=True, **task_of(kind))[-len(output) :]


def peft_greedy(kind: Kind, model: PeftModel, prompt: np.ndarray, num_tokens: int) -> list[int]:
    """Return the most likely tokens by PEFT's forward, with one pass over the whole text per token.

    PEFT 0.21's own `generate` looks for the cache under a name that transformers 5 no longer uses: it puts a prompt's
    virtual tokens before every token, and omits a prefix.
    """
    ids: list[int] = []
    for _ in range(num_tokens):
        ids.append(int(virtual_logits(kind, model, prompt, [*ids, 0])[-1].argmax()))
    return ids


def asked(length: int = 9) -> np.ndarray:
    """Return a prompt that is short enough for virtual tokens to fit a window of 20 tokens."""
    return prompts(1, TINY_VOCAB, (length,))[0]

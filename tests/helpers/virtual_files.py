"""Adapters with virtual tokens for the small base of `kind_files`, without torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from helpers.adapter_files import HIDDEN
from helpers.kind_files import KIND_BASE
from peft_adapters.kinds.virtual import PREFIXES, TENSOR

LAYERS, HEADS, ENTRIES, NUM = 3, 2, 8, 5
VIRTUAL_BASE = structs.replace(KIND_BASE, prefix=[LAYERS, HEADS, ENTRIES], max_model_len=64)
MULTITASK = "MULTITASK_PROMPT_TUNING"

Tensors = dict[str, NDArray[Any]]


def virtual_config(kind: str, **fields: Any) -> dict[str, Any]:
    return {"peft_type": kind, "task_type": "CAUSAL_LM", "num_virtual_tokens": NUM, **fields}


def virtual_tensors(kind: str, num: int = NUM) -> Tensors:
    width = LAYERS * 2 * HEADS * ENTRIES if kind in PREFIXES else HIDDEN
    found: Tensors = {TENSOR: np.random.default_rng(0).normal(size=(num, width)).astype(np.float32)}
    if kind == MULTITASK:
        found |= {"prefix_task_cols": np.ones((1, num, 1), np.float32)}
        found |= {"prefix_task_rows": np.ones((1, 1, HIDDEN), np.float32)}
    return found

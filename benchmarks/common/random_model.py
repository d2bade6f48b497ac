"""Models of a published shape with random weights: only the shape determines the speed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, set_seed

from benchmarks.common.fleet import quickstart_model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def random_model(kind: type[Any], shape: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return a model of a transformers class and config with random weights, identical in every run."""
    set_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return kind(shape)
    finally:
        torch.set_default_dtype(before)


def save_with_tokenizer(model: Any, folder: Path) -> None:
    """Write a model into `folder` with the quickstart model's tokenizer. Raises OSError if that cannot be loaded."""
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        source = quickstart_model() / name
        if source.exists():
            shutil.copy(source, folder / name)
    PreTrainedTokenizerFast.from_pretrained(folder)

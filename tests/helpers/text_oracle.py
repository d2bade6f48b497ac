"""The answers of transformers and PEFT, which decide what is right."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Oracle:
    """The base model in transformers, with its adapters in PEFT."""

    model: Path

    def greedy(self, prompt: str, max_tokens: int, adapter: Path | None = None) -> str:
        """Return the greedy continuation of exactly `max_tokens` tokens."""
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        model: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        prompt_ids = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**prompt_ids, max_new_tokens=max_tokens, do_sample=False)
        return tokenizer.decode(ids[0, prompt_ids.input_ids.shape[1] :], skip_special_tokens=True)

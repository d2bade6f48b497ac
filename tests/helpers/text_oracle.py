"""The answers of transformers and PEFT, with which the fleet's answers are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import MultitaskPromptTuningConfig, PeftModel
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
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            return tokenizer.decode(_likeliest(model, prompt_ids.input_ids, max_tokens), skip_special_tokens=True)
        ids = model.generate(**prompt_ids, max_new_tokens=max_tokens, do_sample=False)
        return tokenizer.decode(ids[0, prompt_ids.input_ids.shape[1] :], skip_special_tokens=True)


def _likeliest(model: PeftModel, ids: torch.Tensor, max_tokens: int) -> list[int]:
    """Return the most likely tokens after ids [1, P] with PEFT's forward: its `generate` misplaces virtual tokens."""
    start, options = ids.shape[1], dict[str, Any]()
    if isinstance(model.active_peft_config, MultitaskPromptTuningConfig):
        options["task_ids"] = torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode():
        for _ in range(max_tokens):
            token = model(input_ids=ids, use_cache=True, **options).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], 1)
    return ids[0, start:].tolist()

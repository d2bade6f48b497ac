"""What clients ask for, and what they must get: the answers of an undisturbed fleet, held against transformers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS = ("The first prompt", "Another", "and a third, rather longer one: " + 20 * "abc ", "x")
NUM_TOKENS = (40, 120, 300)
SEEDED = {"temperature": 0.9, "top_p": 0.95}
PENALISED = {"temperature": 0.7, "top_k": 40, "frequency_penalty": 0.4, "presence_penalty": 0.2}
GREEDY = {"temperature": 0}
MIN_MARGIN = 1e-4
"""Least distance of the two best logits at every greedy step, so that rounding cannot decide what is right."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What fixes the text of one choice."""

    model: str
    prompt: str
    num_tokens: int
    sampling: tuple[tuple[str, Any], ...]

    @property
    def is_greedy(self) -> bool:
        return dict(self.sampling) == GREEDY

    def body(self, *, stream: bool, background: bool = False) -> dict[str, Any]:
        """Return the body of a completion."""
        body = {"model": self.model, "prompt": self.prompt, "max_tokens": self.num_tokens, "ignore_eos": True}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body | dict(self.sampling) | ({"background": True} if background else {})


@dataclass(frozen=True, slots=True)
class Expected:
    """What an ask must bring."""

    text: str
    ids: bytes  # int32, as in the log
    num_prompt_tokens: int
    finish: str = "length"

    @property
    def num_tokens(self) -> int:
        return len(self.ids) // 4


def catalogue(models: Sequence[str], rng: random.Random) -> list[Ask]:
    """Return asks of every model, greedy and seeded, short and long."""
    kinds = [GREEDY, {**SEEDED, "seed": rng.randrange(1 << 31)}, {**PENALISED, "seed": rng.randrange(1 << 31)}]
    return [
        Ask(model, prompt, NUM_TOKENS[(i + j + k) % len(NUM_TOKENS)], tuple(sampling.items()))
        for i, model in enumerate(models)
        for j, prompt in enumerate(PROMPTS)
        for k, sampling in enumerate(kinds)
    ]


class Transformers:
    """What transformers and PEFT answer, one request at a time."""

    def __init__(self, model: Path, adapters: Path, names: Sequence[str]) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        base.generation_config.eos_token_id = None  # as `ignore_eos`: the end token is a token like others
        self._model = PeftModel.from_pretrained(base, str(adapters / names[0]), adapter_name=names[0])
        for name in names[1:]:
            self._model.load_adapter(str(adapters / name), adapter_name=name)

    def greedy(self, ask: Ask) -> tuple[list[int], float]:
        """Return an ask's greedy continuation, and the least margin of a choice in it."""
        if ask.model == "base":
            with self._model.disable_adapter():
                return self._generate(ask)
        self._model.set_adapter(ask.model)
        return self._generate(ask)

    def _generate(self, ask: Ask) -> tuple[list[int], float]:
        torch = self._torch
        ids = self.tokenizer(ask.prompt, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            out = self._model.generate(
                **ids, max_new_tokens=ask.num_tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        best = torch.stack(out.logits).float().topk(2, dim=-1).values
        margin = float((best[..., 0] - best[..., 1]).min())
        return out.sequences[0, ids["input_ids"].shape[1] :].tolist(), margin


def decidable(asks: Iterable[Ask], oracle: Transformers) -> tuple[list[Ask], dict[Ask, list[int]]]:
    """Return the asks without those whose greedy answer rounding could change, and the ids of the greedy ones."""
    kept: list[Ask] = []
    answers: dict[Ask, list[int]] = {}
    for ask in asks:
        if ask.is_greedy:
            ids, margin = oracle.greedy(ask)
            if margin < MIN_MARGIN:
                continue
            answers[ask] = ids
        kept.append(ask)
    return kept, answers

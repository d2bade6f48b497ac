"""A tiny model of a type with two adapters, and what transformers and PEFT say to some prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
from oracle.conformance import adapters_for
from oracle.peft_oracle import Oracle, greedy_request, prompts
from oracle.tiny_models import tiny_model

from gpu_worker.model.prepare import prepare_model
from gpu_worker.planning.states import PROMPT_TOKENS

NUM_TOKENS = 12
BEGINNING = PROMPT_TOKENS + 20  # tokens that all long prompts have in common


class Case:
    """A tiny model of a type with adapters, and what is right for some prompts."""

    def __init__(self, model_type: str, long: tuple[int, ...] = (25, 40)) -> None:
        """long: tokens of prompts after a long common beginning."""
        sites = prepare_model(tiny_model(model_type), frozenset(), None).sites
        model = tiny_model(model_type)
        self.oracle = Oracle(model, adapters_for(model, sites), scale=0.4)
        rng = np.random.default_rng(1)
        beginning = rng.integers(3, 190, BEGINNING).astype(np.int32)
        ends = [np.concatenate((beginning, rng.integers(3, 190, n).astype(np.int32))) for n in long]
        self.prompts = [*prompts(3, 190, (1, 17, 49)), *ends]
        self.expected = {
            name: [self.oracle.greedy(name, prompt, NUM_TOKENS) for prompt in self.prompts]
            for name in self.oracle.names
        }

    def requests(self, names: list[str] | None = None, **fields: Any) -> list[Any]:
        """Return a request per adapter and prompt, named by both."""
        return [
            greedy_request(f"{name}/{i}", name, prompt, NUM_TOKENS, **fields)
            for name in names or self.oracle.names
            for i, prompt in enumerate(self.prompts)
        ]

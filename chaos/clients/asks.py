"""The requests of clients, and their expected answers: those of an undisturbed fleet, checked against transformers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpu_worker.sampling.adjustment import Adjustment
from gpu_worker.sampling.sampling import SampleRow, sample
from protocol.wire.messages import Sampling

PROMPTS = ("The first prompt", "and another, rather longer one: " + 20 * "abc ", "x")
NUM_TOKENS = (40, 100, 250)
SEEDED = {"temperature": 0.9, "top_p": 0.95}
PENALISED = {"temperature": 0.7, "top_k": 40, "frequency_penalty": 0.4, "presence_penalty": 0.2}
GREEDY = {"temperature": 0}
ENCODED = ("my name is ada lovelace", "grace", "i live in london with grace hopper of new york city", "?")
"""Texts whose vectors are requested from an encoder."""

NUDGE, NUM_NUDGES = 1e-4, 16
"""Standard deviation and number of the perturbations of logits that test whether rounding could change a token."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Everything that determines the text of one choice; `num_tokens` 0 asks for the vector of the prompt."""

    model: str
    prompt: str
    num_tokens: int
    sampling: tuple[tuple[str, Any], ...]

    def body(self, *, stream: bool, background: bool = False) -> dict[str, Any]:
        """Return the body of a completion."""
        body = {"model": self.model, "prompt": self.prompt, "max_tokens": self.num_tokens, "ignore_eos": True}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body | dict(self.sampling) | ({"background": True} if background else {})


@dataclass(frozen=True, slots=True)
class Expected:
    """The expected answer to an ask."""

    text: str
    ids: bytes  # int32, as in the log
    num_prompt_tokens: int
    finish: str = "length"
    vector: tuple[float, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Number of output tokens."""
        return len(self.ids) // 4


def catalogue(models: Sequence[str], rng: random.Random) -> list[Ask]:
    """Return asks for every model: greedy and seeded, short and long."""
    kinds = [GREEDY, {**SEEDED, "seed": rng.randrange(1 << 31)}, {**PENALISED, "seed": rng.randrange(1 << 31)}]
    return [
        Ask(model, prompt, NUM_TOKENS[(i + j + k) % len(NUM_TOKENS)], tuple(sampling.items()))
        for i, model in enumerate(models)
        for j, prompt in enumerate(PROMPTS)
        for k, sampling in enumerate(kinds)
    ]


def vector_asks(models: Iterable[str]) -> list[Ask]:
    """Return asks for vectors from an encoder and its adapters."""
    return [Ask(model, text, 0, ()) for model in models for text in ENCODED]


def one_ask(model: str, number: int) -> Ask:
    """Return a short ask for a model, greedy or seeded."""
    sampling = {**SEEDED, "seed": number} if number % 3 == 2 else GREEDY
    return Ask(model, PROMPTS[number % len(PROMPTS)], NUM_TOKENS[0], tuple(sampling.items()))


class Transformers:
    """The oracle: transformers and PEFT, one request at a time, with the worker's sampling."""

    def __init__(self, model: Path, adapters: Path, names: Sequence[str], base: str = "base") -> None:
        """Load the model, named `base` in asks, and the adapters `names` in the folder `adapters`."""
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self._base = base
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._model = PeftModel.from_pretrained(loaded, str(adapters / names[0]), adapter_name=names[0])
        for name in names[1:]:
            self._model.load_adapter(str(adapters / name), adapter_name=name)

    def answer(self, ask: Ask) -> list[int] | None:
        """Return the tokens of the answer; None if rounding could change one of them."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._torch.inference_mode())
            if ask.model == self._base:
                stack.enter_context(self._model.disable_adapter())
            else:
                self._model.set_adapter(ask.model)
            return self._generate(ask)

    def _generate(self, ask: Ask) -> list[int] | None:
        torch = self._torch
        sampling = Sampling(**dict(ask.sampling))
        prompt = np.array(self._tokenizer(ask.prompt, add_special_tokens=False)["input_ids"], np.int32)
        noise = torch.randn((NUM_NUDGES, self._model.config.vocab_size), generator=torch.Generator().manual_seed(0))
        nudges = noise * NUDGE
        nudges[0] = 0.0
        output: list[int] = []
        ids, past = torch.from_numpy(prompt.astype(np.int64))[None], None
        while len(output) < ask.num_tokens:
            step = self._model(input_ids=ids, past_key_values=past, use_cache=True)
            past = step.past_key_values
            row = SampleRow(sampling, np.array(output, np.int32), adjustment=Adjustment.of(sampling, prompt))
            drawn = sample(step.logits[:, -1] + nudges, [row] * NUM_NUDGES).ids
            if (drawn != drawn[0]).any():
                return None
            output.append(int(drawn[0]))
            ids = torch.tensor([[output[-1]]])
        return output


def vectors(asks: Iterable[Ask], model: Path, adapters: Path) -> dict[Ask, tuple[float, ...]]:
    """Return the vectors that transformers and PEFT compute for asks.

    model: the encoder's folder; its name is the model's name in asks. adapters: the folder of its adapters.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    found: dict[Ask, tuple[float, ...]] = {}
    for ask in asks:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
        encoder: Any = AutoModel.from_pretrained(model, dtype=torch.float32)
        if ask.model != model.name:
            encoder = PeftModel.from_pretrained(encoder, str(adapters / ask.model))
        with torch.inference_mode():
            hidden = encoder(**tokenizer(ask.prompt, return_tensors="pt")).last_hidden_state
        found[ask] = tuple(hidden[0, 0].tolist())
    return found


def decidable(asks: Iterable[Ask], oracle: Transformers) -> dict[Ask, list[int]]:
    """Return the tokens of those asks whose answer rounding cannot change."""
    answers = ((ask, oracle.answer(ask)) for ask in asks)
    return {ask: ids for ask, ids in answers if ids is not None}

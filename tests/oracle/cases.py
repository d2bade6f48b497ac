"""A tiny model of a type with two adapters, and the answers of transformers and PEFT to some prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from oracle.conformance import adapters_for
from oracle.peft_oracle import Asked, Oracle, ask, greedy_request, prompts, warm
from oracle.tiny_models import tiny_model

from gpu_worker.engine.engine import Engine
from gpu_worker.model.prepare import prepare_model
from gpu_worker.planning.states import PROMPT_TOKENS

NUM_TOKENS = 12
BEGINNING = PROMPT_TOKENS + 20  # number of tokens that all long prompts share


class Case:
    """A tiny model of a type with adapters, and the expected outputs of some prompts."""

    def __init__(self, model_type: str, long: tuple[int, ...] = (25, 40)) -> None:
        """long: for each long prompt, its number of tokens after the shared beginning."""
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
        """Return a request per adapter and prompt, with the id `<adapter>/<prompt>`."""
        return [
            greedy_request(f"{name}/{i}", name, prompt, NUM_TOKENS, **fields)
            for name in names or self.oracle.names
            for i, prompt in enumerate(self.prompts)
        ]

    def check(self, asked: Asked, skip: int = 0) -> None:
        """Compare outputs with the expected ones after their first `skip` tokens."""
        for name, expected in self.expected.items():
            assert [asked.ids[f"{name}/{i}"] for i in range(len(expected))] == [ids[skip:] for ids in expected], name

    def check_effect(self) -> None:
        """Check that each adapter changes the outputs."""
        base, *others = self.expected.values()
        assert all(expected != base for expected in others)

    def check_preempted(self, engine: Engine) -> None:
        """Let requests of a quiet tenant preempt others, and check the outputs of all."""
        warm(engine, self.oracle.names)
        quiet = [replace(request, rid=f"quiet-{request.rid}") for request in self.requests(["all"])]

        def let_all_in(num_steps: int) -> None:
            while quiet and num_steps == 6:
                engine.add(quiet.pop())

        asked = ask(engine, self.requests(yields=True), let_all_in)
        assert engine.counters.num_preemptions >= 2
        self.check(asked)
        assert [asked.ids[f"quiet-all/{i}"] for i in range(len(self.prompts))] == self.expected["all"]

    def check_begun(self, engine: Engine) -> None:
        """Check requests whose outputs another worker has begun."""
        begun = [
            replace(request, output=self.expected[request.digest][int(request.rid.partition("/")[2])][:7])
            for request in self.requests()
        ]
        self.check(ask(engine, begun), skip=7)

"""Limited steps change no output: yielding sequences run in other steps, with the same tokens as without a limit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from oracle.peft_oracle import TINY_VOCAB, Oracle, ask, greedy_request, prompts, warm

from gpu_worker.planning.batcher import Batcher
from gpu_worker.planning.step_plan import StepPlan
from protocol.wire.messages import Sampling, StepModel

NUM_TOKENS = 24
FEW_BLOCKS: dict[str, Any] = {"kv_cache_bytes": 30 * 16 * 512, "max_model_len": 128}


def watched(batcher: Batcher) -> list[StepPlan]:
    """Give a batcher a step model in which a token costs as much as an empty step; return a list of its plans."""
    plans: list[StepPlan] = []
    plan = batcher.plan

    def note() -> StepPlan:
        batcher.step_model = StepModel(a=1.0, b=1.0, c=0.001)
        plans.append(plan())
        return plans[-1]

    batcher.plan = note
    return plans


@pytest.mark.parametrize(
    "settings", [{}, {"max_draft_tokens": 4}, {"max_step_tokens": 12, **FEW_BLOCKS}], ids=["plain", "drafts", "few"]
)
def test_answers_are_those_without_a_limit(tiny: Oracle, settings: dict[str, Any]) -> None:
    texts = prompts(5, TINY_VOCAB, (3, 8, 17, 24, 31))
    settings = {"max_num_seqs": 12} | settings
    requests = [
        replace(
            greedy_request(f"{name}/{i}", name, texts[(i + k) % 5], NUM_TOKENS), yields=k % 4 != 0,
            sampling=Sampling(temperature=0.5 * (i % 2), seed=i, ignore_eos=True),
        )
        for k, name in enumerate(tiny.names) for i in range(2)
    ]  # fmt: skip
    limited, free = tiny.engine(max_slowdown=1.5, **settings), tiny.engine(max_slowdown=0.0, **settings)
    for engine in (limited, free):
        warm(engine, tiny.names)
    plans = watched(limited.batcher)
    assert ask(limited, requests).ids == ask(free, requests).ids
    mixed = [[seq.yields for seq in plan.num_new] for plan in plans if any(not seq.yields for seq in plan.num_new)]
    assert any(0 < sum(yields) < len(yields) / 2 for yields in mixed), "some had to wait for their turn"

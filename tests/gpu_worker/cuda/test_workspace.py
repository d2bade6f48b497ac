"""The workspace of the largest steps is measured before caches exist, and measuring leaves the model unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable

from oracle.peft_oracle import TINY_VOCAB, Oracle, ask, greedy_request, prompts, tiny_llama

from gpu_worker.build import build_engine
from gpu_worker.cuda.workspace import workspace_bytes
from gpu_worker.model.prepare import prepare_model
from protocol.runtime.settings import Settings


class Meter:
    """Reports the given peaks, one per run."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = list(sizes)

    def peak(self, run: Callable[[], object]) -> int:
        run()
        return self.sizes.pop(0)


def test_the_largest_step_counts_and_graphs_keep_theirs() -> None:
    oracle = Oracle(tiny_llama(), {}, scale=0.4)
    model = prepare_model(copy.deepcopy(oracle.untouched), frozenset(), None)
    sizes = {"max_num_seqs": 5, "max_step_tokens": 70, "max_model_len": 32, "max_prompt_rows": 256}
    meter = Meter(10, 40, 20, 30)
    assert workspace_bytes(model, meter, **sizes, has_graphs=False) == 40
    assert not meter.sizes
    assert workspace_bytes(model, Meter(10, 40, 20, 30, 7), **sizes, has_graphs=True) == 50
    assert workspace_bytes(model, Meter(10, 40, 20, 30, 15), **sizes, has_graphs=True) == 55, "of a recorded chunk"
    assert workspace_bytes(model, Meter(10, 40, 20, 90), **sizes, has_graphs=False) == 90

    prompt = prompts(3, TINY_VOCAB, (9,))[0]
    engine, _ = build_engine(model, Settings(model="oracle", kv_cache_bytes=64 << 20), oracle.fetch)
    found = ask(engine, [greedy_request("r", "", prompt, 6)]).ids["r"]
    assert found == oracle.greedy("", prompt, 6)

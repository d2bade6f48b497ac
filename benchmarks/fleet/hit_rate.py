"""2,000 adapters and a pool for 64 of them: the pool's hit rate, and whether all answers are right.

    python -m benchmarks.fleet.hit_rate [--model FOLDER] [--short]

A real fleet in fp32 gets requests with Zipf popularity, 16 in flight, from an empty pool.
`benchmarks.simulation.eviction` plays the same trace. Every adapter has its own weights, and all get one prompt,
decoded greedily. So all answers of one adapter must be equal, those of different adapters should differ, and 50
adapters are compared with transformers and PEFT. The hit rate is the share of requests that needed no copy into the
pool.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from benchmarks.common import report
from benchmarks.common.fleet import RunningFleet, Setup, fleet, quickstart_model, scratch_folder
from benchmarks.peers.make_adapters import make_adapter, module_shapes
from benchmarks.simulation.eviction import play, zipf_trace

NUM_ADAPTERS, NUM_REQUESTS, ZIPF = 2000, 2000, 1.0
POOL_ADAPTERS = 64
CONCURRENCY = 16
RANK = 4
TARGETS = ("self_attn.q_proj", "self_attn.v_proj")
B_STD = 0.6
PROMPT = "The weather report for tomorrow:"
OUTPUT_TOKENS = 8
NUM_CHECKED = 50
MAX_DIFFERENCE = 0.1  # target: relative difference of the hit rate from the simulation's


@dataclass(frozen=True, slots=True)
class Run:
    """The fleet's answers to a trace, and their cost."""

    texts: list[str]  # one per request
    wall_s: float
    num_loads: int
    num_fetches: int  # loads that needed a fetch from the store
    resident: int  # adapters in the pool at the end

    @property
    def hit_rate(self) -> float:
        """Share of the requests that needed no copy into the pool."""
        return 1 - self.num_loads / len(self.texts)


def pool_bytes(model: Path, num_adapters: int, item_bytes: int = 4) -> int:
    """Return the minimum budget in bytes for a pool with a page of each layer for `num_adapters` adapters."""
    from transformers import AutoConfig

    from gpu_worker.adapters.weights import split_budget
    from lora_kernels.ops import PAGE_ROWS

    config = AutoConfig.from_pretrained(model)
    widths = {"self_attn": 0, "mlp": 0}
    for module, shape in module_shapes(model).items():
        widths[module.split(".")[-2]] += sum(shape)
    pages = [item_bytes * PAGE_ROWS * width for width in (*widths.values(), config.hidden_size + config.vocab_size)]
    budgets = itertools.count(num_adapters * sum(pages[:2]), pages[0] // 8)
    return next(budget for budget in budgets if split_budget(pages, budget)[0] >= num_adapters)


def ask_all(running: RunningFleet, names: Sequence[str]) -> Run:
    """Send a request for each name in turn, `CONCURRENCY` in flight. Raises HTTPStatusError if one fails."""
    before = running.num_loads()
    started_s = time.perf_counter()
    texts = asyncio.run(_ask_all(running, names))
    wall_s = time.perf_counter() - started_s
    num_loads, num_fetches = (now - then for now, then in zip(running.num_loads(), before, strict=True))
    resident = sum(len(beat.resident) for beat in running.beats())
    return Run(texts, wall_s, num_loads, num_fetches, resident)


async def _ask_all(running: RunningFleet, names: Sequence[str]) -> list[str]:
    texts: dict[int, str] = {}
    todo = iter(enumerate(names))

    async def client(http: httpx2.AsyncClient) -> None:
        for index, name in todo:
            body = {"model": name, "prompt": PROMPT, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
            response = (await http.post("/v1/completions", json=body)).raise_for_status()
            texts[index] = response.json()["choices"][0]["text"]

    async with httpx2.AsyncClient(base_url=running.url, timeout=120, trust_env=False) as http, asyncio.TaskGroup() as g:
        for _ in range(CONCURRENCY):
            g.create_task(client(http))
    return [texts[index] for index in range(len(names))]


def oracle_texts(model: Path, adapters: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the answer of transformers and PEFT for each adapter, computed one at a time."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    base.generation_config.eos_token_id = None  # same as `ignore_eos`
    prompt = tokenizer(PROMPT, return_tensors="pt")
    texts: dict[str, str] = {}
    tuned: Any = None
    for name in names:
        if tuned is None:
            tuned = PeftModel.from_pretrained(base, str(adapters / name), adapter_name=name)
        else:
            tuned.load_adapter(str(adapters / name), adapter_name=name)
            tuned.set_adapter(name)
        with torch.inference_mode():
            ids = tuned.generate(**prompt, max_new_tokens=OUTPUT_TOKENS, do_sample=False)
        texts[name] = tokenizer.decode(ids[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def main() -> None:
    """Measure the hit rate of many adapters, and compare it with the simulation."""
    args = report.parser(__doc__).parse_args()
    machine, model = report.machine(), args.model or quickstart_model()
    num_adapters, num_requests = (200, 200) if args.short else (NUM_ADAPTERS, NUM_REQUESTS)
    names = [f"adapter-{index:04}" for index in range(num_adapters)]
    random = np.random.default_rng(0)
    trace = zipf_trace(random, num_adapters, num_requests, ZIPF)
    room = {"capacity": POOL_ADAPTERS, "num_running": CONCURRENCY}
    simulated = {policy: play(policy, trace, [1] * num_adapters, **room) for policy in ("GDSF", "LRU")}
    with scratch_folder() as scratch:
        adapters = scratch / "adapters"
        for seed, name in enumerate(names):
            make_adapter(model, adapters / name, RANK, seed, targets=TARGETS, b_std=B_STD)
        flags = ["--dtype=float32", f"--adapter-pool-bytes={pool_bytes(model, POOL_ADAPTERS)}"]
        asked = [names[adapter] for adapter in trace]
        with fleet(Setup(model, adapters, scratch, flags)) as running:
            run = ask_all(running, asked)
        print(f"{len(run.texts)} answers in {run.wall_s:.0f} s", flush=True)
        answers: dict[str, set[str]] = {}
        for name, text in zip(asked, run.texts, strict=True):
            answers.setdefault(name, set()).add(text)
        checked = random.permutation(sorted(answers))[:NUM_CHECKED].tolist()
        right = oracle_texts(model, adapters, checked)
    hit_rates = {policy: float(hits.mean()) for policy, hits in simulated.items()}
    results = {
        "machine": machine, "model": model.name, "num_adapters": num_adapters, "num_requests": num_requests,
        "zipf": ZIPF, "pool_adapters": POOL_ADAPTERS, "resident_at_the_end": run.resident, "concurrency": CONCURRENCY,
        "rank": RANK, "output_tokens": OUTPUT_TOKENS, "wall_s": round(run.wall_s, 1), "hit_rate": run.hit_rate,
        "num_loads": run.num_loads, "num_fetches": run.num_fetches, "simulated_hit_rate": hit_rates,
        "simulated_loads": {policy: int((~hits).sum()) for policy, hits in simulated.items()},
        "difference_from_simulation": run.hit_rate / hit_rates["GDSF"] - 1, "wanted_difference": MAX_DIFFERENCE,
        "adapters_asked": len(answers), "adapters_with_one_answer": sum(len(texts) == 1 for texts in answers.values()),
        "different_answers": len({text for texts in answers.values() for text in texts}),
        "checked": len(checked), "checked_right": sum(answers[name] == {text} for name, text in right.items()),
    }  # fmt: skip
    report.save(args.out / "hit-rate", results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

"""A decode step of 32 requests of the base model, of one adapter, and of 32 adapters, compared with its floor.

    python -m benchmarks.engine.distinct_adapters [--model FOLDER] [--short] [--requests N] [--before CHECKOUT]

The floor of distinct adapters is the measured step of the base model, plus the bytes of the adapters' weights divided
by the measured memory bandwidth. Only `Engine.step` is measured, in this process, without HTTP and queue. The cases
alternate, and the figure is the median of whole steps. `--before` also measures the steps of another checkout,
alternately and each checkout in its own process, and then no floor.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch

from benchmarks.common import report
from benchmarks.common.checkouts import Checkout, in_turns
from benchmarks.common.fleet import adapter_bytes, make_adapters, quickstart_model, scratch_folder
from benchmarks.engine.kernels import memory_gb_s
from gpu_worker.adapters.loader.fetch import FetchedAdapter
from gpu_worker.build import build_engine
from gpu_worker.engine.engine import Engine
from gpu_worker.model.prepare import load_model
from gpu_worker.planning.request import EngineRequest
from protocol.runtime.settings import Settings
from protocol.wire.messages import Sampling

NUM_REQUESTS = 32
RANK = 16
PROMPT_TOKENS = 64
NAMES = [f"adapter-{index}" for index in range(NUM_REQUESTS)]
CASES = {"base model": [""], "one adapter": NAMES[:1], "32 adapters": NAMES}


def start_engine(model: Path, adapters: Path, **fields: Any) -> Engine:
    """Return an engine that reads its adapters from a folder; an adapter's digest is its name.

    fields: further settings.
    """

    def fetch(name: str) -> FetchedAdapter:
        config = orjson.loads((adapters / name / "adapter_config.json").read_bytes())
        return FetchedAdapter(config, (adapters / name / "adapter_model.safetensors").read_bytes())

    settings = Settings(model=str(model), dtype="bfloat16", prefix_cache=False, **fields)
    return build_engine(load_model(model, torch.device("cpu"), torch.bfloat16, None), settings, fetch, None)[0]


def add_requests(engine: Engine, digests: Sequence[str], num: int) -> None:
    """Add `num` requests for the adapters in turn, with random prompts of PROMPT_TOKENS, that never stop decoding."""
    rng = np.random.default_rng(0)
    for index in range(num):
        prompt = rng.integers(engine.model.vocab_size, size=PROMPT_TOKENS, dtype=np.int32)
        engine.add(
            EngineRequest(
                rid=str(index), epoch=1, digest=digests[index % len(digests)], prompt=prompt,
                sampling=Sampling(temperature=0, ignore_eos=True), max_new_tokens=engine.config.max_model_len,
            )
        )  # fmt: skip


def steps_ms(engine: Engine, digests: Sequence[str], num_steps: int, num: int) -> tuple[list[float], list[float]]:
    """Run `num` requests for the adapters in turn.

    Returns the ms of each step with prompts, and of each of `num_steps` steps that decoded all requests.
    """
    add_requests(engine, digests, num)
    prefills, decodes = list[float](), list[float]()
    while len(decodes) < num_steps:
        running = engine.batcher.running
        decodes_all = len(running) == num and all(seq.num_pending == 1 for seq in running)
        started = time.perf_counter()
        outputs = engine.step()
        took = 1e3 * (time.perf_counter() - started)
        if error := next((output.error for output in outputs if output.error), None):
            raise error
        if decodes_all:
            decodes.append(took)
        elif outputs:
            prefills.append(took)
    engine.hand_over()
    return prefills, decodes


def decode_ms(engine: Engine, digests: Sequence[str], num_steps: int, num: int = NUM_REQUESTS) -> list[float]:
    """Return the ms of each step that decoded all of `num` requests for the adapters in turn."""
    return steps_ms(engine, digests, num_steps, num)[1]


STEPS = """
import json, sys
from pathlib import Path
import torch
from benchmarks.engine.distinct_adapters import CASES, decode_ms, start_engine
torch.manual_seed(0)
engine = start_engine(Path(sys.argv[1]), Path(sys.argv[2]))
for line in sys.stdin:
    name, num_steps = json.loads(line)
    print(json.dumps(decode_ms(engine, CASES[name], num_steps)), flush=True)
"""
"""Program of a checkout's process: reads lines with a case and a number of steps, and writes the steps' times."""


def compare(before: Path, model: Path, adapters: Path, rounds: int, num_steps: int) -> dict[str, dict[str, float]]:
    """Return, for each case, the median step in ms of the other checkout and of this one, and their ratio."""
    folders = {"before": before, "after": Path.cwd()}
    checkouts = {label: Checkout(folder, STEPS, model, adapters) for label, folder in folders.items()}
    for checkout in checkouts.values():
        checkout.ask("32 adapters", 8)  # loads them
    times = in_turns(checkouts, {name: (name, num_steps) for name in CASES}, rounds)
    figures = {name: {label: float(np.median(ms)) for label, ms in by.items()} for name, by in times.items()}
    return {name: {**medians, "ratio": medians["after"] / medians["before"]} for name, medians in figures.items()}


def main() -> None:
    """Measure, print a table, and save the figures."""
    parser = report.parser(__doc__)
    parser.add_argument("--before", type=Path, help="another checkout, whose steps are measured beside this one's")
    parser.add_argument("--requests", type=int, default=NUM_REQUESTS, help="at once (%(default)s); not with --before")
    args = parser.parse_args()
    num, names = args.requests, NAMES[: args.requests]
    machine, model = report.machine(), args.model or quickstart_model()
    rounds, num_steps = (3, 32) if args.short else (8, 64)
    if args.before:
        with scratch_folder() as scratch:
            make_adapters(model, scratch / "adapters", NAMES, [RANK])
            found = compare(args.before, model, scratch / "adapters", 2 * rounds, num_steps // 2)
        rows = [(name, *(f"{value:.2f}" for value in figures.values())) for name, figures in found.items()]
        print(report.table(("32 requests", "before, ms", "after, ms", "ratio"), rows))
        report.save(args.out / "distinct-adapters-before", {"machine": machine, "step_ms": found})
        return
    torch.manual_seed(0)
    cases = {"base model": [""], "one adapter": names[:1], f"{num} adapters": names}
    times: dict[str, list[float]] = {name: [] for name in cases}
    bandwidths: list[float] = []
    with scratch_folder() as scratch:
        make_adapters(model, scratch / "adapters", names, [RANK])
        num_bytes = num * adapter_bytes(scratch / "adapters", names[0])
        engine = start_engine(model, scratch / "adapters")
        decode_ms(engine, names, 8, num)  # loads the adapters
        for _ in range(rounds):
            bandwidths.append(memory_gb_s())
            for name, digests in cases.items():
                times[name] += decode_ms(engine, digests, num_steps, num)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    base_ms, one_ms, distinct_ms = medians.values()
    gb_s = float(np.median(bandwidths))
    floor_ms = base_ms + num_bytes / gb_s / 1e6
    figures = {
        "step_ms": medians, "memory_gb_s": gb_s, "adapter_bytes": num_bytes, "floor_ms": floor_ms,
        "distinct_over_floor": distinct_ms / floor_ms, "one_adapter_over_base_tokens_per_s": base_ms / one_ms,
    }  # fmt: skip
    about = {"machine": machine, "rank": RANK, "requests": num, "steps_each": rounds * num_steps}
    path = args.out / ("distinct-adapters" if num == NUM_REQUESTS else f"distinct-adapters-{num}")
    report.save(path, {**about, **figures})
    rows = [(name, f"{ms:.2f}", f"{1e3 * num / ms:.0f}", f"{base_ms / ms:.2f}") for name, ms in medians.items()]
    print(report.table((f"{num} requests", "step, ms", "tok/s", "of base"), rows))
    print(f"floor {floor_ms:.2f} ms ({num_bytes / 1e6:.0f} MB at {gb_s:.0f} GB/s): {distinct_ms / floor_ms:.2f} x")


if __name__ == "__main__":
    main()

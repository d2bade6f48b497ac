"""Decode steps of a whole model on each instruction set of this processor, alternating step by step.

    python -m benchmarks.engine.steps_by_isa [--model FOLDER] [--short] [--threads N]

Cases are the base model in bf16, one adapter, and one adapter per request (rank 16), and the base's weights as Q8_0 and
Q4_0; 1, 8 and 32 requests of at least 64 tokens. Only `Engine.step` is measured, in this process, without HTTP and
queue. Each step runs on another instruction set than the previous one. Figures are tokens per second by the median
step, and ratios to the set below: medians over rounds, each of which runs all sets once. With `--threads 1` seconds are
CPU seconds, which other programs affect less than the wall clock. The run takes some minutes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from benchmarks.common import report
from benchmarks.common.fleet import make_adapters, quickstart_model, scratch_folder
from benchmarks.engine.distinct_adapters import NAMES, RANK, add_requests, start_engine
from gpu_worker.engine.engine import Engine
from gpu_worker.loading.checkpoint import read_config
from gpu_worker.quantised.quantise import quantised_folder
from lora_kernels import cpu

REQUESTS = (1, 8, 32)
WEIGHTS: dict[str, Literal["int8", "int4"] | None] = {"bf16": None, "Q8_0": "int8", "Q4_0": "int4"}


def step_ms(engine: Engine, digests: list[str], num: int, isas: list[str], rounds: int) -> np.ndarray:
    """Decode `num` requests for the adapters in turn; return ms [rounds, instruction sets]."""
    add_requests(engine, digests, num)
    while len(engine.batcher.running) < num or any(seq.num_pending != 1 for seq in engine.batcher.running):
        engine.step()
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = np.zeros((rounds + 1, len(isas)))
    for one in times:
        for place, isa in enumerate(isas):
            cpu.set_isa(isa)
            started = clock()
            outputs = engine.step()
            one[place] = 1e3 * (clock() - started)
            if error := next((output.error for output in outputs if output.error), None):
                raise error
    engine.hand_over()
    return times[1:]


def main() -> None:
    """Measure, print a table, and save the figures."""
    parser = report.parser(__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    args = parser.parse_args()
    isas = cpu.isas()[::-1]  # the lowest first
    if not isas:
        raise SystemExit("the native operations cannot be built here; the log says why")
    torch.set_num_threads(args.threads)
    machine, model = report.machine(), args.model or quickstart_model()
    rounds = 11 if args.short else 41
    points: list[tuple[str, int, list[float], list[float]]] = []  # case, requests, tokens/s, ratios to the set below
    with scratch_folder() as scratch:
        make_adapters(model, scratch / "adapters", NAMES, [RANK])
        for weights, kind in WEIGHTS.items():
            folder: Path = quantised_folder(model, read_config(model), kind, 8) if kind else model
            engine = start_engine(folder, scratch / "adapters")
            cases = {weights: [""]}
            if kind is None:
                cases |= {"one adapter": NAMES[:1], "an adapter each": NAMES}
                step_ms(engine, NAMES, len(NAMES), isas, 1)  # loads the adapters
            for name, digests in cases.items():
                for num in REQUESTS:
                    times = step_ms(engine, digests, num, isas, rounds)
                    below = np.median(times[:, :-1] / times[:, 1:], axis=0)
                    tokens_s = 1e3 * num / np.median(times, axis=0)
                    points.append((name, num, tokens_s.tolist(), below.tolist()))
                    print(name, num, np.round(tokens_s), np.round(below, 2), flush=True)
    rows = [
        (name, num, *(f"{rate:.0f}" for rate in rates), *(f"{ratio:.2f}" for ratio in ratios))
        for name, num, rates, ratios in points
    ]
    header = ("case", "requests", *(f"{isa}, tok/s" for isa in isas), *(f"{isa} over below" for isa in isas[1:]))
    print(report.table(header, rows))
    found = [
        {"case": name, "requests": num, "tokens_per_s": dict(zip(isas, rates, strict=True)),
         "over_the_set_below": dict(zip(isas[1:], ratios, strict=True))}
        for name, num, rates, ratios in points
    ]  # fmt: skip
    about = {"machine": machine, "threads": args.threads, "rank": RANK, "rounds": rounds, "points": found}
    report.save(args.out / "steps-by-isa", about)


if __name__ == "__main__":
    main()

"""A decode step of 32 requests with 32 adapters of one kind, compared with its floor, for LoRA and other kinds.

    python -m benchmarks.engine.kinds [--model FOLDER] [--short] [--before CHECKOUT]

A floor is the measured step of the base model plus the longer of two times: reading the adapters' numbers at the
measured memory bandwidth, or multiplying and adding each once at the measured fp32 rate. With 32 adapters each number
meets one row. Only `Engine.step` is measured, in its own process with one thread, in CPU time, which other programs
affect least. The groups alternate, and the figure is the lower quartile of whole steps. `--before` also measures the
steps of another checkout, alternately.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

from benchmarks.common import report
from benchmarks.common.checkouts import Checkout, in_turns
from benchmarks.common.fleet import quickstart_model, scratch_folder
from benchmarks.common.kinds import IA3, LORA, OFT, ROAD, Groups, make_kinds

NUM_REQUESTS = 32
BASE, FIRST = "base model", "LoRA of rank 16"
GROUPS: Groups = {
    FIRST: [LORA],
    "DoRA of rank 16": [(LoraConfig, {"r": 16, "use_dora": True})],
    "IA3": [IA3],
    "RoAd": [ROAD],
    "OFT, blocks of 32": [OFT],
    "IA3, RoAd, OFT and LoRA": [IA3, ROAD, OFT, LORA],
}

STEPS = """
import json, sys, time
from pathlib import Path
import numpy as np
import torch
torch.set_num_threads(1)
from benchmarks.engine.distinct_adapters import add_requests, start_engine
torch.manual_seed(0)
engine = start_engine(Path(sys.argv[1]), Path(sys.argv[2]), max_num_seqs=32)


def steps(digests, num_steps):
    add_requests(engine, digests, len(digests))
    times = []
    while len(times) < num_steps:
        running = engine.batcher.running
        decodes = len(running) == len(digests) and all(seq.num_pending == 1 for seq in running)
        started = time.process_time()
        outputs = engine.step()
        if decodes:
            times.append(1e3 * (time.process_time() - started))
        elif not outputs:
            time.sleep(0.002)
        for output in outputs:
            if output.error:
                raise output.error
    engine.hand_over()
    return times


def extra_numbers(digest):
    # of an adapter's extras, those that a step reads
    extras, found = engine.adapters.extras.get(digest), 0
    for part in extras.linear.values() if extras else ():
        changes = [change for change in (part.inputs, part.outputs) if change is not None]
        own = [number for change in changes for number in (change.scale, change.across, change.blocks)]
        own += [part.lora_bias, None if part.dora is None else part.dora.factor]
        found += sum(number.numel() for number in own if number is not None)
    return found


for line in sys.stdin:
    digests, num_steps, wants_numbers = json.loads(line)
    times = steps(digests, num_steps)
    print(json.dumps([extra_numbers(name) for name in digests] if wants_numbers else times), flush=True)
"""
"""Program of a checkout's process: it reads lines with the adapters of requests and a number of steps, and writes the
steps' times, or the count of fp32 numbers besides rank rows of each adapter."""


def lora_numbers(adapters: Path, name: str) -> int:
    """Return the count of numbers in an adapter's rank rows; 0 for a kind without any."""
    from safetensors import safe_open

    with safe_open(adapters / name / "adapter_model.safetensors", "pt") as file:
        return sum(file.get_tensor(key).numel() for key in file.keys() if "lora_A" in key or "lora_B" in key)  # noqa: SIM118


def speeds() -> tuple[float, float]:
    """Return one thread's memory read bandwidth in GB/s, and its fp32 multiply-add rate in 10⁹/s."""
    large, small = torch.randn(1 << 26), torch.randn(256, 256)
    read_s = _least_s(lambda: large.sum(), 8)
    return large.nbytes / read_s / 1e9, 256**3 / _least_s(lambda: small @ small, 50) / 1e9


def _least_s(run: Any, repetitions: int) -> float:
    times: list[float] = []
    for _ in range(repetitions):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return min(times)


def floor_ms(base_ms: float, rank_numbers: int, extra_numbers: int, gb_s: float, products: float) -> float:
    """Return the floor of a step. rank_numbers: in bf16. extra_numbers: in fp32. gb_s, products: see `speeds`."""
    read_ms = (2 * rank_numbers + 4 * extra_numbers) / gb_s / 1e6
    return base_ms + max(read_ms, (rank_numbers + extra_numbers) / products / 1e6)


def main() -> None:
    """Measure, print a table, and save the figures."""
    parser = report.parser(__doc__)
    parser.add_argument("--before", type=Path, help="another checkout, whose steps are measured beside this one's")
    args = parser.parse_args()
    machine, model = report.machine(), args.model or quickstart_model()
    rounds, num_steps = (4, 20) if args.short else (8, 40)
    torch.set_num_threads(1)
    with scratch_folder() as scratch:
        adapters = scratch / "adapters"
        groups = make_kinds(model, adapters, GROUPS, NUM_REQUESTS)
        folders = {"now": Path.cwd(), **({"before": args.before} if args.before else {})}
        checkouts = {
            label: Checkout(folder, STEPS, model, adapters, OMP_NUM_THREADS="1") for label, folder in folders.items()
        }
        numbers = {name: checkouts["now"].ask(own, 2, True) for name, own in groups.items()}
        rank_numbers = {name: sum(lora_numbers(adapters, one) for one in own) for name, own in groups.items()}
        cases = {BASE: [""] * NUM_REQUESTS, **groups}
        times = in_turns(checkouts, {name: (digests, num_steps, False) for name, digests in cases.items()}, rounds)
    gb_s, products = speeds()
    steps = {name: {label: float(np.quantile(ms, 0.25)) for label, ms in by.items()} for name, by in times.items()}
    base_ms, lora_ms = steps[BASE]["now"], steps[FIRST]["now"]
    floors = {
        name: floor_ms(base_ms, rank_numbers[name], sum(own), gb_s, products) for name, own in numbers.items()
    }  # fmt: skip
    figures = {
        "step_ms": steps, "floor_ms": floors, "memory_gb_s": gb_s, "products_g_s": products,
        "extra_numbers": {name: sum(own) for name, own in numbers.items()}, "rank_numbers": rank_numbers,
    }  # fmt: skip
    about = {"machine": machine, "requests": NUM_REQUESTS, "steps_each": rounds * num_steps}
    report.save(args.out / "kinds-engine", {**about, **figures})
    labels = sorted(folders)
    rows: list[tuple[str, ...]] = []
    for name, by in steps.items():
        floor = (f"{floors[name]:.1f}", f"{by['now'] / floors[name]:.2f}") if name in floors else ("", "")
        rows.append((name, *(f"{by[label]:.1f}" for label in labels), f"{lora_ms / by['now']:.2f}", *floor))
    header = (
        "32 requests of",
        *(f"{label}, ms" for label in labels),
        "LoRA's step ÷ this",
        "floor, ms",
        "step ÷ floor",
    )
    print(report.table(header, rows))
    print(f"one thread: {gb_s:.1f} GB/s, {products:.1f} · 10⁹ products/s; processor's time, lower quartile")


if __name__ == "__main__":
    main()

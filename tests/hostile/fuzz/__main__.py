"""Try many cases of every fuzzing target, and report the outcomes: `make fuzz`."""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from hostile.fuzz.engine import Result
from hostile.fuzz.targets import TARGETS, run_named, shares

from chaos.report import machine

SHOWN = 4
"""Number of outcomes that the report lists per target: the most frequent ones."""


def main() -> int:
    """Run the command line. The exit code is 1 if a case crashed."""
    parser = argparse.ArgumentParser(prog="python -m hostile.fuzz", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--cases", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32), help="default: a new one")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="targets at a time")
    parser.add_argument("--only", default="", help="part of the names of the targets to try")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz/report.md"), help="file for the report")
    args = parser.parse_args()
    print(f"--seed {args.seed}", flush=True)
    chosen = [target.name for target in TARGETS if args.only in target.name]
    nums = shares(chosen, args.cases)
    context = multiprocessing.get_context("spawn")  # each target's services need their own process
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        running = [pool.submit(run_named, name, nums[name], args.seed) for name in chosen]
        results = [future.result() for future in running]
    report = as_markdown(results, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(report)
    print(report)
    return 1 if any(result.crash for result in results) else 0


def as_markdown(results: Sequence[Result], seed: int) -> str:
    """Return the report."""
    num_cases, num_crashes = sum(result.num_cases for result in results), sum(bool(result.crash) for result in results)
    lines = [
        f"`python -m hostile.fuzz --seed {seed}` on {machine()}, {datetime.date.today()}: {num_cases:,} cases of "
        f"{len(results)} targets in {sum(result.seconds for result in results) / 60:.0f} min of all processes. "
        f"**Crashes: {num_crashes}.**",
        "",
        "| target | cases | seconds | slowest case, s | most CPU, ms | crashes | outcomes | most frequent |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *map(_row, results),
        *(f"\n```\n{result.crash}\n```" for result in results if result.crash),
    ]
    return "\n".join(lines) + "\n"


def _row(result: Result) -> str:
    shown = "; ".join(f"{num:,} × {outcome}" for outcome, num in result.outcomes.most_common(SHOWN))
    cells = [
        result.target,
        f"{result.num_cases:,}",
        f"{result.seconds:.0f}",
        f"{result.slowest_s:.2f}",
        f"{1000 * result.most_cpu_s:.0f}",
    ]
    cells += [str(int(bool(result.crash))), str(len(result.outcomes)), shown.replace("|", "\\|")]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())

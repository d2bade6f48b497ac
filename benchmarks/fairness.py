"""What a flood does to quiet tenants, and how evenly backlogged tenants share a worker.

    python -m benchmarks.fairness [--model FOLDER] [--short]

One worker; without API keys each adapter is a tenant. Twenty quiet tenants together send about a sixth of the requests
that the worker can do, at Poisson times, in turns alone and beside a tenant that always has 200 requests in flight.
Then eight equal tenants have sixteen in flight each: Jain's index of prompt + 2 x output tokens (as the scheduler
counts them) in the middle of that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.common import report
from benchmarks.common.fleet import Setup, fleet, make_adapters, quickstart_model, scratch_folder
from benchmarks.neighbours import run_beside
from lorafleet.bench import BenchConfig, BenchResult, Target, run_bench
from scheduler.simulation.run import jain

QUIET = [f"quiet-{index}" for index in range(20)]
EQUALS = QUIET[:8]
FLOOD = "flood"
NUM_FLOOD = 200
RANK = 16
OUTPUT_WEIGHT = 2  # of an output token, beside a prompt's


def load(url: str, names: Sequence[str], **fields: Any) -> BenchConfig:
    """Return a load of these adapters, 64 words in and 64 tokens out."""
    targets = tuple(Target.model(name) for name in names)
    return BenchConfig(url=url, targets=targets, prompt_words=64, output_tokens=64, **fields)


def attained(result: BenchResult, names: Sequence[str]) -> list[float]:
    """Return the tokens each tenant got in the middle half of a run, a request's output spread over its chunks."""
    start = min(record.start_s for record in result.records)
    low, high = start + 0.25 * result.wall_s, start + 0.75 * result.wall_s
    tokens: defaultdict[str, float] = defaultdict(float)
    for record in result.records:
        times = np.array(record.arrivals_s)
        inside = np.count_nonzero((times >= low) & (times < high))
        tokens[record.target] += OUTPUT_WEIGHT * record.output_tokens * int(inside) / max(len(times), 1)
        tokens[record.target] += record.prompt_tokens * bool(len(times) and low <= times[0] < high)
    return [float(tokens[name]) for name in names]


def draw(axes: Sequence[Any], ttft_ms: dict[str, np.ndarray], shares: Sequence[float]) -> None:
    """Fill one panel with the quiet tenants' times to first token, one with the equals' shares of the tokens."""
    for color, (name, values) in zip((report.GREEN, report.ORANGE), ttft_ms.items(), strict=True):
        axes[0].plot(np.sort(values), np.linspace(0, 100, len(values)), color=color, label=name)
    axes[0].set(title="twenty quiet tenants", xlabel="time to first token, ms", ylabel="% of requests")
    axes[0].legend()
    axes[1].bar(range(len(shares)), np.array(shares) / np.mean(shares), color=report.BLUE)
    axes[1].set(title="eight backlogged equals", ylabel="tokens ÷ mean", xlabel="tenant")


def main() -> None:
    """Measure a flood beside quiet tenants, and write the result."""
    args = report.parser(__doc__).parse_args()
    machine, model = report.machine(), args.model or quickstart_model()
    rounds, per_round = (1, 40) if args.short else (2, 128)
    ttft: dict[str, list[float]] = {"alone": [], "beside the flood": []}
    num_flood = 0
    with scratch_folder() as scratch:
        adapters = scratch / "adapters"
        make_adapters(model, adapters, [*QUIET, FLOOD], [RANK])
        with fleet(Setup(model, adapters, scratch)) as running:
            run_bench(load(running.url, [*QUIET, FLOOD], num_requests=42, concurrency=21))  # loads the adapters
            full = run_bench(load(running.url, QUIET, num_requests=96, concurrency=32, seed=1))
            rate = full.summary.requests_per_s / 6
            for turn in range(rounds):
                for name, values in ttft.items():
                    quiet = load(
                        running.url, QUIET, num_requests=per_round, concurrency=per_round, rate_per_s=rate, seed=turn
                    )
                    flood = load(running.url, [FLOOD], num_requests=100_000, concurrency=NUM_FLOOD, seed=turn)
                    beside = run_beside(quiet, None if name == "alone" else flood)
                    values += [1e3 * (record.arrivals_s[0] - record.start_s) for record in beside.measured.records]
                    num_flood += len(beside.others)
                    if name != "alone":
                        run_bench(load(running.url, QUIET, num_requests=1, concurrency=1))
            equals = load(running.url, EQUALS, num_requests=(2 if args.short else 3) * 128, concurrency=128)
            shares = attained(run_bench(equals), EQUALS)
    pooled = {name: np.array(values) for name, values in ttft.items()}
    figures = {name: {f"p{q}_ms": float(np.percentile(v, q)) for q in (50, 90, 99)} for name, v in pooled.items()}
    ratio = figures["beside the flood"]["p99_ms"] / figures["alone"]["p99_ms"]
    rows = [(name, len(pooled[name]), *(f"{value:.0f}" for value in row.values())) for name, row in figures.items()]
    print(report.table(("quiet tenants", "requests", "TTFT p50, ms", "p90", "p99"), rows))
    print(f"p99 beside the flood ÷ alone: {ratio:.2f} (wanted: 2 or less); the flood had {num_flood} answers meanwhile")
    print(f"Jain index of eight backlogged equals: {jain(shares):.4f} (wanted: 0.95 or more)")
    saved = {
        "machine": machine, "rate_per_s": rate, "figures": figures, "p99_ratio": ratio, "flood_answers": num_flood,
        "attained": shares, "jain": jain(shares),
    }  # fmt: skip
    report.save(args.out / "fairness", saved, 2, lambda axes: draw(axes, pooled, shares))


if __name__ == "__main__":
    main()

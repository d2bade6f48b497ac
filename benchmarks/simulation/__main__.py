"""Compare scheduling policies on a simulated fleet: throughput, waits, adapter loads and fairness.

    python -m benchmarks.simulation --rate 12 --workers 4 16 64

It runs the scheduler's own code with workers in virtual time, so a minute of load takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common import report
from benchmarks.simulation.load import SyntheticLoad, adapters, generate
from benchmarks.simulation.policies import POLICIES, make_dispatcher
from benchmarks.simulation.run import Arrival, Simulation, jain
from benchmarks.simulation.worker import WorkerModel
from scheduler.config import SchedulerConfig
from scheduler.placement import AdapterFacts

MEAN_ADAPTER_BYTES = 37_500_000
"""Mean size of the adapters of `load.adapters`."""

MODEL = WorkerModel(pool_bytes=32 * MEAN_ADAPTER_BYTES, host_bytes=200 * MEAN_ADAPTER_BYTES)


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one policy with one number of workers. Times are virtual."""

    policy: str
    workers: int
    requests: int
    seconds: float
    requests_per_s: float
    output_tokens_per_s: float
    first_token_p50_ms: float
    first_token_p90_ms: float
    first_token_p99_ms: float
    adapter_loads: int
    adapter_fetches: int
    busy: float
    jain: float


HEADINGS = ("policy", "workers", "requests", "s", "req/s", "tok/s", "TTFT p50 ms", "p90", "p99", "loads", "fetches",
            "busy", "Jain")  # fmt: skip
"""Column headings of the fields of `Row`."""


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate each policy with each number of workers, and print a table."""
    parser = report.parser(__doc__, without=("model", "short", "out"))
    parser.add_argument("--rate", type=float, default=10.0, help="requests per second and worker (%(default)g)")
    parser.add_argument("--seconds", type=float, default=60.0, help="time in which requests arrive (%(default)g)")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[4, 16, 64], help="numbers of workers to compare (%(default)s)"
    )
    parser.add_argument(
        "--policies", nargs="+", choices=POLICIES, default=POLICIES, help="policies to compare (%(default)s)"
    )
    parser.add_argument("--json", type=Path, help="file to write the figures to as JSON")
    args = parser.parse_args(argv)
    rows: list[Row] = []
    for num_workers in args.workers:
        load = SyntheticLoad(rate=args.rate * num_workers, seconds=args.seconds)
        trace, facts = list(generate(load)), adapters(load.num_adapters, load.seed)
        rows += [simulate(policy, trace, facts, num_workers) for policy in args.policies]
    print(report.table(HEADINGS, [[_text(value) for value in asdict(row).values()] for row in rows]))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def simulate(policy: str, trace: Sequence[Arrival], facts: dict[str, AdapterFacts], num_workers: int) -> Row:
    """Run one policy over a trace. Jain's index is computed from the tenants' tokens up to the last arrival."""
    dispatcher = make_dispatcher(policy, SchedulerConfig(), facts)
    outcome = Simulation(dispatcher, MODEL, num_workers, facts).run(trace)
    seconds = outcome.end_ms / 1000
    return Row(
        policy=policy,
        workers=num_workers,
        requests=len(outcome.requests),
        seconds=seconds,
        requests_per_s=len(outcome.requests) / max(seconds, 1e-9),
        output_tokens_per_s=outcome.output_tokens_per_s,
        first_token_p50_ms=outcome.first_token_ms(0.5),
        first_token_p90_ms=outcome.first_token_ms(0.9),
        first_token_p99_ms=outcome.first_token_ms(0.99),
        adapter_loads=outcome.num_loads,
        adapter_fetches=outcome.num_fetches,
        busy=outcome.busy,
        jain=jain(list(outcome.attained(0.0, trace[-1].at_ms).values())) if trace else 1.0,
    )


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if value < 10 else f"{value:,.0f}"
    return str(value)


if __name__ == "__main__":
    main()

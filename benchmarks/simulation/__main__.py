"""Compare scheduling policies on a simulated fleet: throughput, waits, adapter loads and fairness.

    python -m benchmarks.simulation --rate 12 --workers 4 16 64      # --help lists all options

It runs the scheduler's own code with workers in virtual time, so a minute of load takes seconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common import report
from benchmarks.simulation.load import SyntheticLoad, adapters, generate
from benchmarks.simulation.policies import POLICIES, make_dispatcher
from benchmarks.simulation.run import Arrival, Simulation, jain
from benchmarks.simulation.worker import SMALL_GPU_STEP, WorkerModel
from protocol.wire import messages as m
from scheduler.config import SchedulerConfig
from scheduler.placement import AdapterFacts, Bandwidths

MEAN_ADAPTER_BYTES = 37_500_000
"""Mean size of the adapters of `load.adapters`."""


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


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    parser = report.parser(__doc__, without=("model", "short", "out"))
    load = parser.add_argument_group("load")
    load.add_argument("--rate", type=float, default=10.0, help="requests per second and worker (%(default)g)")
    load.add_argument("--seconds", type=float, default=60.0, help="time in which requests arrive (%(default)g)")
    load.add_argument(
        "--adapters", type=int, default=1000, help="number of adapters; 0: only the base model (%(default)s)"
    )
    load.add_argument("--zipf", type=float, default=1.0, help="popularity of the i-th adapter ~ 1/i^S (%(default)g)")
    load.add_argument("--tenants", type=int, default=8, help="number of tenants; 0: each adapter is one (%(default)s)")
    load.add_argument("--prompt-tokens", type=int, default=256, help="mean length of prompts (%(default)s)")
    load.add_argument("--output-tokens", type=int, default=128, help="mean length of outputs (%(default)s)")
    load.add_argument("--seed", type=int, default=0)
    fleet = parser.add_argument_group("fleet")
    fleet.add_argument(
        "--workers", type=int, nargs="+", default=[4, 16, 64], help="numbers of workers to compare (%(default)s)"
    )
    fleet.add_argument("--capacity", type=int, default=64, help="requests a worker runs at once (%(default)s)")
    fleet.add_argument("--step-tokens", type=int, default=2048, help="most tokens of a step (%(default)s)")
    fleet.add_argument(
        "--step-model",
        type=float,
        nargs=4,
        default=[getattr(SMALL_GPU_STEP, term) for term in "abcd"],
        metavar=("A", "B", "C", "D"),
        help="seconds of a step = A + B tokens + C KV tokens + D ranks, as beats report it (%(default)s)",
    )
    fleet.add_argument(
        "--pool-adapters", type=int, default=32, help="adapters of mean size in a worker's pool (%(default)s)"
    )
    fleet.add_argument(
        "--host-adapters", type=int, default=200, help="adapters of mean size in its host cache (%(default)s)"
    )
    fleet.add_argument(
        "--host-mb-s", type=float, default=2000.0, help="MB/s from the host cache to the pool (%(default)g)"
    )
    fleet.add_argument(
        "--remote-mb-s", type=float, default=200.0, help="MB/s from the store to the host cache (%(default)g)"
    )
    fleet.add_argument("--way-ms", type=float, default=0.0, help="time of a request beside its steps (%(default)g)")
    parser.add_argument(
        "--policies", nargs="+", choices=POLICIES, default=POLICIES, help="policies to compare (%(default)s)"
    )
    parser.add_argument(
        "--slack",
        type=float,
        default=4096.0,
        help="weighted tokens that others may receive before a held request must be placed (%(default)g)",
    )
    parser.add_argument("--json", type=Path, help="file to write the figures to as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate each policy with each number of workers, and print a table."""
    args = arguments().parse_args(argv)
    model = _worker_model(args)
    rows: list[Row] = []
    for num_workers in args.workers:
        load = SyntheticLoad(
            rate=args.rate * num_workers, seconds=args.seconds, num_adapters=args.adapters, zipf=args.zipf,
            num_tenants=args.tenants, prompt_tokens=args.prompt_tokens, output_tokens=args.output_tokens,
            seed=args.seed,
        )  # fmt: skip
        trace, facts = list(generate(load)), adapters(args.adapters, args.seed)
        rows += [simulate(policy, trace, facts, model, num_workers, args.slack) for policy in args.policies]
    print(report.table(HEADINGS, [[_text(value) for value in asdict(row).values()] for row in rows]))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def simulate(
    policy: str,
    trace: Sequence[Arrival],
    facts: dict[str, AdapterFacts],
    model: WorkerModel,
    num_workers: int,
    slack_tokens: float,
) -> Row:
    """Run one policy over a trace. Jain's index is computed from the tenants' tokens up to the last arrival."""
    dispatcher = make_dispatcher(policy, SchedulerConfig(slack_tokens=slack_tokens), facts)
    outcome = Simulation(dispatcher, model, num_workers, facts).run(trace)
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


def _worker_model(args: argparse.Namespace) -> WorkerModel:
    return WorkerModel(
        capacity=args.capacity,
        max_step_tokens=args.step_tokens,
        step=m.StepModel(*args.step_model),
        pool_bytes=args.pool_adapters * MEAN_ADAPTER_BYTES,
        host_bytes=args.host_adapters * MEAN_ADAPTER_BYTES,
        bandwidths=Bandwidths(host=args.host_mb_s * 1000, remote=args.remote_mb_s * 1000),
        way_ms=args.way_ms,
    )


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if value < 10 else f"{value:,.0f}"
    return str(value)


if __name__ == "__main__":
    main()

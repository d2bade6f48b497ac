"""Far more adapters than fit into the pool, on a machine whose cores are all busy.

    python -m benchmarks.fleet.churn [--model FOLDER] [--short] [--rounds N] [--kernels avx512_vnni]

There are 160 adapters of rank 8 on all linear layers with Zipf popularity 1.0, a pool for 32 of them, 32 requests in
flight, 64 words in and 64 tokens out. On one fleet this load alternates with one adapter under the same load, and with
160 new adapters, all of which have to be fetched. The targets are a median TTFT within 3 x of one adapter's, and 0.9 of
its throughput.

Without API keys each adapter is a tenant, and the most popular one has more than its share.

No two measurements share a prompt: adapters of earlier ones would have it in the prefix cache, and new ones would not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import get_args

from benchmarks.common import report
from benchmarks.common.fleet import (
    RunningFleet,
    Setup,
    cpu_s,
    fleet,
    make_adapters,
    quickstart_model,
    scratch_folder,
)
from benchmarks.fleet.adapters import CONCURRENCY, Point, markdown, measure
from benchmarks.fleet.hit_rate import pool_bytes
from gpu_worker.engine.step_model import Phase
from protocol.wire.messages import WorkerCounters

NUM_ADAPTERS, NUM_IN_POOL, ZIPF, RANKS = 160, 32, 1.0, (8,)


LOADS = ("one adapter", "known adapters", "new adapters")
"""The loads of a turn, in this order."""


def ratios(points: Sequence[Point]) -> dict[str, dict[str, float]]:
    """Return the figures of many known and of many new adapters, divided by those of one adapter: medians of all turns.

    points: of the loads of `LOADS`, in turn.
    """

    def median(name: str, load: int) -> float:
        return statistics.median(getattr(point, name) for point in points[load :: len(LOADS)])

    names = ("tokens_per_s", "ttft_p50_ms", "inter_token_p50_ms", "inter_token_p99_ms")
    return {LOADS[load]: {name: median(name, load) / median(name, 0) for name in names} for load in (1, 2)}


@dataclass(frozen=True, slots=True)
class Account:
    """The machine's resources that a measurement used, from the heartbeats before and after it."""

    cpu_s: dict[str, float]  # of each service
    num_steps: int
    tokens_per_step: float  # emitted
    computed_per_step: float  # of prompts and outputs
    step_ms: float
    wall_s: float


@contextmanager
def accounted(running: RunningFleet, accounts: list[Account]) -> Iterator[None]:
    """Add the resources that a block uses to `accounts`."""
    before, used, began_s = _counters(running), cpu_s(), time.perf_counter()
    yield
    wall_s, now_used, now = time.perf_counter() - began_s, cpu_s(), _counters(running)
    took = {name: getattr(now, name) - getattr(before, name) for name in WorkerCounters.__struct_fields__}
    steps_s, num = sum(took[f"{phase}_s"] for phase in get_args(Phase)), max(took["num_steps"], 1)
    accounts.append(
        Account(
            cpu_s={name: round(value - used.get(name, 0.0), 2) for name, value in now_used.items()},
            num_steps=took["num_steps"],
            tokens_per_step=round(took["num_output_tokens"] / num, 1),
            computed_per_step=round(took["num_computed_tokens"] / num, 1),
            step_ms=round(1000 * steps_s / num, 1),
            wall_s=round(wall_s, 1),
        )
    )


def _counters(running: RunningFleet) -> WorkerCounters:
    (beat,) = running.beats_of_now()
    return beat.counters


def main() -> None:
    """Measure, print a table, and save the figures."""
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="turns of the three loads (%(default)s)")
    parser.add_argument("--kernels", default="auto", help="instruction set of the workers (%(default)s)")
    args = parser.parse_args()
    machine, model = report.machine(), args.model or quickstart_model()
    num_requests = (2 if args.short else 4) * CONCURRENCY
    names = [f"adapter-{index}" for index in range(NUM_ADAPTERS)]
    new = [[f"new-{turn}-{index}" for index in range(NUM_ADAPTERS)] for turn in range(args.rounds)]
    points: list[Point] = []
    accounts: list[Account] = []
    with scratch_folder() as scratch:
        make_adapters(model, scratch / "adapters", [*names, *(name for turn in new for name in turn)], RANKS)
        flags = [f"--adapter-pool-bytes={pool_bytes(model, NUM_IN_POOL, 2)}", f"--kernels={args.kernels}"]
        with fleet(Setup(model, scratch / "adapters", scratch, flags)) as running:
            # The first requests to a fleet are slower than all later ones.
            measure(running, names[:1], ZIPF, num_requests, seed=len(LOADS) * args.rounds)
            for turn in range(args.rounds):
                for own in (names[:1], names, new[turn]):
                    fills, seed, account = own is not new[turn], len(points), accounted(running, accounts)
                    points.append(measure(running, own, ZIPF, num_requests, fill_pool=fills, seed=seed, beside=account))
                    print(points[-1], accounts[-1], sep="\n", flush=True)
    results = {
        "machine": machine, "kernels": args.kernels, "in_pool": NUM_IN_POOL, "ratios": ratios(points),
        "points": [asdict(point) for point in points], "accounts": [asdict(account) for account in accounts],
    }  # fmt: skip
    report.save(args.out / "churn", results)
    print(markdown(points))
    for load, found in ratios(points).items():
        print(f"{load} ÷ one: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))


if __name__ == "__main__":
    main()

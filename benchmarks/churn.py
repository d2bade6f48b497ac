"""Many more adapters than fit into the pool, on a machine whose cores are all busy.

    python -m benchmarks.churn [--model FOLDER] [--short] [--rounds N]

160 adapters of rank 8 on all linear layers, asked for by Zipf 1.0, a pool for 32 of them, 32 requests in flight, 64
words in and 64 tokens out; in turns with one adapter under the same load, on one fleet. Wanted: the median first token
within 3 x of one adapter's, and 0.9 of its throughput.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.adapters import CONCURRENCY, Point, markdown, measure
from benchmarks.common import report
from benchmarks.common.fleet import Setup, fleet, make_adapters, quickstart_model, scratch_folder
from benchmarks.hit_rate import pool_bytes

NUM_ADAPTERS, NUM_IN_POOL, ZIPF, RANKS = 160, 32, 1.0, (8,)


def ratios(points: Sequence[Point]) -> dict[str, float]:
    """Return the figures of many adapters divided by those of one, medians of all turns."""

    def median(name: str, num: int) -> float:
        return statistics.median(getattr(point, name) for point in points if point.num_adapters == num)

    names = ("tokens_per_s", "ttft_p50_ms", "inter_token_p50_ms", "inter_token_p99_ms")
    return {name: median(name, NUM_ADAPTERS) / median(name, 1) for name in names}


def draw(axes: Sequence[Any], points: Sequence[Point]) -> None:
    """Draw throughput and time to first token of each turn, in two panels."""
    colors = {1: report.BLUE, NUM_ADAPTERS: report.ORANGE}
    for axis, name in zip(axes, ("tokens_per_s", "ttft_p50_ms"), strict=True):
        for place, point in enumerate(points):
            axis.bar(place, getattr(point, name), color=colors[point.num_adapters])
        axis.set(title=name, xlabel=f"turns: one adapter, {NUM_ADAPTERS} adapters")


def main() -> None:
    """Measure, print a table, and save the figures and a plot."""
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each of the two loads (%(default)s)")
    args = parser.parse_args()
    machine, model = report.machine(), args.model or quickstart_model()
    num_requests = (2 if args.short else 4) * CONCURRENCY
    names = [f"adapter-{index}" for index in range(NUM_ADAPTERS)]
    points: list[Point] = []
    with scratch_folder() as scratch:
        make_adapters(model, scratch / "adapters", names, RANKS)
        flags = [f"--adapter-pool-bytes={pool_bytes(model, NUM_IN_POOL, 2)}"]
        with fleet(Setup(model, scratch / "adapters", scratch, flags)) as running:
            for _ in range(args.rounds):
                for own in (names[:1], names):
                    points.append(measure(running, own, ZIPF, num_requests))
                    print(points[-1], flush=True)
    about = {"machine": machine, "in_pool": NUM_IN_POOL, "ratios": ratios(points)}
    results = about | {"points": [asdict(point) for point in points]}
    report.save(args.out / "churn", results, 2, lambda axes: draw(axes, points))
    print(markdown(points))
    print("many ÷ one: " + ", ".join(f"{name} {value:.2f}" for name, value in ratios(points).items()))


if __name__ == "__main__":
    main()

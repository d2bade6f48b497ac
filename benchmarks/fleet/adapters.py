"""The effect of the number of adapters, from 1 to 1,000, and of their popularity on one fleet.

    python -m benchmarks.fleet.adapters [--model FOLDER] [--short]

The adapters have rank 8 and 16 on all linear layers and are requested with Zipf popularity (0: all equally), with 32
requests in flight, 64 words in and 64 tokens out. The pool is smaller than the larger sets of adapters. The hit rate is
the share of requests that needed no copy into the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.common import report
from benchmarks.common.fleet import RunningFleet, Setup, fleet, make_adapters, quickstart_model, scratch_folder
from lorafleet.bench import BenchConfig, BenchTarget, run_bench

COUNTS = (1, 4, 16, 64, 256, 1000)
ZIPFS = (0.0, 0.9, 1.2)
RANKS = (8, 16)
POOL_BYTES = 1 << 30
CONCURRENCY = 32


@dataclass(frozen=True, slots=True)
class Point:
    """The figures for one number of adapters with one popularity."""

    num_adapters: int
    zipf: float
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    inter_token_p50_ms: float
    inter_token_p99_ms: float
    hit_rate: float
    num_loads: int  # copies into the pool
    num_fetches: int  # copies that needed a fetch from the store
    num_requests: int
    num_errors: int


def measure(
    running: RunningFleet, names: Sequence[str], zipf: float, num_requests: int, *, fill_pool: bool = True,
    seed: int = 0, beside: AbstractContextManager[object] | None = None,
) -> Point:  # fmt: skip
    """Measure one load. fill_pool: first run an unmeasured load that fills the pool, with the same popularity.

    seed: determines the prompts and their order. Loads with the same seed share prompts, so that an adapter finds them
    in the prefix cache the second time. beside: entered around the measured load only.
    """
    targets = tuple(BenchTarget.model(name) for name in names)
    shared: dict[str, Any] = {"url": running.url, "targets": targets, "concurrency": CONCURRENCY, "zipf_s": zipf}
    if fill_pool:
        fill: dict[str, Any] = {"num_requests": min(2 * len(names), 512), "output_tokens": 2, "prompt_words": 4}
        run_bench(BenchConfig(**shared, **fill, seed=1000 + seed))
    loads, fetches = running.num_loads()
    with beside or nullcontext():
        result = run_bench(BenchConfig(**shared, num_requests=num_requests, seed=seed))
    num_loads, num_fetches = (now - before for now, before in zip(running.num_loads(), (loads, fetches), strict=True))
    summary = result.summary
    for text, count in result.errors.items():
        print(f"  {count} × {text}", flush=True)
    return Point(
        num_adapters=len(names),
        zipf=zipf,
        tokens_per_s=summary.output_tokens_per_s,
        ttft_p50_ms=summary.ttft.p50_ms,
        ttft_p99_ms=summary.ttft.p99_ms,
        inter_token_p50_ms=summary.inter_token.p50_ms,
        inter_token_p99_ms=summary.inter_token.p99_ms,
        hit_rate=1 - num_loads / num_requests,
        num_loads=num_loads,
        num_fetches=num_fetches,
        num_requests=num_requests,
        num_errors=summary.num_errors,
    )


def draw(axes: Sequence[Any], points: Sequence[Point]) -> None:
    """Draw throughput, time to first token and hit rate over the number of adapters, in three panels."""
    colors = dict(zip(ZIPFS, (report.BLUE, report.ORANGE, report.GREEN), strict=True))
    for zipf in dict.fromkeys(point.zipf for point in points):
        mine = [point for point in points if point.zipf == zipf]
        counts, color, label = [point.num_adapters for point in mine], colors[zipf], f"Zipf {zipf:g}"
        axes[0].plot(counts, [point.tokens_per_s for point in mine], "o-", color=color, label=label)
        axes[1].plot(counts, [point.ttft_p50_ms for point in mine], "o-", color=color, label=f"{label}, p50")
        axes[1].plot(counts, [point.ttft_p99_ms for point in mine], "o--", color=color, label=f"{label}, p99")
        axes[2].plot(counts, [100 * point.hit_rate for point in mine], "o-", color=color, label=label)
    titles = ("output tokens per second", "time to first token, ms", "requests that find their adapter, %")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="adapters", xscale="log")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)


def markdown(points: Sequence[Point]) -> str:
    """Return the points as a Markdown table."""
    latencies = ("TTFT p50 / p99, ms", "inter-token p50 / p99, ms")
    header = ("adapters", "Zipf", "tok/s", *latencies, "hits", "loads", "fetches")
    rows = [
        (
            point.num_adapters, f"{point.zipf:g}", f"{point.tokens_per_s:.0f}",
            f"{point.ttft_p50_ms:.0f} / {point.ttft_p99_ms:.0f}",
            f"{point.inter_token_p50_ms:.1f} / {point.inter_token_p99_ms:.1f}", f"{100 * point.hit_rate:.0f} %",
            point.num_loads, point.num_fetches,
        )
        for point in points
    ]  # fmt: skip
    return report.table(header, rows)


def main() -> None:
    """Measure, print a table, and save the figures and a plot."""
    args = report.parser(__doc__).parse_args()
    machine, model = report.machine(), args.model or quickstart_model()
    counts, zipfs = ((1, 32, 200), (0.9,)) if args.short else (COUNTS, ZIPFS)
    num_requests = 2 * CONCURRENCY if args.short else 8 * CONCURRENCY
    names = [f"adapter-{index}" for index in range(max(counts))]
    points = []
    with scratch_folder() as scratch:
        make_adapters(model, scratch / "adapters", names, RANKS)
        with fleet(Setup(model, scratch / "adapters", scratch, [f"--adapter-pool-bytes={POOL_BYTES}"])) as running:
            for count in counts:
                for zipf in zipfs if count > 1 else zipfs[:1]:
                    points.append(measure(running, names[:count], zipf, num_requests, seed=len(points)))
                    print(points[-1], flush=True)
    about = {"pool_bytes": POOL_BYTES, "ranks": RANKS, "concurrency": CONCURRENCY}
    results = {"machine": machine, **about, "points": [asdict(point) for point in points]}
    report.save(args.out / "adapters", results)
    report.plot(args.out / "adapters", 3, lambda axes: draw(axes, points))
    print(markdown(points))


if __name__ == "__main__":
    main()

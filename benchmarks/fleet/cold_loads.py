"""The delay that loading cold adapters causes in the streams of warm ones.

    python -m benchmarks.fleet.cold_loads [--model FOLDER] [--short] [--sources near,slow] [--rounds N]
        [--pool-adapters N] [--kernels avx512_vnni]

Eight streams of eight resident adapters are measured alternately: alone; during short requests for resident adapters;
and during the same number of requests for adapters that must be loaded first, each requested once. The difference of
the last two is the cost of loading. All is repeated with the store behind a slow link: 200 ms before every answer, then
5 MB/s.

Turns are short and many, and each round begins with another one, because a machine's speed changes from minute to
minute. Ratios are given for the pooled gaps of all rounds, and as medians of the rounds' own ratios.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import report
from benchmarks.common.fleet import (
    RunningFleet,
    Setup,
    adapter_bytes,
    fleet,
    make_adapters,
    quickstart_model,
    scratch_folder,
)
from benchmarks.common.slow_link import Link, slow_link
from benchmarks.fleet.hit_rate import pool_bytes
from benchmarks.fleet.neighbours import Beside, run_beside, streams
from lorafleet.bench import BenchConfig, BenchRequest, BenchTarget
from lorafleet.launcher.machine import claim_port

WARM = [f"warm-{index}" for index in range(8)]
RESIDENT = [f"resident-{index}" for index in range(4)]
RANK = 8
RATE_PER_S = 3.0
COLD_PER_TURN = 40  # adapters reserved for a turn, more than it can request
LATENCY_S, BYTES_PER_S = 0.2, 5e6

ALONE, RESIDENTS, COLD = "alone", "beside resident adapters", "beside cold adapters"


@dataclass(slots=True)
class Case:
    """The pooled measurements of all turns of one case."""

    gaps_ms: list[np.ndarray] = field(default_factory=list)
    others: list[BenchRequest] = field(default_factory=list)
    texts: list[list[tuple[str, str]]] = field(default_factory=list)

    def add(self, run: Beside) -> None:
        """Add the measurements of one turn."""
        self.gaps_ms.append(run.gaps_ms())
        self.others += run.others
        self.texts.append(run.texts())

    @property
    def pooled_ms(self) -> np.ndarray:
        """The inter-token gaps of all turns, ms: float64."""
        return np.concatenate(self.gaps_ms)

    def figures(self) -> dict[str, float]:
        """Return the percentiles of the gaps, and the number and median TTFT of the other requests."""
        quantiles = {f"p{q:g}_ms": float(np.percentile(self.pooled_ms, q)) for q in (50, 90, 99, 99.9)}
        ttft_ms = [1e3 * (record.arrivals_s[0] - record.start_s) for record in self.others if record.arrivals_s]
        others = {"num_others": len(self.others), "others_ttft_p50_ms": float(np.median(ttft_ms)) if ttft_ms else 0.0}
        return {**quantiles, "max_ms": float(self.pooled_ms.max()), **others}

    def p99_ratios(self, other: Case) -> tuple[float, float]:
        """Return this case's p99 divided by another's: pooled over all turns, and the median over rounds."""
        rounds = zip(self.gaps_ms, other.gaps_ms, strict=True)
        ratios = [np.percentile(mine, 99) / np.percentile(its, 99) for mine, its in rounds]
        return float(np.percentile(self.pooled_ms, 99) / np.percentile(other.pooled_ms, 99)), float(np.median(ratios))


def short_requests(url: str, names: Sequence[str]) -> BenchConfig:
    """Return a load for `names` in turn, with requests so short that their own cost is negligible."""
    targets = tuple(BenchTarget.model(name) for name in names)
    return BenchConfig(
        url=url, targets=targets, rate_per_s=RATE_PER_S, num_requests=COLD_PER_TURN, concurrency=COLD_PER_TURN,
        prompt_words=4, output_tokens=2,
    )  # fmt: skip


def take_turns(
    running: RunningFleet, fill: Sequence[str], cold: Iterator[str], rounds: int, output_tokens: int
) -> dict[str, Case]:
    """Measure the three cases alternately on one fleet."""
    run_beside(streams(running.url, [*fill, *WARM, *RESIDENT], 8), None)  # loads the adapters
    cases = {name: Case() for name in (ALONE, RESIDENTS, COLD)}
    for index in range(rounds):
        names = {RESIDENTS: RESIDENT, COLD: list(islice(cold, COLD_PER_TURN))}
        order = list(cases)
        first = index % len(order)
        for name in order[first:] + order[:first]:
            case, others = cases[name], short_requests(running.url, names[name]) if name in names else None
            case.add(run_beside(streams(running.url, WARM, output_tokens), others))
            print(f"  {name}: {case.figures()}", flush=True)
    return cases


def identical(cases: dict[str, Case]) -> bool:
    """Return whether the warm streams produced the same texts in every turn."""
    texts = [turn for case in cases.values() for turn in case.texts]
    return all(turn == texts[0] for turn in texts)


def run_source(slow: bool, args: Any, model: Path, adapters: Path, cold: Iterator[str]) -> dict[str, Case]:
    """Start a fleet whose store is local or behind a slow link, and measure the cases on it."""
    rounds, output_tokens = (3 if args.short else args.rounds), 300
    with ExitStack() as stack:
        scratch = stack.enter_context(scratch_folder())
        flags, environment = [f"--kernels={args.kernels}"], {}
        if args.pool_adapters:
            flags.append(f"--adapter-pool-bytes={pool_bytes(model, args.pool_adapters, 2)}")
        if slow:
            port = claim_port("127.0.0.1", 0)
            link = stack.enter_context(slow_link(Link(port, LATENCY_S, BYTES_PER_S)))
            flags.append(f"--store-port={port}")
            environment = {"LORAFLEET_STORE_URL": f"http://127.0.0.1:{link}"}
        running = stack.enter_context(fleet(Setup(model, adapters, scratch, flags, environment)))
        return take_turns(running, fill_names(args), cold, rounds, output_tokens)


def fill_names(args: Any) -> list[str]:
    """Return the names of the adapters that, with the warm ones, fill a small pool."""
    return [f"fill-{index}" for index in range(args.pool_adapters - len(WARM) - len(RESIDENT))]


def markdown(sources: dict[str, dict[str, Case]]) -> str:
    """Return the figures of all sources as a Markdown table."""
    rows = []
    for source, cases in sources.items():
        figures = {name: case.figures() for name, case in cases.items()}
        for name, row in figures.items():
            quantiles = [f"{row[key]:.1f}" for key in ("p50_ms", "p99_ms", "p99.9_ms", "max_ms")]
            ratios = ["{:.2f}, {:.2f}".format(*cases[name].p99_ratios(cases[other])) for other in (ALONE, RESIDENTS)]
            others = f"{row['num_others']}, {row['others_ttft_p50_ms']:.0f}" if row["num_others"] else ""
            rows.append((source, name, *quantiles, *ratios, others))
    header = ("source", "warm streams", "p50, ms", "p99", "p99.9", "max", "p99 ÷ alone: all, median")
    return report.table((*header, "÷ beside resident", "others: number, TTFT p50 ms"), rows)


def main() -> None:
    """Measure, print a table, and save the figures."""
    parser = report.parser(__doc__)
    parser.add_argument("--sources", default="near,slow", help="near, slow, or both (%(default)s)")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each case (%(default)s)")
    parser.add_argument("--kernels", default="auto", help="instruction set of the workers (%(default)s)")
    parser.add_argument(
        "--pool-adapters", type=int, default=0,
        help="adapters that fit the pool, which is then full; 0: the default pool, whose memory is untouched at first",
    )  # fmt: skip
    args = parser.parse_args()
    machine, model = report.machine(), args.model or quickstart_model()
    kinds = args.sources.split(",")
    num_cold = COLD_PER_TURN * (3 if args.short else args.rounds)
    with scratch_folder() as scratch:
        adapters = scratch / "adapters"
        cold = [f"cold-{index}" for index in range(num_cold)]
        make_adapters(model, adapters, [*fill_names(args), *WARM, *RESIDENT, *cold], [RANK])
        num_bytes = adapter_bytes(adapters, cold[0])
        names = {"near": "local disk", "slow": f"{1e3 * LATENCY_S:.0f} ms, {BYTES_PER_S / 1e6:.0f} MB/s"}
        sources = {names[kind]: run_source(kind == "slow", args, model, adapters, iter(cold)) for kind in kinds}
    results = {
        "machine": machine, "rank": RANK, "adapter_bytes": num_bytes, "requests_per_s": RATE_PER_S,
        "pool_adapters": args.pool_adapters,
        "sources": {
            source: {"same_text": identical(cases), **{name: case.figures() for name, case in cases.items()}}
            for source, cases in sources.items()
        },
    }  # fmt: skip
    report.save(args.out / "cold-loads", results)
    print(markdown(sources))
    for source, cases in sources.items():
        same = "the same text" if identical(cases) else "DIFFERENT TEXT"
        print(f"{source}: the warm streams gave {same} in every turn")


if __name__ == "__main__":
    main()

"""The effect of a flood on quiet tenants, and how evenly backlogged tenants share a worker.

    python -m benchmarks.fleet.fairness [--model FOLDER] [--short]

Two fleets of one worker, one with `max_slowdown` off and one with its default, are loaded alternately. Without API keys
each adapter is a tenant. On both fleets:
- one quiet tenant runs one stream after another, alone and during the flood of a tenant with always 200 requests in
  flight;
- eight equal tenants have sixteen requests in flight each, alternating between the fleets. Reported are output tokens
  per second, and Jain's index of prompt + 2 x output tokens (the scheduler's weights). Both are of the middle half of a
  turn: at its ends not all tenants are over their share.

Only with the default: twenty quiet tenants together send about a sixth of the requests of the worker's capacity, at
Poisson times, alternately alone and during the flood.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.common import report
from benchmarks.common.fleet import RunningFleet, Setup, fleet, make_adapters, quickstart_model, scratch_folder
from benchmarks.fleet.neighbours import run_beside
from benchmarks.simulation.run import jain
from lorafleet.bench import BenchConfig, BenchResult, BenchTarget, run_bench
from lorafleet.bench.result import inter_token_gaps_s
from protocol.runtime.settings import Settings

QUIET = [f"quiet-{index}" for index in range(20)]
EQUALS = QUIET[:8]
FLOOD = "flood"
NUM_FLOOD = 200
RANK = 16
KV_CACHE_BYTES = 1 << 30  # of each fleet: by default the first one would take its share of all memory
OUTPUT_WEIGHT = 2  # weight of an output token; a prompt token has weight 1


def load(url: str, names: Sequence[str], **fields: Any) -> BenchConfig:
    """Return a load for these adapters, 64 words in and 64 tokens out."""
    targets = tuple(BenchTarget.model(name) for name in names)
    return BenchConfig(url=url, targets=targets, prompt_words=64, output_tokens=64, **fields)


def attained(
    result: BenchResult, names: Sequence[str], prompt_weight: int = 1, output_weight: int = OUTPUT_WEIGHT
) -> list[float]:  # fmt: skip
    """Return each tenant's tokens in the middle half of a run; a request's output is spread evenly over its chunks."""
    start = min(record.start_s for record in result.records)
    low, high = start + 0.25 * result.wall_s, start + 0.75 * result.wall_s
    tokens: defaultdict[str, float] = defaultdict(float)
    for record in result.records:
        times = np.array(record.arrivals_s)
        inside = np.count_nonzero((times >= low) & (times < high))
        tokens[record.target] += output_weight * record.output_tokens * int(inside) / max(len(times), 1)
        tokens[record.target] += prompt_weight * record.prompt_tokens * bool(len(times) and low <= times[0] < high)
    return [float(tokens[name]) for name in names]


@dataclass(frozen=True, slots=True)
class Stream:
    """Figures of one quiet tenant's streams, run one after another, and of the worker in the same time."""

    gap_ms: tuple[float, float]  # between tokens, p50 and p99
    ttft_ms: tuple[float, float]
    tokens_per_s: float  # of one stream, from its request to its last token
    total_tokens_per_s: float  # of the worker

    @property
    def others_tokens_per_s(self) -> float:
        """The worker's tokens per second for other tenants."""
        return self.total_tokens_per_s - self.tokens_per_s


@dataclass(frozen=True, slots=True)
class Equals:
    """Figures of eight equal, backlogged tenants, for each turn."""

    tokens_per_s: list[float]
    shares: list[float]  # summed over all turns


def measure_stream(running: RunningFleet, flood: BenchConfig | None, num_streams: int) -> Stream:
    """Measure one quiet tenant's streams, alone or during a flood that has begun when the first third has ended."""
    quiet = load(running.url, QUIET[:1], num_requests=num_streams, concurrency=1)
    num_before = running.beats_of_now()[0].counters.num_output_tokens
    measured = run_beside(quiet, flood).measured
    num_tokens = running.beats_of_now()[0].counters.num_output_tokens - num_before
    records = sorted(measured.records, key=lambda record: record.start_s)[num_streams // 3 :]
    gaps = 1e3 * inter_token_gaps_s(records)
    first = 1e3 * np.array([record.arrivals_s[0] - record.start_s for record in records])
    spent_s = sum(record.arrivals_s[-1] - record.start_s for record in records)
    return Stream(
        (float(np.percentile(gaps, 50)), float(np.percentile(gaps, 99))),
        (float(np.percentile(first, 50)), float(np.percentile(first, 99))),
        sum(record.output_tokens for record in records) / spent_s,
        num_tokens / measured.wall_s,
    )


def measure_equals(fleets: Mapping[str, RunningFleet], num_turns: int) -> dict[str, Equals]:
    """Measure eight tenants with sixteen requests in flight each, alternating between the fleets."""
    rates: dict[str, list[float]] = {setting: [] for setting in fleets}
    shares = {setting: np.zeros(len(EQUALS)) for setting in fleets}
    for turn in range(num_turns):
        for setting, running in fleets.items():
            result = run_bench(load(running.url, EQUALS, num_requests=3 * 128, concurrency=128, seed=turn))
            rates[setting].append(2 * sum(attained(result, EQUALS, 0, 1)) / result.wall_s)
            shares[setting] += attained(result, EQUALS)
    return {setting: Equals(rates[setting], shares[setting].tolist()) for setting in fleets}


def measure_quiet(running: RunningFleet, rounds: int, per_round: int) -> tuple[dict[str, np.ndarray], float, int]:
    """Return the quiet tenants' TTFTs in ms, alone and during the flood; their rate; and the flood's answers."""
    ttft: dict[str, list[float]] = {"alone": [], "beside the flood": []}
    num_flood = 0
    full = run_bench(load(running.url, QUIET, num_requests=96, concurrency=32, seed=1))
    rate = full.summary.requests_per_s / 6
    for turn in range(rounds):
        for name, values in ttft.items():
            quiet = load(
                running.url, QUIET, num_requests=per_round, concurrency=per_round, rate_per_s=rate, seed=turn
            )  # fmt: skip
            beside = run_beside(quiet, None if name == "alone" else flood_of(running, turn))
            values += [1e3 * (record.arrivals_s[0] - record.start_s) for record in beside.measured.records]
            num_flood += len(beside.others)
            if name != "alone":
                settle(running)
    return {name: np.array(values) for name, values in ttft.items()}, rate, num_flood


def flood_of(running: RunningFleet, seed: int = 0) -> BenchConfig:
    """Return the load of a tenant that always has 200 requests in flight."""
    return load(running.url, [FLOOD], num_requests=100_000, concurrency=NUM_FLOOD, seed=seed)


def settle(running: RunningFleet) -> None:
    """Wait until the requests of a flood are gone."""
    run_bench(load(running.url, QUIET, num_requests=1, concurrency=1))


def draw(axes: Sequence[Any], ttft_ms: dict[str, np.ndarray], shares: Sequence[float]) -> None:
    """Draw the quiet tenants' times to first token in one panel, and the equals' token shares in another."""
    for color, (name, values) in zip((report.GREEN, report.ORANGE), ttft_ms.items(), strict=True):
        axes[0].plot(np.sort(values), np.linspace(0, 100, len(values)), color=color, label=name)
    axes[0].set(title="twenty quiet tenants", xlabel="time to first token, ms", ylabel="% of requests")
    axes[0].legend()
    axes[1].bar(range(len(shares)), np.array(shares) / np.mean(shares), color=report.BLUE)
    axes[1].set(title="eight backlogged equals", ylabel="tokens ÷ mean", xlabel="tenant")


def stream_rows(streams: dict[str, dict[str, Stream]]) -> list[tuple[str, ...]]:
    """Return the table rows of one quiet stream."""
    rows: list[tuple[str, ...]] = []
    for setting, found in streams.items():
        alone = found["alone"]
        for name, stream in found.items():
            figures = (*stream.gap_ms, *stream.ttft_ms, stream.tokens_per_s)
            others = f"{stream.others_tokens_per_s:.0f}" if name != "alone" else ""
            rows.append((
                setting, name, *(f"{value:.0f}" for value in figures),
                f"{stream.tokens_per_s / alone.tokens_per_s:.2f}", others, f"{stream.total_tokens_per_s:.0f}",
            ))  # fmt: skip
    return rows


STREAM_COLUMNS = (
    "max_slowdown", "one quiet stream", "ms between tokens p50", "p99", "TTFT p50, ms", "p99", "tok/s", "÷ alone",
    "the flood's tok/s", "the worker's tok/s",
)  # fmt: skip


def main() -> None:
    """Measure quiet tenants during a flood, and write the result."""
    parser = report.parser(__doc__)
    parser.add_argument("--parts", default="streams,equals,quiet", help="what to measure (default: all)")
    args = parser.parse_args()
    parts = args.parts.split(",")
    machine, model = report.machine(), args.model or quickstart_model()
    rounds, per_round, num_streams, num_turns = (1, 40, 9, 2) if args.short else (2, 128, 30, 4)
    default = Settings.model_fields["max_slowdown"].default
    settings = {"off": 0.0, f"{default:g}": default}
    streams: dict[str, dict[str, Stream]] = {}
    equals: dict[str, Equals] = {}
    with scratch_folder() as scratch, ExitStack() as stack:
        adapters = scratch / "adapters"
        make_adapters(model, adapters, [*QUIET, FLOOD], [RANK])
        fleets: dict[str, RunningFleet] = {}
        for setting, value in settings.items():
            environment = {"LORAFLEET_MAX_SLOWDOWN": str(value), "LORAFLEET_KV_CACHE_BYTES": str(KV_CACHE_BYTES)}
            (scratch / setting).mkdir()
            fleets[setting] = stack.enter_context(
                fleet(Setup(model, adapters, scratch / setting, environment=environment))
            )
        for running in fleets.values():
            run_bench(load(running.url, [*QUIET, FLOOD], num_requests=42, concurrency=21))  # loads the adapters
        if "streams" in parts:
            for setting, running in fleets.items():
                streams[setting] = {"alone": measure_stream(running, None, num_streams)}
                streams[setting]["beside the flood"] = measure_stream(running, flood_of(running), num_streams)
                settle(running)
            print(report.table(STREAM_COLUMNS, stream_rows(streams)), flush=True)
        if "equals" in parts:
            equals = measure_equals(fleets, num_turns)
            for setting, equal in equals.items():
                rates = ", ".join(f"{rate:.0f}" for rate in equal.tokens_per_s)
                mean = np.mean(equal.tokens_per_s)
                print(f"eight backlogged equals, max_slowdown {setting}: {mean:.0f} tok/s ({rates})")
                print(f"    Jain index {jain(equal.shares):.4f} (wanted: 0.95 or more)", flush=True)
        if "quiet" not in parts:
            return
        pooled, rate, num_flood = measure_quiet(fleets[f"{default:g}"], rounds, per_round)
    figures = {name: {f"p{q}_ms": float(np.percentile(v, q)) for q in (50, 90, 99)} for name, v in pooled.items()}
    ratio = figures["beside the flood"]["p99_ms"] / figures["alone"]["p99_ms"]
    rows = [(name, len(pooled[name]), *(f"{value:.0f}" for value in row.values())) for name, row in figures.items()]
    print(report.table(("quiet tenants", "requests", "TTFT p50, ms", "p90", "p99"), rows))
    print(f"p99 beside the flood ÷ alone: {ratio:.2f} (wanted: 2 or less); the flood had {num_flood} answers meanwhile")
    if not streams or not equals:
        return  # a file is written only if all parts ran
    shares = equals[f"{default:g}"].shares
    saved = {
        "machine": machine, "rate_per_s": rate, "figures": figures, "p99_ratio": ratio, "flood_answers": num_flood,
        "attained": shares, "jain": jain(shares), "equals": {name: asdict(equal) for name, equal in equals.items()},
        "streams": {name: {how: asdict(stream) for how, stream in both.items()} for name, both in streams.items()},
    }  # fmt: skip
    report.save(args.out / "fairness", saved)
    report.plot(args.out / "fairness", 2, lambda axes: draw(axes, pooled, shares))


if __name__ == "__main__":
    main()

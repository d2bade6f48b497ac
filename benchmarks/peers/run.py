"""Compare Lorafleet with vLLM and llama.cpp on this machine, in one run, under one load.

    python -m benchmarks.peers.run --peers /opt/peers [--systems lorafleet,vllm,llama.cpp] [--rounds 2]

The servers run one after the other. Each serves the base model, one adapter, and many adapters in turn, at each
concurrency: 64 random words in, 64 tokens out, streamed, with the end of text ignored. With several rounds, each figure
is the median, so that a machine that slows down does not favor the server that ran first. The result is JSON, a
Markdown table and a plot in benchmarks/results/.
"""

import argparse
import os
import signal
import statistics
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path

import httpx2
import psutil

from benchmarks.common import report
from benchmarks.peers.programs import program
from benchmarks.peers.report import markdown, save_plot
from benchmarks.peers.servers import SYSTEMS, Lab, Server, started
from lorafleet.bench import BenchConfig, BenchResult, BenchTarget, run_bench

Ask = Callable[[BenchConfig], tuple[BenchResult, float]]
"""Runs a load against one server or program; also returns the CPU seconds that it used."""


@dataclass(frozen=True, slots=True)
class Point:
    """The figures of one server under one load."""

    server: str
    system: str
    scenario: str
    concurrency: int
    tokens_per_s: float
    inter_token_p50_ms: float
    inter_token_p99_ms: float
    ttft_p50_ms: float
    num_errors: int
    tokens_per_chunk: float
    generator_cpu_ms_per_chunk: float
    processor_ms_per_token: float  # CPU time of the server's processes


def measure(
    server: Server, ask: Ask, scenario: str, concurrency: int, args: argparse.Namespace, seed: int = 0
) -> Point:
    """Measure one load, after a short unmeasured one that fills the caches and loads the adapters.

    ask: runs a load. seed: of the prompts. A server that gets the same seed again has the prompts in its prefix cache.
    """
    targets = server.scenarios[scenario]
    num_warmup = max(concurrency, len(targets))
    shared = {"url": "", "targets": targets, "concurrency": concurrency}
    ask(BenchConfig(**shared, num_requests=num_warmup, output_tokens=8, prompt_words=args.prompt_words, seed=seed + 1))
    result, processor_s = ask(
        BenchConfig(
            **shared,
            num_requests=max(args.waves, -(-args.min_requests // concurrency)) * concurrency,
            prompt_words=args.prompt_words,
            output_tokens=args.output_tokens,
            seed=seed,
        )
    )
    summary = result.summary
    for text, count in result.errors.items():
        print(f"  {count} × {text}", flush=True)
    return Point(
        server=server.name,
        system=server.system,
        scenario=scenario,
        concurrency=concurrency,
        tokens_per_s=summary.output_tokens_per_s,
        inter_token_p50_ms=summary.inter_token.p50_ms,
        inter_token_p99_ms=summary.inter_token.p99_ms,
        ttft_p50_ms=summary.ttft.p50_ms,
        num_errors=summary.num_errors,
        tokens_per_chunk=summary.tokens_per_chunk,
        generator_cpu_ms_per_chunk=result.generator_cpu_ms_per_chunk,
        processor_ms_per_token=1e3 * processor_s / max(1, summary.output_tokens),
    )


def asking(url: str, pid: int) -> Ask:
    """Return a function that runs a load against a server, whose first process is `pid`."""

    def processor_s() -> float:
        first = psutil.Process(pid)
        times = [one.cpu_times() for one in (first, *first.children(recursive=True))]
        return sum(time.user + time.system for time in times)

    def ask(config: BenchConfig) -> tuple[BenchResult, float]:
        before_s = processor_s()
        result = run_bench(replace(config, url=url))
        return result, processor_s() - before_s

    return ask


def check_adapters_differ(server: Server, loads: Iterable[str], url: str) -> None:
    """Raise RuntimeError if two of the loads' base and adapters give the same answer: then LoRA was not applied."""
    answers: dict[str, str] = {}
    for load in loads:
        for target in server.scenarios[load][:3]:
            answers[target.name] = _answer(target, url)
    if len(set(answers.values())) != len(answers):
        raise RuntimeError(f"{server.name}: different adapters gave one answer: {answers}")


def _answer(target: BenchTarget, url: str) -> str:
    body = {"prompt": "Once upon a time", "max_tokens": 48, "temperature": 0, **target.body}
    response = httpx2.post(f"{url}/v1/completions", json=body, timeout=120).raise_for_status()
    return response.json()["choices"][0]["text"]


def run_round(servers: Iterable[Server], args: argparse.Namespace, scratch: Path) -> list[Point]:
    """Start, measure and stop every server once."""
    points = []
    for server in servers:
        log_path = scratch / f"{server.name.replace(', ', '-').replace(' ', '-')}.log"
        with started(server, log_path) as (url, pid):
            print(server.name, flush=True)
            loads = [name for name in server.scenarios if not args.loads or name in args.loads]
            try:
                check_adapters_differ(server, loads, url)
            except httpx2.HTTPStatusError as error:  # some peers start with a model of which they answer nothing
                print(f"  not measured: {error}", flush=True)
                continue
            for scenario in loads:
                for place, concurrency in enumerate(args.concurrency):
                    point = measure(server, asking(url, pid), scenario, concurrency, args, seed=2 * place)
                    points.append(point)
                    print(
                        f"  {scenario:12} × {concurrency:2}: {point.tokens_per_s:6.1f} tok/s, "
                        f"inter-token {point.inter_token_p50_ms:6.1f} ms, TTFT {point.ttft_p50_ms:6.0f} ms, "
                        f"{point.num_errors} errors",
                        flush=True,
                    )
    return points


def median_points(rounds: list[list[Point]]) -> list[Point]:
    """Merge the rounds: the median of each figure, the sum of the errors."""
    merged = []
    for group in zip(*rounds, strict=True):
        rows = [asdict(point) for point in group]
        figures = {
            key: statistics.median(row[key] for row in rows) if isinstance(value, float) else value
            for key, value in rows[0].items()
        }
        merged.append(Point(**{**figures, "num_errors": sum(row["num_errors"] for row in rows)}))
    return merged


def in_turns(groups: Iterable[list[Server]], args: argparse.Namespace, scratch: Path) -> list[list[Point]]:
    """Run the servers and programs of each group side by side; measure them alternately, for each load of each round.

    Return the points by round. Before the first round, an adapter of each program must have changed the answer.
    """
    rounds: list[list[Point]] = [[] for _ in range(args.rounds)]
    for servers in groups:
        with ExitStack() as stack:
            asks = [_started(server, scratch, stack) for server in servers]
            loads = dict.fromkeys(name for server in servers for name in server.scenarios)
            for number, points in enumerate(rounds):
                for scenario, (place, concurrency) in product(loads, enumerate(args.concurrency)):
                    seed = 2 * (number * len(args.concurrency) + place)
                    for server, ask in zip(servers, asks, strict=True):
                        if scenario not in server.scenarios:
                            continue
                        points.append(point := measure(server, ask, scenario, concurrency, args, seed))
                        print(f"{scenario} × {concurrency}: {server.name} {point.tokens_per_s:.1f} tok/s, "
                              f"TTFT {point.ttft_p50_ms:.0f} ms, {point.processor_ms_per_token:.1f} ms of processor "
                              "a token", flush=True)  # fmt: skip
    return rounds


def _started(server: Server, scratch: Path, stack: ExitStack) -> Ask:
    log_path = scratch / f"{server.name}.log"
    if server.adapters is None:
        return asking(*stack.enter_context(started(server, log_path)))
    engine = stack.enter_context(program(server, log_path))
    answers = engine.answers("Once upon a time", 48)
    if len(answers) > 1 and len(set(answers.values())) == 1:
        raise RuntimeError(f"{server.name}: adapters answered as the base: {answers}")
    print(f"{server.name}: {len(set(answers.values()))} answers of {len(answers)} adapters and base", flush=True)
    return engine.bench


def parse_arguments(parser: argparse.ArgumentParser, systems: str, waves: int = 3) -> argparse.Namespace:
    """Return the parsed command line. systems, waves: defaults."""
    parser.add_argument("--systems", default=systems, help="the systems to run, in order (%(default)s)")
    parser.add_argument("--loads", default="", help='some loads only, such as "base,one adapter" (default: all)')
    parser.add_argument("--concurrency", default="1,8,32", help="requests in flight (%(default)s)")
    parser.add_argument("--num-adapters", default="32", help="of the loads with many adapters (%(default)s)")
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument(
        "--waves", type=int, default=waves, help="measured requests per request in flight (%(default)s)"
    )
    parser.add_argument("--min-requests", type=int, default=8, help="least requests of a load (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="path without an ending (default: benchmarks/results/NAME-DATE)")
    args = parser.parse_args()
    args.systems = args.systems.split(",")
    args.loads = [name for name in args.loads.split(",") if name]
    args.num_adapters = [int(number) for number in args.num_adapters.split(",")]
    args.concurrency = [int(number) for number in args.concurrency.split(",")]
    return args


def lab_of(root: Path, args: argparse.Namespace, *, cache_gib: int = 0, pool_gib: int = 0) -> Lab:
    """Return the lab of a folder, with the sizes of the command line."""
    num_threads = len(os.sched_getaffinity(0))
    # A word is one token for most tokenizers, two for some.
    slot_tokens = max(256, 2 * args.prompt_words + args.output_tokens)
    return Lab(
        root.resolve(), tuple(args.num_adapters), max(args.concurrency), num_threads, cache_gib, pool_gib, slot_tokens
    )


def servers_of(lab: Lab, systems: Iterable[str], scratch: Path) -> list[Server]:
    """Return the servers of the given systems, in order."""
    return [server for system in systems for server in SYSTEMS[system](lab, scratch)]


def compare(servers: Callable[[Path], Iterable[Server]], name: str, args: argparse.Namespace) -> None:
    """Run all rounds; save and print their medians. servers: takes a folder to write to. name: of the results."""

    def rounds(scratch: Path) -> list[list[Point]]:
        return [run_round(servers(scratch), args, scratch) for _ in range(args.rounds)]

    save(rounds, name, args)


def save(measured: Callable[[Path], list[list[Point]]], name: str, args: argparse.Namespace) -> None:
    """Save and print the medians of rounds. measured: takes a folder to write to. name: of the results."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a server must not outlive this process
    started_at = datetime.now(UTC)
    out = args.out or report.RESULTS / f"{name}-{started_at:%Y-%m-%d}"
    about = {"started_at": started_at.isoformat(timespec="seconds"), "machine": report.machine()}
    about["load"] = {
        key: getattr(args, key)
        for key in ("num_adapters", "prompt_words", "output_tokens", "waves", "min_requests", "rounds")
    }
    with tempfile.TemporaryDirectory(prefix="lorafleet-peers-") as scratch:
        points = median_points(measured(Path(scratch)))
    found = {**about, "points": [asdict(point) for point in points]}
    report.save(out, found)
    out.with_suffix(".md").write_text(markdown(found))
    save_plot(found, out)
    print(f"\n{markdown(found)}\nwrote {out}.md and .png")


def main() -> None:
    """Compare the systems on the model of the given folder."""
    parser = argparse.ArgumentParser(description="Compare Lorafleet with vLLM and llama.cpp.")
    parser.add_argument("--peers", type=Path, required=True, help="the folder that setup.sh made")
    args = parse_arguments(parser, ",".join(SYSTEMS))
    compare(partial(servers_of, lab_of(args.peers, args), args.systems), "peers", args)


if __name__ == "__main__":
    main()

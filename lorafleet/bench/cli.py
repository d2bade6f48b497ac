"""`lorafleet bench` benchmarks a server and reports the results."""

import argparse
import os
from pathlib import Path

import httpx2
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lorafleet.bench.client import api_base
from lorafleet.bench.load import WarmupError, run_bench
from lorafleet.bench.report import print_result, save_json, save_plot
from lorafleet.bench.result import BenchRequest, BenchResult
from lorafleet.bench.workload import BenchConfig, BenchTarget
from lorafleet.launcher.records import URL_VARIABLE, the_only
from lorafleet.shared.api import DEFAULT_URL, KEY_VARIABLE, reason_of
from lorafleet.shared.parser import Parser, number

_OPEN_LOOP_CONCURRENCY = 1024


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument(
        "url",
        nargs="?",
        default="",
        help=f"URL of the server (default: ${URL_VARIABLE}, the fleet on this machine, or {DEFAULT_URL}; no profile)",
    )
    what = parser.add_argument_group("requests")
    what.add_argument("--model", help="base model to query (default without --adapters: the first in /v1/models)")
    what.add_argument(
        "--adapters",
        metavar="A,B,…|N",
        help="adapters to query: their names, or a number of names generated from --adapter-format",
    )
    what.add_argument("--adapter-format", default="adapter-{i}", help="name of the i-th adapter (default: %(default)s)")
    what.add_argument(
        "--zipf",
        type=float,
        metavar="S",
        help="weight of the i-th target: 1/i^S (default: round robin)",
    )
    what.add_argument("--chat", action="store_true", help="use /v1/chat/completions instead of /v1/completions")
    what.add_argument("--prompt-words", type=int, default=64, help="random words per prompt (default: %(default)s)")
    what.add_argument(
        "--output-tokens", type=int, default=64, help="tokens to generate per request (default: %(default)s)"
    )
    what.add_argument(
        "--stop-at-eos", action="store_true", help="let answers stop at an end token (default: ignore_eos)"
    )
    what.add_argument(
        "--seed", type=int, default=0, help="seed of prompts, targets and arrivals (default: %(default)s)"
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--requests", type=number, help="number of measured requests (default: 8 × concurrency; with --rate 256)"
    )
    load.add_argument(
        "--concurrency",
        type=number,
        help=f"concurrent requests (default: 8; with --rate at most {_OPEN_LOOP_CONCURRENCY})",
    )
    load.add_argument(
        "--rate", type=float, metavar="R", help="open loop: Poisson arrivals, R per second, instead of a closed loop"
    )
    load.add_argument("--warmup", type=int, help="number of warm-up requests (default: the concurrency, at most 32)")
    load.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="S",
        help="deadline of a request, in seconds (default: %(default)g)",
    )
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="file with the API key (default: $OPENAI_API_KEY)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench.json"), help="JSON file of the result; the plot is a PNG beside it"
    )
    parser.add_argument("--no-plot", action="store_true", help="write no plot")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code: 0, 1 if a request failed, 2 if the run could not start."""
    console = Console()
    try:
        config = config_of(args)
        result = _run_with_progress(config, console)
    except (httpx2.HTTPError, ConnectionError) as error:
        console.print(f"[red]cannot reach the server at {args.url}:[/] {reason_of(error)}")
        return 2
    except (ValueError, OSError, WarmupError) as error:
        console.print(f"[red]cannot run the benchmark:[/] {error}")
        return 2
    print_result(result, console)
    save_json(result, args.out)
    written = [args.out]
    if not args.no_plot:
        plot = args.out.with_suffix(".png")
        try:
            save_plot(result, plot)
            written.append(plot)
        except ImportError:
            console.print("no plot: matplotlib is not installed; run pip install 'lorafleet[bench]'")
    console.print("wrote " + " and ".join(str(path) for path in written))
    return 1 if result.summary.num_errors else 0


def _choose_fleet(args: argparse.Namespace) -> None:
    """Set URL and key file to those of the fleet on this machine, unless LORAFLEET_URL names another.

    Raises BadRequest if several fleets run.
    """
    args.url = os.environ.get(URL_VARIABLE)
    if not args.url and (fleet := the_only()) is not None:
        args.url = fleet.url
        if fleet.key_file and not os.environ.get(KEY_VARIABLE):
            args.api_key_file = args.api_key_file or Path(fleet.key_file)
    args.url = args.url or DEFAULT_URL


def config_of(args: argparse.Namespace) -> BenchConfig:
    """Return the BenchConfig of parsed arguments. Raises ValueError for values that describe no load."""
    if not args.url:
        _choose_fleet(args)
    concurrency = args.concurrency or (_OPEN_LOOP_CONCURRENCY if args.rate else 8)
    return BenchConfig(
        url=args.url,
        targets=_targets(args),
        zipf_s=args.zipf,
        num_requests=args.requests or (256 if args.rate else 8 * concurrency),
        concurrency=concurrency,
        rate_per_s=args.rate,
        prompt_words=args.prompt_words,
        output_tokens=args.output_tokens,
        ignore_eos=not args.stop_at_eos,
        chat=args.chat,
        num_warmup=min(concurrency, 32) if args.warmup is None else args.warmup,
        timeout_s=args.timeout,
        seed=args.seed,
        api_key=_api_key(args),
    )


def _api_key(args: argparse.Namespace) -> str | None:
    """Return the key from a file or variable; a flag would be visible in the process list. Raises OSError."""
    file: Path | None = args.api_key_file
    return file.read_text().strip() if file is not None else os.environ.get("OPENAI_API_KEY")


def _targets(args: argparse.Namespace) -> tuple[BenchTarget, ...]:
    names = [args.model] if args.model else []
    if args.adapters is not None:
        if args.adapters.isdecimal():
            adapters = [args.adapter_format.format(i=i) for i in range(int(args.adapters))]
        else:
            adapters = [name.strip() for name in args.adapters.split(",") if name.strip()]
        if not adapters:
            raise ValueError(f"--adapters {args.adapters!r} names no adapter")
        names += adapters
    if not names:
        names = [_first_model(args.url, _api_key(args))]
    return tuple(BenchTarget.model(name) for name in names)


def _first_model(url: str, api_key: str | None) -> str:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    response = httpx2.get(f"{api_base(url)}/v1/models", headers=headers, timeout=10).raise_for_status()
    models = response.json().get("data") or []
    if not models:
        raise ValueError("the server lists no model; name one with --model")
    return models[0]["id"]


def _run_with_progress(config: BenchConfig, console: Console) -> BenchResult:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[failed]}"), console=console, transient=True) as progress:
        task = progress.add_task("requests", total=config.num_requests, failed="")
        num_failed = 0

        def note(record: BenchRequest) -> None:
            nonlocal num_failed
            num_failed += record.error is not None
            progress.update(task, advance=1, failed=f"[red]{num_failed} failed" if num_failed else "")

        return run_bench(config, note)

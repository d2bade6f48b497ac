"""`lorafleet profile` measures the phases and operations of a worker's steps on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import tempfile
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lorafleet.launcher.embedded import start_embedded
from lorafleet.shared.flags import add_settings, load_settings
from lorafleet.shared.parser import Parser, number
from lorafleet.shared.tables import count_text
from protocol.runtime.service import set_up_logging
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

FLAGS = (
    "adapters", "device", "dtype", "threads", "kernels", "compile", "max_num_seqs", "max_step_tokens", "max_model_len",
    "kv_cache_bytes", "kv_cache_dtype", "quantization", "quantize_activations", "adapter_pool_bytes", "log_level",
)  # fmt: skip
MAX_OPERATIONS = 12


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument("model", metavar="MODEL", help="the base model: a Hub id or a local folder")
    parser.add_argument(
        "--sequences", type=_numbers, default=(1, 8, 32), metavar="N,N,…", help="batch sizes (default: 1,8,32)"
    )
    parser.add_argument(
        "--steps", type=number, default=20, metavar="N", help="measured steps per case (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt-tokens", type=number, default=64, metavar="N", help="tokens per prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("profile.json"),
        metavar="FILE",
        help="file for the JSON result (default: %(default)s)",
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="also write a Chrome trace per case, named after FILE with -decode-8 and so on",
    )
    add_settings(parser, first=FLAGS, skip=tuple(Settings.model_fields))


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        queue = start_embedded(Path(folder), durable=False)
        try:
            settings = load_settings(args, redis_url=queue.url)
            set_up_logging("worker", settings.log_level if "log_level" in args else "warning")
            found = _measure(args, settings)
        finally:
            queue.stop()
    print_profile(found, console)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(orjson.dumps(dataclasses.asdict(found), option=orjson.OPT_INDENT_2))
    console.print(f"wrote {args.out}")
    return 0


def _measure(args: argparse.Namespace, settings: Settings) -> Any:
    """Measure the cases in the arguments; return a `gpu_worker.profiling.profile.StepProfile`."""
    try:
        worker = importlib.import_module("gpu_worker.profiling.profile")
    except ModuleNotFoundError as error:
        raise BadRequest(f"{error.name} is not installed: pip install 'lorafleet[worker]'") from error
    plan = worker.ProfilePlan(args.sequences, args.steps, args.prompt_tokens, settings.adapters, args.trace)
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task("", total=None)

    def show(what: str, done: int, total: int) -> None:
        if total:
            progress.start()
            progress.update(task, description=what, completed=done, total=total)
        else:  # loading weights shows its own progress bar
            console.print(what)

    try:
        return worker.run_profile(settings, plan, show)
    finally:
        progress.stop()


def print_profile(found: Any, console: Console) -> None:
    """Print a `gpu_worker.profiling.profile.StepProfile`: the phases and the forward pass of each case."""
    how = f"{found.num_stacked} of {found.num_layers} layers in one native call"
    console.print(
        f"[bold]{found.model}[/] in {found.dtype} on {found.device}, {count_text(found.num_threads, 'thread')}, {how}, "
        f"{count_text(len(found.adapters), 'adapter')}, prompts of {found.prompt_tokens} tokens, "
        f"room for {found.kv_tokens} KV tokens in {found.kv_dtype}"
    )
    for case in found.cases:
        rate = 1000 * case.tokens / case.step_ms
        console.print(
            f"\n[bold]{case.kind}, {count_text(case.num_sequences, 'sequence')}, "
            f"{count_text(case.num_adapters, 'adapter')}[/]: "
            f"{case.step_ms:.2f} ms a step, {case.tokens:.0f} tokens, {rate:,.0f} tok/s"
        )
        console.print(_phases(case))
        console.print(_operations(case))


def _phases(case: Any) -> Table:
    table = Table("phase", "ms", "share", box=None, header_style="bold")
    for name, ms in case.phases_ms.items():
        beside = name == "publish"
        table.add_row(name, f"{ms:.3f}", "beside" if beside else f"{100 * ms / case.step_ms:.1f} %")
    return _aligned(table)


def _operations(case: Any) -> Table:
    table = Table("in forward, unbatched", "calls", "ms", "share", box=None, header_style="bold")
    shown, rest = case.operations[:MAX_OPERATIONS], case.operations[MAX_OPERATIONS:]
    rows = [(operation.name, operation.calls, operation.ms) for operation in shown]
    if rest:
        rows.append((f"{len(rest)} others", sum(each.calls for each in rest), sum(each.ms for each in rest)))
    rows.append(("between them", 0.0, case.forward_ms - sum(ms for _, _, ms in rows)))
    for name, calls, ms in rows:
        table.add_row(name, f"{calls:.0f}" if calls else "", f"{ms:.3f}", f"{100 * ms / case.forward_ms:.1f} %")
    return _aligned(table)


def _aligned(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(number(part) for part in text.split(","))

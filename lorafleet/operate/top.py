"""`lorafleet top` shows live metrics of a running fleet."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lorafleet.operate.workers import COLUMNS, row, shown
from lorafleet.operate.workers import PATH as WORKERS
from lorafleet.shared.api import Api, add_flags
from lorafleet.shared.parser import Parser
from lorafleet.shared.tables import MAX_WIDTH, count_text, part_text, size_text

FLEET = "/v1/fleet"

LEAST = ("host", "preempted/s", "slots", "resident", "pool", "waiting")
"""Columns that a narrow terminal leaves out, in this order."""

Sample = dict[str, Any]
"""A sample: its monotonic time `s`, and the API's responses `fleet` and `workers`."""


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument(
        "--every", type=float, default=2.0, metavar="SECONDS", help="refresh interval (default: %(default)g)"
    )
    parser.add_argument("--once", action="store_true", help="print one sample, measured over one interval, and exit")
    parser.add_argument("--json", action="store_true", help="print each sample as a line of JSON")
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command until interrupted; return the exit code. Raises the fleet's error response, and Unavailable."""
    with Api(args) as api:
        looks = islice(_looks(api, max(args.every, 0.1)), 1 if args.once else None)
        if args.json:
            for now in looks:
                print(json.dumps(now), flush=True)
        elif args.once:
            console = Console() if sys.stdout.isatty() else Console(width=MAX_WIDTH)
            console.print(frame(api.url, next(looks), console.width))
        else:
            with Live(Text(f"connecting to {api.url}"), screen=True, auto_refresh=False) as live:
                for now in looks:
                    live.update(frame(api.url, now, live.console.width), refresh=True)
    return 0


def _looks(api: Api, every_s: float) -> Iterator[dict[str, Any]]:
    """Yield the `figures` of a fleet at intervals, without end. Raises as `Api.ask`."""
    before = sample(api)
    while True:
        time.sleep(every_s)
        now = sample(api)
        yield figures(before, now)
        before = now


def sample(api: Api) -> Sample:
    """Return a sample of a fleet. Raises as `Api.ask`."""
    fleet = api.ask("GET", FLEET)
    return {"s": time.monotonic(), "fleet": fleet, "workers": list(api.pages(WORKERS))}


def figures(before: Sample, now: Sample) -> dict[str, Any]:
    """Return the rates between two samples, and the state at the second. Pure."""
    passed_s = max(now["s"] - before["s"], 1e-9)
    earlier = {worker["id"]: worker["counters"] for worker in before["workers"] if "counters" in worker}
    workers: list[dict[str, Any]] = []
    for worker in now["workers"]:
        counters = worker.get("counters", {})
        gained = {name: value - earlier.get(worker["id"], counters)[name] for name, value in counters.items()}
        steps = gained.get("num_steps", 0)
        step_s = sum(gained.get(name, 0.0) for name in ("plan_s", "inputs_s", "forward_s", "sample_s", "finish_s"))
        workers.append(
            worker
            | {
                "tokens_per_s": gained.get("num_output_tokens", 0) / passed_s,
                "step_ms": 1000 * step_s / steps if steps else None,
                "preemptions_per_s": gained.get("num_preemptions", 0) / passed_s,
            }
        )
    total = sum(worker["tokens_per_s"] for worker in workers)
    return {"fleet": now["fleet"], "workers": workers, "tokens_per_s": total, "passed_s": passed_s}


def frame(url: str, now: dict[str, Any], width: int) -> RenderableType:
    """Return one screen about a fleet, with lines of at most `width` characters if possible."""
    fleet, queue = now["fleet"], now["fleet"].get("queue") or {}
    head = Table.grid(padding=(0, 3))
    oldest = [f"{cls} {_age(ms)}" for cls, ms in sorted((queue.get("oldest_ms") or {}).items()) if ms]
    head.add_row(f"[bold]{escape(str(fleet.get('model') or 'no model'))}[/]", escape(url), time.strftime("%H:%M:%S"))
    head.add_row(
        f"queued [bold]{fleet['queued']}[/]" + (f" (oldest: {', '.join(oldest)})" if oldest else ""),
        f"running [bold]{fleet['running']}[/]",
        f"[bold]{now['tokens_per_s']:.0f}[/] tokens/s",
    )
    letters = queue.get("dead_letters", 0)
    head.add_row(
        f"queue memory {size_text(queue.get('used_bytes'))}"
        + (f" ({part_text(queue['used_bytes'], queue['max_bytes'])})" if queue.get("max_bytes") else ""),
        f"[red]{count_text(letters, 'dead letter')}[/]" if letters else "no dead letters",
        f"leader {escape(queue.get('leader') or 'none')}" if queue else "[red]no active scheduler[/]",
    )
    bases = [_bases(fleet, now["workers"]), Text()] if fleet.get("bases") else []
    return Group(head, Text(), *bases, _workers(now["workers"], width))


def _bases(fleet: dict[str, Any], workers: Sequence[dict[str, Any]]) -> Table:
    """Return a table of the bases, each with its state, workers, requests and tokens per second."""
    table = Table("base", "state", "workers", "queued", "running", "tokens/s", box=None, header_style="bold")
    for base in fleet["bases"]:
        name, rate = base["name"], sum(one["tokens_per_s"] for one in workers if one.get("base") == base["name"])
        state = "failed" if name in fleet["failed"] else "ready" if base["workers"] else "no worker"
        cells = (name, state, *(str(base[what]) for what in ("workers", "queued", "running")), f"{rate:.0f}")
        table.add_row(*map(escape, cells), style=None if state == "ready" else "red" if state == "failed" else "yellow")
    return table


def _workers(workers: Sequence[dict[str, Any]], width: int) -> RenderableType:
    if not workers:
        return Text("no workers", style="red")
    columns = (*COLUMNS[:-1], "tokens/s", "step ms", "preempted/s")
    table = _table(workers, columns)
    for name in LEAST:
        if Console(width=MAX_WIDTH).measure(table).maximum <= width:
            break
        columns = tuple(other for other in columns if other != name)
        table = _table(workers, columns)
    return table


def _table(workers: Sequence[dict[str, Any]], columns: Sequence[str]) -> Table:
    """Return a table of workers with these columns; the base is left out if all have the same."""
    columns, _ = shown(columns, (), workers)
    table = Table(*columns, box=None, header_style="bold")
    for worker in workers:
        step_ms = worker["step_ms"]
        cells = dict(zip(COLUMNS, row(worker), strict=True)) | {
            "tokens/s": f"{worker['tokens_per_s']:.0f}",
            "step ms": "-" if step_ms is None else f"{step_ms:.1f}",
            "preempted/s": f"{worker['preemptions_per_s']:.1f}",
        }
        table.add_row(
            *(escape(cells[name]) for name in columns), style=None if worker["state"] == "ready" else "yellow"
        )
    return table


def _age(ms: int) -> str:
    return f"{max(0.0, time.time() - ms / 1000):.0f} s"

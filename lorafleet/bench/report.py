"""The reports of a load run: a table for the terminal, a JSON file and a plot."""

from pathlib import Path
from typing import Any

import numpy as np
import orjson
from rich.console import Console
from rich.table import Table

from lorafleet.bench.result import BenchResult, Latency, Summary, inter_token_gaps_s
from lorafleet.bench.style import BLUE, GREEN, INK, MUTED, ORANGE, plot_style

_MAX_TARGET_ROWS = 12
_MAX_TARGET_BARS = 24


def print_result(result: BenchResult, console: Console) -> None:
    """Print throughput, latencies, the targets with the most requests, and the errors."""
    summary, config = result.summary, result.config
    load = f"{config['rate_per_s']:g} req/s" if config["rate_per_s"] else f"concurrency {config['concurrency']}"
    console.print(
        f"[bold]{summary.output_tokens_per_s:,.1f} tok/s[/] · {summary.requests_per_s:,.2f} req/s · {load} · "
        f"{summary.num_requests} requests, {summary.num_errors} failed · {result.wall_s:,.1f} s"
    )
    table = Table("latency, ms", "mean", "p50", "p90", "p99", box=None, header_style=MUTED)
    rows = [("time to first token", summary.ttft), ("inter-token", summary.inter_token)]
    rows += [("time per output token", summary.tpot), ("whole request", summary.e2e)]
    for name, latency in rows:
        table.add_row(name, *(f"{value:,.1f}" for value in _values(latency)))
    _align_right(table)
    console.print(table)
    targets = result.per_target
    if len(targets) > 1:
        console.print(_target_table(targets))
        if len(targets) > _MAX_TARGET_ROWS:
            console.print(f"… and {len(targets) - _MAX_TARGET_ROWS} more targets, see the JSON file", style=MUTED)
    console.print(f"load generator: {result.generator_cpu_ms_per_chunk:.3f} ms CPU per chunk", style=MUTED)
    for text, count in result.errors.items():
        console.print(f"[red]{count} × {text}", markup=True)


def _values(latency: Latency) -> tuple[float, float, float, float]:
    return latency.mean_ms, latency.p50_ms, latency.p90_ms, latency.p99_ms


def _align_right(table: Table) -> None:
    for column in table.columns[1:]:
        column.justify = "right"


def _target_table(targets: dict[str, Summary]) -> Table:
    table = Table(
        "target",
        "requests",
        "failed",
        "tok/s",
        "TTFT p50",
        "TTFT p99",
        "ITL p50",
        "ITL p99",
        box=None,
        header_style=MUTED,
    )
    for name, summary in list(targets.items())[:_MAX_TARGET_ROWS]:
        times = (summary.ttft.p50_ms, summary.ttft.p99_ms, summary.inter_token.p50_ms, summary.inter_token.p99_ms)
        counts = (str(summary.num_requests), str(summary.num_errors), f"{summary.output_tokens_per_s:,.1f}")
        table.add_row(name, *counts, *(f"{value:,.1f}" for value in times))
    _align_right(table)
    return table


def save_json(result: BenchResult, path: Path) -> None:
    """Write `result.to_json()` to `path`, and create its folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(orjson.dumps(result.to_json(), option=orjson.OPT_INDENT_2))


def save_plot(result: BenchResult, path: Path) -> None:
    """Draw throughput over time, two latency distributions and the requests per target to a PNG file.

    Raises ImportError if matplotlib (the extra `bench`) is not installed.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(plot_style()):
        figure = Figure(figsize=(10, 6.4), layout="constrained", facecolor="white")
        axes = figure.subplots(2, 2)
        figure.suptitle(_headline(result), x=0.01, ha="left", color=INK, fontsize=11, fontweight="bold")
        _draw_throughput(axes[0, 0], result)
        _draw_targets(axes[0, 1], result)
        good = [record for record in result.records if record.error is None]
        ttft_ms = np.array([r.arrivals_s[0] - r.start_s for r in good if r.arrivals_s]) * 1e3
        _draw_distribution(axes[1, 0], ttft_ms, "Time to first token, ms", ORANGE)
        _draw_distribution(axes[1, 1], inter_token_gaps_s(good) * 1e3, "Inter-token latency, ms", GREEN)
        figure.savefig(path, dpi=150)


def _headline(result: BenchResult) -> str:
    summary, config = result.summary, result.config
    load = f"{config['rate_per_s']:g} req/s" if config["rate_per_s"] else f"concurrency {config['concurrency']}"
    num_targets = len(config["targets"])
    what = config["targets"][0] if num_targets == 1 else f"{num_targets} targets"
    return (
        f"{what}: {summary.output_tokens_per_s:,.0f} tok/s at {load}, "
        f"{config['prompt_words']} words in, {config['output_tokens']} tokens out"
    )


def _draw_throughput(axis: Any, result: BenchResult) -> None:
    arrivals_s = np.concatenate([np.asarray(record.arrivals_s) for record in result.records] or [np.empty(0)])
    arrivals_s -= min(record.start_s for record in result.records)
    weight = result.summary.tokens_per_chunk
    counts, edges = np.histogram(arrivals_s, bins=min(60, max(10, len(arrivals_s) // 20)), range=(0, result.wall_s))
    axis.fill_between(edges[:-1], counts * weight / np.diff(edges), step="post", color=BLUE, alpha=0.25, linewidth=0)
    axis.step(edges[:-1], counts * weight / np.diff(edges), where="post", color=BLUE, linewidth=1.2)
    axis.set(title="Output tokens per second", xlabel="s", xlim=(0, result.wall_s))
    axis.set_ylim(bottom=0)


def _draw_targets(axis: Any, result: BenchResult) -> None:
    targets = list(result.per_target.items())
    shown = targets[:_MAX_TARGET_BARS]
    labels = [name if len(name) <= 14 else name[:13] + "…" for name, _ in shown]
    axis.bar(range(len(shown)), [summary.num_requests for _, summary in shown], color=BLUE, width=0.8)
    axis.set_xticks(
        range(len(shown)), labels, rotation=60 if len(shown) > 4 else 0, ha="right" if len(shown) > 4 else "center"
    )
    more = f", {len(shown)} of {len(targets)}" if len(targets) > len(shown) else ""
    axis.set_title(f"Requests per target{more}")
    axis.grid(axis="x", visible=False)


def _draw_distribution(axis: Any, values_ms: np.ndarray, title: str, color: str) -> None:
    axis.set_title(title)
    if len(values_ms) == 0:
        return
    ordered = np.sort(values_ms)
    axis.plot(ordered, (np.arange(len(ordered)) + 1) / len(ordered) * 100, color=color, linewidth=1.6)
    for quantile in (50, 90, 99):
        value = float(np.percentile(ordered, quantile))
        axis.plot([value], [quantile], "o", color=color, markersize=4)
        axis.annotate(
            f"p{quantile}  {value:,.1f}", (value, quantile), (6, -9), textcoords="offset points", color=INK, fontsize=8
        )
    axis.set(ylabel="% of samples", ylim=(0, 104), xlabel="ms")
    axis.set_xlim(left=0, right=max(float(np.percentile(ordered, 99.5)) * 1.25, 1e-3))

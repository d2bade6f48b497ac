"""How results are kept: machine and date beside every figure, JSON for machines, a plot and a Markdown table."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson

RESULTS = Path(__file__).parent / "results"
INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN, RED = "#2f6fde", "#e8833a", "#2a9d6f", "#c8453b"


def machine() -> dict[str, Any]:
    """Describe where and when the run takes place; call it before the load begins."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "num_cpus": len(os.sched_getaffinity(0)),
        "avx512_bf16": "avx512_bf16" in flags,
        "python": platform.python_version(),
        "torch": version("torch"),
        "load_average_before": round(os.getloadavg()[0], 1),
    }


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with what every script takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a Llama model (default: the quickstart model)")
    parser.add_argument("--short", action="store_true", help="a first look, in a minute or two")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file and the plot (%(default)s)")
    return parser


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def save(path: Path, report: dict[str, Any], panels: int, draw: Callable[[Sequence[Any]], None]) -> None:
    """Write `report` to `path`.json, and a row of `panels` axes that `draw` fills to `path`.png."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    style: dict[Any, Any] = {"axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "xtick.color": MUTED}
    style |= {"ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    style |= {"axes.titlecolor": INK, "axes.titlelocation": "left", "axes.grid": True, "grid.color": GRID}
    style |= {"axes.axisbelow": True, "legend.frameon": False, "legend.labelcolor": INK}
    with mpl.rc_context(style):
        figure = Figure(figsize=(4.4 * panels, 3.4), layout="constrained", facecolor="white")
        draw(figure.subplots(1, panels, squeeze=False)[0])
        figure.savefig(path.with_suffix(".png"), dpi=150)
    print(f"wrote {path}.json and .png")

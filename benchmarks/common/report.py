"""How benchmarks save their results: as JSON with machine and date, as a Markdown table, and as a plot."""

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

from lorafleet.bench.style import BLUE, GREEN, INK, MUTED, ORANGE, RED, plot_style  # noqa: F401  for scripts' plots

RESULTS = Path(__file__).parents[1] / "results"


def machine() -> dict[str, Any]:
    """Return the machine, the date and the load average. Call it before the measurement loads the machine."""
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


def native_machine() -> dict[str, Any]:
    """Return the machine, and how native operations run on it. Raises SystemExit where they cannot be built."""
    import torch

    from lora_kernels import cpu

    if not cpu.load():
        raise SystemExit("the native operations cannot be built here; the log says why")
    return {"machine": machine(), "isa": cpu.isa(), "threads": torch.get_num_threads()}


def parser(doc: str | None, *, without: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return a parser with the arguments that scripts share. without: arguments that the script does not use."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if "model" not in without:
        parser.add_argument("--model", type=Path, help="folder of a Llama model (default: the quickstart model)")
    if "short" not in without:
        parser.add_argument("--short", action="store_true", help="a short run of a minute or two")
    if "out" not in without:
        parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    return parser


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def save(path: Path, report: dict[str, Any]) -> None:
    """Write `report` to `path`.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f"{path.name}.json")
    file.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    print(f"wrote {file}")


def plot(path: Path, panels: int, draw: Callable[[Sequence[Any]], None]) -> None:
    """Write a row of `panels` axes, drawn by `draw`, to `path`.png."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(plot_style()):
        figure = Figure(figsize=(4.4 * panels, 3.4), layout="constrained", facecolor="white")
        draw(figure.subplots(1, panels, squeeze=False)[0])
        figure.savefig(path.with_name(f"{path.name}.png"), dpi=150)

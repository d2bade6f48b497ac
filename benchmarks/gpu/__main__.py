"""All measurements on a GPU, in one command of less than ten minutes.

    python -m benchmarks.gpu                                   # `make bench-gpu`
    python -m benchmarks.gpu --device cpu --shape tiny         # tests the benchmark itself without a GPU

It writes gpu.md and gpu.json into `--out`. Each section runs in its own process, so that it has the whole card, and
that a section which fails or takes too long does not affect others. A section without time left is listed as not run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import torch

from benchmarks.common import report
from benchmarks.gpu import churn, kernels, peer, steps, summary
from benchmarks.gpu.shapes import SHAPES

SECTIONS = ("steps", "churn", "kernels", "peer")
"""Ordered by importance, in case the time runs out."""

LEAST_S = 20.0
"""Minimum seconds with which a section is started."""

TAIL_LINES = 12
"""Number of last output lines kept for a failed section."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas (%(default)s)")
    parser.add_argument("--budget-s", type=float, default=570.0, help="seconds for everything (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of gpu.md and gpu.json (%(default)s)")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)  # for a section's own process
    args = parser.parse_args(arguments)
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    return args


def run_section(name: str, shape_name: str, device: torch.device, budget_s: float) -> dict[str, Any]:
    """Measure one section in this process."""
    shape, deadline_s = SHAPES[shape_name], time.monotonic() + budget_s
    if name == "kernels":
        return kernels.run(shape, device)
    if name == "steps":
        return steps.run(shape, device, deadline_s)
    if name == "churn":
        return churn.run(shape, device)
    return peer.run(shape, device, deadline_s)


def run_apart(
    name: str, args: argparse.Namespace, budget_s: float, python: str = sys.executable, least_s: float = LEAST_S
) -> dict[str, Any]:
    """Measure one section in its own process; a failure is described in the result."""
    if budget_s < least_s:
        return {"skipped": "no time was left"}
    with tempfile.TemporaryDirectory(prefix="lorafleet-gpu-") as scratch:
        command = [
            python, "-m", "benchmarks.gpu", f"--section={name}", f"--device={args.device}",
            f"--shape={args.shape}", f"--budget-s={0.8 * budget_s}", f"--out={scratch}",
        ]  # fmt: skip
        started = time.monotonic()
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=budget_s,
                env=dict(os.environ),
            )  # fmt: skip
        except subprocess.TimeoutExpired as expired:
            told = expired.stdout.decode(errors="replace") if isinstance(expired.stdout, bytes) else ""
            return {"failed": f"it took more than {budget_s:.0f} s", "output": _tail(told)}
        result = Path(scratch) / f"{name}.json"
        if done.returncode or not result.exists():
            tail = _tail(done.stdout)
            return {"failed": tail[-1] if tail else f"exit code {done.returncode}", "output": tail}
        return {**json.loads(result.read_bytes()), "seconds": round(time.monotonic() - started, 1)}


def _tail(text: str) -> list[str]:
    return text.strip().splitlines()[-TAIL_LINES:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the page and the figures; return 1 if a section failed."""
    args = parse(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("a CUDA device is needed; --device cpu --shape tiny tries the benchmark without one")
    device = torch.device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.section:
        found = run_section(args.section, args.shape, device, args.budget_s)
        (args.out / f"{args.section}.json").write_bytes(orjson.dumps(found, option=orjson.OPT_SERIALIZE_NUMPY))
        return 0
    ends_s = time.monotonic() + args.budget_s
    sections: dict[str, dict[str, Any]] = {}
    about = summary.about(device, SHAPES[args.shape].name)
    for name in (name for name in SECTIONS if name in args.only):
        sections[name] = run_apart(name, args, ends_s - time.monotonic())
        told = sections[name].get("failed") or sections[name].get("skipped") or f"{sections[name].get('seconds')} s"
        print(f"{name}: {told}", flush=True)
        _write(args.out, about, sections)
    print((args.out / "gpu.md").read_text())
    return int(any("failed" in found for found in sections.values()))


def _write(out: Path, about: dict[str, Any], sections: dict[str, dict[str, Any]]) -> None:
    """Write the results so far, so that an interrupted run leaves them."""
    bars = [{"what": bar.what, "wanted": bar.wanted, "measured": bar.measured, "reached": bar.is_reached}
            for bar in summary.bars(sections)]  # fmt: skip
    report.save(out / "gpu", {**about, "bars": bars, "sections": sections})
    (out / "gpu.md").write_text(summary.page(about, sections))


if __name__ == "__main__":
    sys.exit(main())

"""The GPU benchmark's results as a page: card, targets and whether they were reached, and a table per section."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.common import report
from protocol.runtime.environment import COMPUTE, child_environment

Sections = Mapping[str, Mapping[str, Any]]
"""Section name -> its result, or {"failed": why} or {"skipped": why}."""

PACKAGES = ("torch", "triton", "transformers", "peft", "numpy", "vllm")


@dataclass(frozen=True, slots=True)
class Bar:
    """A target, and the measured value."""

    what: str
    wanted: str
    measured: str
    is_reached: bool | None  # None: not measured


def about(device: torch.device, shape: str) -> dict[str, Any]:
    """Return the card, its driver, versions, commit and date."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "shape": shape, "commit": _commit(),
        "python": platform.python_version(), "num_cpus": len(os.sched_getaffinity(0)),
        "versions": {name: _version(name) for name in PACKAGES},
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name, "memory_gib": round(properties.total_memory / (1 << 30), 1),
            "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        }  # fmt: skip
    else:
        found |= {"device": f"{device.type}: no figure of a GPU"}
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    """Return a program's output, "" if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    environment = child_environment(*COMPUTE)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return done.stdout.strip() if done.returncode == 0 else ""


def _commit() -> str:
    """Return the commit of this folder, or of the variable `LORAFLEET_COMMIT` on a machine without git."""
    return os.environ.get("LORAFLEET_COMMIT", "") or _output("git", "rev-parse", "HEAD")


def case_of(cases: Sequence[Mapping[str, Any]], **wanted: Any) -> Mapping[str, Any] | None:
    """Return the first case with these values, None without any."""
    return next((case for case in cases if all(case.get(key) == value for key, value in wanted.items())), None)


def bars(sections: Sections) -> list[Bar]:
    """Return the targets for a GPU with the measured values."""
    return [*_speed_bars(sections), *_kernel_bars(sections), *_churn_bars(sections)]


def _bar(what: str, wanted: str, value: float | None, reached: Callable[[float], bool], unit: str = "") -> Bar:
    if value is None:
        return Bar(what, wanted, "not run", None)
    return Bar(what, wanted, f"{value:.2f}{unit}", reached(value))


def _speed_bars(sections: Sections) -> list[Bar]:
    cases = sections.get("steps", {}).get("cases", [])
    base = case_of(cases, num_adapters=0)
    mixed = case_of(cases, num_adapters=32, num_seqs=32)
    share: dict[str, float | None] = {"decode": None, "prefill": None}
    if base is not None and mixed is not None:
        share = {key: mixed[f"{key}_tok_s"] / base[f"{key}_tok_s"] for key in share}
    return [
        _bar("32 mixed adapters ÷ base, decode tok/s", "≥ 0.90", share["decode"], lambda value: value >= 0.9),
        _bar("32 mixed adapters ÷ base, prefill tok/s", "≥ 0.85", share["prefill"], lambda value: value >= 0.85),
    ]


def _kernel_bars(sections: Sections) -> list[Bar]:
    share = sections.get("kernels", {}).get("decode_bandwidth_share_median")
    return [_bar("kernels at decode ÷ copy bandwidth, median", "≥ 0.80", share, lambda value: value >= 0.8)]


def _churn_bars(sections: Sections) -> list[Bar]:
    found = sections.get("churn", {})
    flat = cold = None
    if "churn" in found:
        fits, twice = found["churn"].values()
        flat = twice["ttft_p50_ms"] / fits["ttft_p50_ms"]
        cold = found["isolation"]["beside cold"]["p99_ms"] / found["isolation"]["alone"]["p99_ms"]
    return [
        _bar("TTFT at twice the slots ÷ where all fit, p50", "flat: ≤ 1.5 ×", flat, lambda value: value <= 1.5, " ×"),
        _bar("inter-token p99 beside cold loads ÷ alone", "≤ 1.1 ×", cold, lambda value: value <= 1.1, " ×"),
    ]


def page(about: Mapping[str, Any], sections: Sections) -> str:
    """Return the whole page as Markdown."""
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items() if value)
    card = ", ".join(
        str(about[key]) + unit
        for key, unit in (("device", ""), ("memory_gib", " GiB"), ("capability", " capability"))
        if key in about
    )
    driver = f", driver {about['driver']}, CUDA {about['cuda']}" if about.get("driver") else ""
    parts = [
        "# Measured on a GPU", "",
        f"`python -m benchmarks.gpu` wrote this on {about['date']}, at commit {about['commit'] or 'unknown'}.", "",
        f"- {card}{driver}; {about['num_cpus']} CPUs", f"- {versions}, Python {about['python']}",
        f"- {about['shape']}, random weights; adapters of all linear layers, random too", "",
        "## Bars", "", report.table(("what", "wanted", "measured", ""), [_row(bar) for bar in bars(sections)]),
    ]  # fmt: skip
    for name, (title, write, key) in _SECTIONS.items():
        found = sections.get(name, {"skipped": "it was not asked for"})
        parts += ["", f"## {title}", ""]
        if "failed" in found:
            parts += [f"Failed: {found['failed']}"]
        if "skipped" in found:
            parts += [f"Not run: {found['skipped']}."]
        if key in found:
            parts += write(found)
    return "\n".join(parts) + "\n"


def _row(bar: Bar) -> tuple[str, str, str, str]:
    return bar.what, bar.wanted, bar.measured, {True: "reached", False: "**missed**", None: ""}[bar.is_reached]


def _kernels(found: Mapping[str, Any]) -> list[str]:
    rows = [
        (case["kind"], case["name"], f"{case['us']:.1f}", f"{case['floor_us']:.1f}", f"{case['bandwidth_share']:.2f}")
        for case in found["cases"]
    ]
    head = f"Copies run at {found['copy_gb_s']:.0f} GB/s. Caches are cold before every call."
    return [head, "", report.table(("kernel", "case", "µs", "floor, µs", "floor ÷ measured"), rows)]


def _steps(found: Mapping[str, Any]) -> list[str]:
    rows: list[Sequence[object]] = []
    for case in found["cases"]:
        same = {key: case[key] for key in ("num_seqs", "graphs", "overlap")}
        base = case_of(found["cases"], num_adapters=0, **same)
        shares = ["", ""]
        if base is not None and case["num_adapters"]:
            shares = [f"{case[key] / base[key]:.2f}" for key in ("decode_tok_s", "prefill_tok_s")]
        ways = ["on" if case[key] else "off" for key in ("graphs", "overlap")]
        rows.append((
            case["num_seqs"], case["num_adapters"] or "base", *ways, f"{case['step_ms']:.2f}",
            f"{case['decode_tok_s']:.0f}", shares[0], f"{case['prefill_tok_s']:.0f}", shares[1],
        ))  # fmt: skip
    head = f"The median of {found['num_rounds']} rounds in which all cases took turns, `Engine.step` alone."
    header = (
        "sequences",
        "adapters",
        "graphs",
        "overlap",
        "step, ms",
        "decode tok/s",
        "of base",
        "prefill tok/s",
        "of base",
    )
    return [head, "", report.table(header, rows)]


def _churn(found: Mapping[str, Any]) -> list[str]:
    ttft = [(name, *(f"{value:.1f}" for value in case.values())) for name, case in found["churn"].items()]
    gaps = [
        (name, *(f"{case[key]:.2f}" for key in ("p50_ms", "p99_ms", "p99.9_ms", "max_ms")), int(case["num_others"]))
        for name, case in found["isolation"].items()
    ]
    return [
        f"Adapters of rank 16, a pool for {found['num_slots']}; the engine in its thread, no HTTP and no queue.", "",
        report.table(("asked for in a closed loop", "TTFT p50, ms", "p99", "longest"), ttft), "",
        report.table(("gaps of warm streams", "p50, ms", "p99", "p99.9", "longest", "other requests"), gaps),
    ]  # fmt: skip


def _peer(found: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            case["num_seqs"],
            case["num_adapters"] or "base",
            f"{case['decode_tok_s']:.0f}",
            f"{case['prefill_tok_s']:.0f}",
        )
        for case in found["cases"]
    ]
    return [
        f"vLLM {found['version']}, its offline interface, the same shape and adapters, prefix cache off.", "",
        report.table(("sequences", "adapters", "decode tok/s", "prefill tok/s"), rows),
    ]  # fmt: skip


_SECTIONS: dict[str, tuple[str, Callable[[Mapping[str, Any]], list[str]], str]] = {
    "steps": ("Decode and prefill", _steps, "cases"),
    "churn": ("Adapters that come and go", _churn, "churn"),
    "kernels": ("Kernels beside the bandwidth floor", _kernels, "cases"),
    "peer": ("vLLM in the same run", _peer, "cases"),
}
"""Title and writer of each section, and a key that its result has if it was measured."""

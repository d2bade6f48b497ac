"""A run as a report."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import orjson

from chaos.check import percentile
from chaos.run import Plan, Tally, by_kind


def machine() -> str:
    """Return what this machine is, in words."""
    cpu = Path("/proc/cpuinfo")
    names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{len(os.sched_getaffinity(0))} cores of {name}, Python {platform.python_version()}"


def as_markdown(tally: Tally, plan: Plan, words: Sequence[str]) -> str:
    """Return the report as Markdown."""
    total = sum(tally.calls.values())
    calls = ", ".join(f"{num:,} {style}" for style, num in sorted(tally.calls.items()))
    told = ", ".join(f"{num} {code}" for code, num in tally.told.most_common()) or "nothing"
    lines = [
        f"`python -m chaos {' '.join(words)}` on {machine()}, {datetime.date.today()}: {len(tally.hits)} faults in "
        f"{tally.elapsed_s / 60:.1f} minutes, {total:,} calls answered whole ({calls}), {tally.num_tokens:,} tokens; "
        f"unfinished attempts were told: {told}. Violations: {len(tally.violations)}.",
        "",
        "| fault | times | streams concerned | pause p50, s | p99 | longest |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    everything: list[float] = []
    for (kind, how), num in by_kind(tally.hits).items():
        pauses = tally.pauses.get((kind, how), [])
        everything += pauses
        lines.append(f"| {kind}: {how} | {num} | {len(pauses)} | {_quantiles(pauses)} |")
    lines.append(f"| all | {len(tally.hits)} | {len(everything)} | {_quantiles(everything)} |")
    lines += ["", "RSS in MB at begin and end: "]
    lines[-1] += ", ".join(f"{name} {a:.0f} → {b:.0f}" for name, (a, b) in tally.rss_mb.items()) + "."
    lines += [f"- {violation}" for violation in tally.violations[:50]]
    return "\n".join(lines) + "\n"


def as_json(tally: Tally, plan: Plan, words: Sequence[str]) -> bytes:
    """Return everything that was measured."""
    values = {
        "command": ["python", "-m", "chaos", *words],
        "machine": machine(),
        "date": str(datetime.date.today()),
        "seed": plan.seed,
        "elapsed_s": tally.elapsed_s,
        "faults": {f"{kind}: {how}": num for (kind, how), num in by_kind(tally.hits).items()},
        "calls": dict(tally.calls),
        "told": dict(tally.told),
        "num_tokens": tally.num_tokens,
        "pauses_s": {
            f"{kind}: {how}": sorted(round(pause, 3) for pause in pauses)
            for (kind, how), pauses in tally.pauses.items()
        },
        "rss_mb": tally.rss_mb,
        "violations": tally.violations,
    }
    return orjson.dumps(values, option=orjson.OPT_INDENT_2)


def _quantiles(values: list[float]) -> str:
    if not values:
        return "- | - | -"
    return f"{percentile(values, 0.5):.2f} | {percentile(values, 0.99):.2f} | {max(values):.2f}"

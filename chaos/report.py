"""The report of a run. `python -m chaos.report A/report.json B/report.json` merges several."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

from chaos.check import percentile
from chaos.faults import KILLS
from chaos.run import Plan, Tally


class Report(msgspec.Struct):
    """The results of one run, or of several."""

    command: str
    machine: str
    dates: list[str]
    elapsed_s: float
    faults: dict[str, int]  # "kind: how" -> times
    calls: dict[str, int]  # style -> calls answered completely
    told: dict[str, int]  # error code of an unfinished attempt -> times
    pauses_s: dict[str, list[float]]  # "kind: how" -> pause of each stream concerned
    num_tokens: int
    rss_mb: dict[str, tuple[float, float]]  # process -> (at the start, at the end)
    violations: list[str]
    num_runs: int = 1
    attacks: dict[str, int] = {}  # name -> rounds
    num_ended: int = 0  # jobs and batches whose end a webhook had to report
    num_webhooks: int = 0  # delivered webhooks
    num_unclear: int = 0  # conversations and files that a queue which lost power may have partly lost
    num_swaps: int = 0  # of workers from one base to another
    silences_s: dict[str, float] = {}  # base -> longest time without an answer once the faults were over


def report_of(tally: Tally, plan: Plan, words: Sequence[str]) -> Report:
    """Return the report of one run. words: its command-line arguments."""
    pauses = {f"{kind}: {how}": [round(s, 3) for s in values] for (kind, how), values in tally.pauses.items()}
    return Report(
        command=f"python -m chaos {' '.join(words)}",
        machine=machine(),
        dates=[str(datetime.date.today())],
        elapsed_s=tally.elapsed_s,
        faults=dict(Counter(f"{hit.kind}: {hit.how}" for hit in tally.hits)),
        calls=dict(tally.calls),
        told=dict(tally.told),
        pauses_s=pauses,
        num_tokens=tally.num_tokens,
        rss_mb=tally.rss_mb,
        attacks=dict(tally.attacks),
        num_ended=tally.num_ended,
        num_webhooks=tally.num_webhooks,
        num_unclear=tally.num_unclear,
        num_swaps=tally.num_swaps,
        silences_s=tally.silences_s,
        violations=[f"seed {plan.seed}: {violation}" for violation in tally.violations],
    )


def merged(reports: Sequence[Report]) -> Report:
    """Merge the reports of several runs into one."""
    first, *others = reports
    for other in others:
        for counts in ("faults", "calls", "told", "attacks"):
            mine = getattr(first, counts)
            for name, num in getattr(other, counts).items():
                mine[name] = mine.get(name, 0) + num
        for name, pauses in other.pauses_s.items():
            first.pauses_s.setdefault(name, []).extend(pauses)
        first.dates = sorted({*first.dates, *other.dates})
        first.elapsed_s += other.elapsed_s
        first.num_tokens += other.num_tokens
        first.num_ended += other.num_ended
        first.num_webhooks += other.num_webhooks
        first.num_unclear += other.num_unclear
        first.num_swaps += other.num_swaps
        for name, silence_s in other.silences_s.items():
            first.silences_s[name] = max(silence_s, first.silences_s.get(name, 0.0))
        first.violations += other.violations
        first.num_runs += other.num_runs
    return first


def machine() -> str:
    """Return a description of this machine."""
    cpu = Path("/proc/cpuinfo")
    names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{len(os.sched_getaffinity(0))} cores of {name}, Python {platform.python_version()}"


def as_markdown(report: Report) -> str:
    """Return the report as Markdown."""
    calls = ", ".join(f"{num:,} {style}" for style, num in sorted(report.calls.items()))
    told = ", ".join(f"{num} {code}" for code, num in sorted(report.told.items())) or "nothing"
    runs = "" if report.num_runs == 1 else f", {report.num_runs} such runs with a seed each"
    attacks = f"{sum(report.attacks.values())} rounds of {len(report.attacks)} attacks. " if report.attacks else ""
    unclear = f"{report.num_unclear} conversations or files met a power cut. " if report.num_unclear else ""
    told_of = f"{report.num_webhooks} webhooks told of {report.num_ended} ends. " if report.num_ended else ""
    silences = ", ".join(f"{name} {silence_s:.1f} s" for name, silence_s in sorted(report.silences_s.items()))
    swaps = f"{report.num_swaps} swaps; longest without an answer after the faults: {silences}. " if silences else ""
    num_kills = sum(num for name, num in report.faults.items() if name.partition(": ")[2] in KILLS)
    lines = [
        f"`{report.command}`{runs} on {report.machine}, {', '.join(report.dates)}: {sum(report.faults.values()):,} "
        f"faults, {num_kills:,} of them kills, in {report.elapsed_s / 60:.0f} min, "
        f"{sum(report.calls.values()):,} calls answered whole ({calls}), "
        f"{report.num_tokens:,} tokens. Attempts that were not: {told}. {attacks}{told_of}{unclear}{swaps}"
        f"**Violations: {len(report.violations)}.**",
        "",
        "| fault | times | streams concerned | pause p50, s | p99 | longest |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, num in sorted(report.faults.items()):
        lines.append(_row(name, num, report.pauses_s.get(name, [])))
    everything = [pause for pauses in report.pauses_s.values() for pause in pauses]
    lines.append(_row("all", sum(report.faults.values()), everything))
    if report.num_runs == 1:
        grown = ", ".join(f"{name} {a:.0f} → {b:.0f}" for name, (a, b) in report.rss_mb.items())
        lines += ["", f"RSS in MB at begin and end: {grown}."]
    lines += [f"- {violation}" for violation in report.violations[:50]]
    return "\n".join(lines) + "\n"


def _row(name: str, num: int, pauses: list[float]) -> str:
    shown = "- | - | -"
    if pauses:
        shown = f"{percentile(pauses, 0.5):.2f} | {percentile(pauses, 0.99):.2f} | {max(pauses):.2f}"
    return f"| {name} | {num:,} | {len(pauses):,} | {shown} |"


if __name__ == "__main__":
    print(as_markdown(merged([msgspec.json.decode(Path(name).read_bytes(), type=Report) for name in sys.argv[1:]])))

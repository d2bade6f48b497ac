"""The tables and the plot of a comparison with peers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.report import BLUE, GREEN, INK, MUTED, ORANGE, RED, plot, table

OURS = "Lorafleet"
COLORS = {"Lorafleet": BLUE, "vLLM": ORANGE, "llama.cpp": GREEN, "OpenVINO GenAI": RED}

Report = dict[str, Any]  # the JSON that run.py writes


def markdown(report: Report) -> str:
    """Return tables of every server's figures, and of our throughput divided by the peers'."""
    machine, load = report["machine"], report["load"]
    bf16 = ", AVX-512 bf16" if machine["avx512_bf16"] else ""
    lines = [
        f"{report['started_at']}, {machine['cpu']}, {machine['num_cpus']} CPUs{bf16}; {load['prompt_words']} words in, "
        f"{load['output_tokens']} tokens out, median of {load['rounds']} rounds.",
        "",
    ]
    levels = sorted({point["concurrency"] for point in report["points"]})
    shown = " / ".join(str(level) for level in levels)
    rows: list[list[str]] = []
    for server, scenario in dict.fromkeys((point["server"], point["scenario"]) for point in report["points"]):
        cells = []
        for key in ("tokens_per_s", "inter_token_p50_ms", "ttft_p50_ms"):
            found = {
                p["concurrency"]: p[key] for p in report["points"] if (p["server"], p["scenario"]) == (server, scenario)
            }
            cells.append(" / ".join(f"{found[level]:.0f}" if level in found else "-" for level in levels))
        rows.append([server, scenario, *cells])
    lines.append(table(("server", "load", f"tok/s at {shown}", "inter-token p50, ms", "TTFT p50, ms"), rows))
    if ratios := ratio_table(report, levels):
        lines += ["", ratios]
    if failed := sum(point["num_errors"] for point in report["points"]):
        lines += ["", f"{failed} requests failed: these figures are not comparable."]
    return "\n".join(lines) + "\n"


def ratio_table(report: Report, levels: list[int]) -> str:
    """Return a table of our tok/s divided by the peers'; empty unless both were measured."""
    best: dict[tuple[str, int], dict[str, float]] = {}
    for point in report["points"]:
        systems = best.setdefault((point["scenario"], point["concurrency"]), {})
        systems[point["system"]] = max(point["tokens_per_s"], systems.get(point["system"], 0.0))
    peers = sorted({point["system"] for point in report["points"]} - {OURS})
    if not peers or not any(OURS in systems for systems in best.values()):
        return ""
    rows: list[list[str]] = []
    for scenario in dict.fromkeys(point["scenario"] for point in report["points"]):
        for peer in ["the better peer", *peers]:
            cells = []
            for level in levels:
                systems = best.get((scenario, level), {})
                rivals = [systems[name] for name in peers if name in systems and peer in (name, "the better peer")]
                known = OURS in systems and rivals and max(rivals) > 0
                cells.append(f"{systems[OURS] / max(rivals):.2f}" if known else "-")
            rows.append([peer, scenario, *cells])
    return table((f"{OURS} ÷", "load", *(f"× at {level}" for level in levels)), rows)


def save_plot(report: Report, path: Path) -> None:
    """Draw the tok/s of each system as bars grouped by concurrency, one panel per load."""
    scenarios = list(dict.fromkeys(point["scenario"] for point in report["points"]))
    levels = sorted({point["concurrency"] for point in report["points"]})
    systems = [name for name in COLORS if any(point["system"] == name for point in report["points"])]

    def draw(axes: Sequence[Any]) -> None:
        for axis, scenario in zip(axes, scenarios, strict=True):
            width = 0.8 / len(systems)
            for offset, system in enumerate(systems):
                heights = [_best(report, system, scenario, level) for level in levels]
                places = [index + (offset - (len(systems) - 1) / 2) * width for index in range(len(levels))]
                bars = axis.bar(places, heights, width * 0.92, color=COLORS[system], label=system)
                axis.bar_label(bars, [f"{h:.0f}" if h else "" for h in heights], color=MUTED, fontsize=7, padding=1)
            axis.set_title(scenario)
            axis.set_xticks(range(len(levels)), [str(level) for level in levels])
            axis.set_xlabel("requests in flight")
            axis.grid(axis="x", visible=False)
        axes[0].set_ylabel("output tokens per second")
        axes[0].legend(frameon=False, labelcolor=INK)

    plot(path, len(scenarios), draw)


def _best(report: Report, system: str, scenario: str, level: int) -> float:
    return max(
        (
            point["tokens_per_s"]
            for point in report["points"]
            if (point["system"], point["scenario"], point["concurrency"]) == (system, scenario, level)
        ),
        default=0.0,
    )

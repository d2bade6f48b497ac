"""The tables and the plot of a comparison with peers."""

from pathlib import Path
from typing import Any

from lorafleet.bench.style import BLUE, GREEN, INK, MUTED, ORANGE, RED, plot_style

OURS = "Lorafleet"
COLORS = {
    "Lorafleet": BLUE, "vLLM": ORANGE, "llama.cpp": GREEN, "OpenVINO GenAI": RED,
}  # fmt: skip

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
    lines += [
        f"| server | load | tok/s at {shown} | inter-token p50, ms | TTFT p50, ms |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows = dict.fromkeys((point["server"], point["scenario"]) for point in report["points"])
    for server, scenario in rows:
        cells = []
        for key in ("tokens_per_s", "inter_token_p50_ms", "ttft_p50_ms"):
            found = {
                p["concurrency"]: p[key] for p in report["points"] if (p["server"], p["scenario"]) == (server, scenario)
            }
            cells.append(" / ".join(f"{found[level]:.0f}" if level in found else "-" for level in levels))
        lines.append(f"| {server} | {scenario} | {' | '.join(cells)} |")
    if ratios := ratio_lines(report, levels):
        lines += ["", *ratios]
    if failed := sum(point["num_errors"] for point in report["points"]):
        lines += ["", f"{failed} requests failed: these figures are not comparable."]
    return "\n".join(lines) + "\n"


def ratio_lines(report: Report, levels: list[int]) -> list[str]:
    """Return a table of our tok/s divided by the peers'; empty unless both were measured."""
    best: dict[tuple[str, int], dict[str, float]] = {}
    for point in report["points"]:
        systems = best.setdefault((point["scenario"], point["concurrency"]), {})
        systems[point["system"]] = max(point["tokens_per_s"], systems.get(point["system"], 0.0))
    peers = sorted({point["system"] for point in report["points"]} - {OURS})
    if not peers or not any(OURS in systems for systems in best.values()):
        return []
    header = " | ".join(f"× at {level}" for level in levels)
    lines = [f"| {OURS} ÷ | load | {header} |", "| --- | --- |" + " --- |" * len(levels)]
    for scenario in dict.fromkeys(point["scenario"] for point in report["points"]):
        for peer in ["the better peer", *peers]:
            cells = []
            for level in levels:
                systems = best.get((scenario, level), {})
                rivals = [systems[name] for name in peers if name in systems and peer in (name, "the better peer")]
                known = OURS in systems and rivals and max(rivals) > 0
                cells.append(f"{systems[OURS] / max(rivals):.2f}" if known else "-")
            lines.append(f"| {peer} | {scenario} | {' | '.join(cells)} |")
    return lines


def save_plot(report: Report, path: Path) -> None:
    """Draw the tok/s of each system as bars grouped by concurrency, one panel per load."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    scenarios = list(dict.fromkeys(point["scenario"] for point in report["points"]))
    levels = sorted({point["concurrency"] for point in report["points"]})
    systems = [name for name in COLORS if any(point["system"] == name for point in report["points"])]
    with mpl.rc_context(plot_style()):
        figure = Figure(figsize=(3.6 * len(scenarios), 3.4), layout="constrained", facecolor="white")
        axes = figure.subplots(1, len(scenarios), squeeze=False)[0]
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
        figure.savefig(path, dpi=150)


def _best(report: Report, system: str, scenario: str, level: int) -> float:
    return max(
        (
            point["tokens_per_s"]
            for point in report["points"]
            if (point["system"], point["scenario"], point["concurrency"]) == (system, scenario, level)
        ),
        default=0.0,
    )

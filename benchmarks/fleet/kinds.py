"""The cost of adapters of other kinds than LoRA: 32 streams of each group, compared with 32 LoRA streams of equal rows.

    python -m benchmarks.fleet.kinds [--model FOLDER] [--short]

Each stream has its own adapter on q_proj and down_proj. The groups alternate, so that other load on the machine affects
all of them. Kinds that are served as rank rows have 16 rows per layer, as LoRA has here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from peft import LoHaConfig, MissConfig, VeraConfig

from benchmarks.common import report
from benchmarks.common.fleet import Setup, fleet, quickstart_model, scratch_folder
from benchmarks.common.kinds import IA3, LORA, OFT, ROAD, Groups, make_kinds
from benchmarks.fleet.neighbours import run_beside, streams

NUM_STREAMS = 32
GROUPS: Groups = {
    "LoRA": [LORA],
    "LoHa, MiSS, VeRA and LoRA": [
        (LoHaConfig, {"r": 4, "init_weights": False}), (MissConfig, {"r": 16, "init_weights": False}),
        (VeraConfig, {"r": 16, "init_weights": False}), LORA,
    ],
    "IA3, RoAd, OFT and LoRA": [IA3, ROAD, OFT, LORA],
}  # fmt: skip


def measure(url: str, names: Mapping[str, list[str]], rounds: int, output_tokens: int) -> dict[str, np.ndarray]:
    """Return the inter-token gaps of each group in ms."""
    for own in names.values():
        run_beside(streams(url, own, 8), None)  # loads the adapters
    found: dict[str, list[np.ndarray]] = {title: [] for title in names}
    for _ in range(rounds):
        for title, own in names.items():
            found[title].append(run_beside(streams(url, own, output_tokens), None).gaps_ms())
    return {title: np.concatenate(parts) for title, parts in found.items()}


def main() -> None:
    """Measure, and print a table."""
    args = report.parser(__doc__).parse_args()
    model = args.model or quickstart_model()
    rounds, output_tokens = (2, 40) if args.short else (6, 100)
    with scratch_folder() as scratch:
        names = make_kinds(model, scratch / "adapters", GROUPS, NUM_STREAMS)
        with fleet(Setup(model, scratch / "adapters", scratch, ["--max-num-seqs", str(NUM_STREAMS)])) as running:
            gaps = measure(running.url, names, rounds, output_tokens)
    figures = {title: {"p50_ms": float(np.median(own)), "mean_ms": float(own.mean())} for title, own in gaps.items()}
    rows = [
        (title, f"{own['p50_ms']:.1f}", f"{own['mean_ms']:.1f}", f"{figures['LoRA']['mean_ms'] / own['mean_ms']:.2f}")
        for title, own in figures.items()
    ]
    about = {"machine": report.machine(), "rounds": rounds, "output_tokens": output_tokens}
    report.save(args.out / "kinds", {**about, "figures": figures})
    print(f"{report.machine()}, {rounds} rounds of {output_tokens} tokens")
    print(report.table(("32 streams of", "inter-token p50, ms", "mean", "throughput ÷ LoRA's"), rows))


if __name__ == "__main__":
    main()

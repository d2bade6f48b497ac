"""What adapters of other kinds than LoRA cost: 32 streams of each group, beside 32 streams of LoRA of the same rows.

    python -m benchmarks.fleet.kinds [--model FOLDER] [--short]

Each stream has an adapter of its own on q_proj and down_proj. The groups take turns, so that load of the machine meets
all of them. Kinds as rank rows have 16 rows a layer, as LoRA has here.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    RoadConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from benchmarks.common import report
from benchmarks.common.fleet import Setup, fleet, quickstart_model, scratch_folder
from benchmarks.fleet.neighbours import run_beside, streams

NUM_STREAMS = 32
TARGETS = ["q_proj", "down_proj"]
GROUPS: dict[str, list[tuple[type[PeftConfig], dict[str, Any]]]] = {
    "LoRA": [(LoraConfig, {"r": 16})],
    "LoHa, MiSS, VeRA and LoRA": [
        (LoHaConfig, {"r": 4, "init_weights": False}), (MissConfig, {"r": 16, "init_weights": False}),
        (VeraConfig, {"r": 16, "init_weights": False}), (LoraConfig, {"r": 16}),
    ],
    "IA3, RoAd, OFT and LoRA": [
        (IA3Config, {"feedforward_modules": ["down_proj"]}), (RoadConfig, {"group_size": 64}),
        (OFTConfig, {"oft_block_size": 32, "init_weights": False}), (LoraConfig, {"r": 16}),
    ],
}  # fmt: skip


def make_kinds(model: Path, root: Path) -> dict[str, list[str]]:
    """Write NUM_STREAMS adapters of each group, each with numbers of its own; return their names by group."""
    names: dict[str, list[str]] = {}
    for group, (title, kinds) in enumerate(GROUPS.items()):
        for index, (config, options) in zip(range(NUM_STREAMS), itertools.cycle(kinds)):
            name = f"group-{group}-{index}"
            names.setdefault(title, []).append(name)
            torch.manual_seed(index)
            base = AutoModelForCausalLM.from_pretrained(model)
            fields = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adapted: Any = get_peft_model(base, config(**fields))
                with torch.no_grad():
                    for parameter in adapted.parameters():
                        if parameter.requires_grad:
                            parameter += 0.02 * torch.randn_like(parameter)
                adapted.save_pretrained(str(root / name))
    return names


def measure(url: str, names: Mapping[str, list[str]], rounds: int, output_tokens: int) -> dict[str, np.ndarray]:
    """Return the inter-token gaps of each group, ms."""
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
        names = make_kinds(model, scratch / "adapters")
        with fleet(Setup(model, scratch / "adapters", scratch, ["--max-num-seqs", str(NUM_STREAMS)])) as running:
            gaps = measure(running.url, names, rounds, output_tokens)
    figures = {title: {"p50_ms": float(np.median(own)), "mean_ms": float(own.mean())} for title, own in gaps.items()}
    rows = [
        (title, f"{own['p50_ms']:.1f}", f"{own['mean_ms']:.1f}", f"{figures['LoRA']['mean_ms'] / own['mean_ms']:.2f}")
        for title, own in figures.items()
    ]
    about = {"machine": report.machine(), "rounds": rounds, "output_tokens": output_tokens}
    report.save(args.out / "kinds", {**about, "figures": figures}, 1,
                lambda axes: axes[0].bar(list(figures), [own["mean_ms"] for own in figures.values()]))  # fmt: skip
    print(f"{report.machine()}, {rounds} rounds of {output_tokens} tokens")
    print(report.table(("32 streams of", "inter-token p50, ms", "mean", "throughput ÷ LoRA's"), rows))


if __name__ == "__main__":
    main()

"""The cost for rank-8 adapters of one rank-128 adapter in their batch.

    python -m benchmarks.fleet.mixed_ranks [--model FOLDER] [--short]

Eight streams of eight rank-8 adapters are measured alternately: alone, with a ninth stream of rank 8, and with a ninth
one of rank 128. The ninth stream of rank 8 shows the cost of any additional stream; the rest is the cost of the rank.
"""

from __future__ import annotations

import numpy as np

from benchmarks.common import report
from benchmarks.common.fleet import Setup, fleet, make_adapters, quickstart_model, scratch_folder
from benchmarks.fleet.neighbours import run_beside, streams

USERS = [f"user-{index}" for index in range(8)]
NEIGHBOURS = {"alone": None, "beside rank 8": "small", "beside rank 128": "large"}
SMALL, LARGE = 8, 128


def main() -> None:
    """Measure, print a table, and save the figures."""
    args = report.parser(__doc__).parse_args()
    machine, model = report.machine(), args.model or quickstart_model()
    rounds, output_tokens = (2, 200) if args.short else (6, 400)
    gaps: dict[str, list[np.ndarray]] = {name: [] for name in NEIGHBOURS}
    with scratch_folder() as scratch:
        adapters = scratch / "adapters"
        make_adapters(model, adapters, [*USERS, "small"], [SMALL])
        make_adapters(model, adapters, ["large"], [LARGE])
        with fleet(Setup(model, adapters, scratch)) as running:
            run_beside(streams(running.url, [*USERS, "small", "large"], 8), None)  # loads the adapters
            for _ in range(rounds):
                for name, neighbour in NEIGHBOURS.items():
                    users = streams(running.url, USERS, output_tokens)
                    others = streams(running.url, [neighbour], 4 * output_tokens) if neighbour else None
                    gaps[name].append(run_beside(users, others).gaps_ms())
    pooled = {name: np.concatenate(parts) for name, parts in gaps.items()}
    figures = {
        name: {f"p{q}_ms": float(np.percentile(values, q)) for q in (50, 90, 99)} for name, values in pooled.items()
    }
    base = figures["beside rank 8"]["p50_ms"]
    rows = [
        (name, *(f"{value:.1f}" for value in row.values()), f"{row['p50_ms'] / base:.2f}")
        for name, row in figures.items()
    ]
    about = {"rounds": rounds, "output_tokens": output_tokens, "num_users": len(USERS)}
    report.save(args.out / "mixed-ranks", {"machine": machine, **about, "figures": figures})
    print(report.table(("rank-8 users", "inter-token p50, ms", "p90", "p99", "p50 ÷ beside rank 8"), rows))


if __name__ == "__main__":
    main()

"""All fuzzing targets, and the distribution of a run's cases among them."""

from __future__ import annotations

from collections.abc import Sequence

from hostile.fuzz import adapters, http, messages, queue, sandboxed, tokenizer_files
from hostile.fuzz.engine import Result, Target, run

TARGETS: tuple[Target, ...] = (
    *adapters.TARGETS,
    *messages.TARGETS,
    *queue.TARGETS,
    *http.TARGETS,
    *sandboxed.TARGETS,
    *tokenizer_files.TARGETS,
)


def shares(names: Sequence[str], num_cases: int) -> dict[str, int]:
    """Return each target's number of cases: `num_cases` in total, inversely proportional to the cost of a case."""
    weights = {target.name: 1 / target.cost for target in TARGETS if target.name in names}
    return {name: -int(-num_cases * weight // sum(weights.values())) for name, weight in weights.items()}


def run_named(name: str, num_cases: int, seed: int) -> Result:
    """Run the target of a name, and print a line at its end."""
    (target,) = (target for target in TARGETS if target.name == name)
    result = run(target, num_cases, seed)
    print(f"{name}: {result.num_cases:,} cases in {result.seconds:.0f} s{result.crash and ', a crash'}", flush=True)
    return result

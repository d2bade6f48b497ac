"""Which worker to remove at a scale-in: the one that the scheduler names, a random one, or the most valuable one.

`python -m benchmarks.simulation.scale_in`. It runs the scheduler's own code with simulated workers, seeded: five
workers serve adapters of a Zipf distribution, and after 100 s one of them drains. It counts the adapters that the
others fetch in the next minute, over ten loads each.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from benchmarks.common.report import table
from benchmarks.simulation.load import SyntheticLoad, adapters, generate
from benchmarks.simulation.run import Simulation
from benchmarks.simulation.worker import WorkerModel
from scheduler.config import SchedulerConfig
from scheduler.core import Scheduler
from scheduler.scale_in import costs_ms

NUM_WORKERS = 5
SECONDS, AT_S = 160, 100
SEEDS = range(10)
LOADS = ((60, 1.2), (300, 1.5), (300, 1.0))
"""(number of adapters, Zipf exponent of their popularity)."""
Choose = Callable[[dict[str, float]], str]


def fetched(num: int, zipf: float, seed: int, choose: Choose) -> int:
    """Return the adapters fetched after a worker drains. choose: returns that worker, given each one's cost."""
    facts = adapters(num, seed)
    scheduler = Scheduler(SchedulerConfig())
    for digest, known in facts.items():
        scheduler.placement.learn(digest, known)

    def pick(now_ms: float) -> str:
        placement = scheduler.placement
        wanted = {digest: scheduler.popularity.of(digest, now_ms) for digest in facts}
        workers = list(scheduler.workers.available())
        return choose(costs_ms(workers, wanted.__getitem__, placement.facts_of, placement.bandwidths))

    load = SyntheticLoad(rate=4, seconds=SECONDS, num_adapters=num, zipf=zipf, prompt_tokens=128, seed=seed)
    simulation = Simulation(scheduler, WorkerModel(), NUM_WORKERS, facts, (1000.0 * AT_S, pick))
    result = simulation.run(list(generate(load)))
    return result.num_fetches - result.num_fetched_before


def main() -> None:
    """Run all combinations, and print the table."""
    rows: list[list[object]] = []
    for num, zipf in LOADS:
        found: list[list[int]] = []
        for seed in SEEDS:
            rng = random.Random(seed)
            ways: tuple[Choose, ...] = (
                lambda costs: min(costs, key=costs.__getitem__),
                lambda costs, rng=rng: rng.choice(sorted(costs)),
                lambda costs: max(costs, key=costs.__getitem__),
            )
            found.append([fetched(num, zipf, seed, choose) for choose in ways])
        rows.append([num, zipf, *(sum(one) for one in zip(*found, strict=True))])
    print(table(["adapters", "zipf", "the one that is named", "any", "the one worth most"], rows))


if __name__ == "__main__":
    main()

"""Who should leave the adapter pool: GDSF as the worker's own `PagePool` has it, beside LRU, on Zipf traces.

`python -m benchmarks.eviction --json FILE`. Simulated, no model: a request takes a reference to its adapter, some
requests run at once, an adapter that is not in the pool has to be loaded. Seeded: every run gives the same numbers.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gpu_worker.pool import PagePool, Resident

RANKS = (8, 16, 32, 64)
PAGE_ROWS = 16
PAGE_BYTES = 1 << 20
LATENCY_S = 0.01  # of a fetch
BYTES_PER_S = 2e8


@dataclass(slots=True)
class LruPool(PagePool):
    """A pool whose least recently used adapter leaves."""

    num_touches: int = 0

    def _touch(self, resident: Resident) -> None:
        self.num_touches += 1
        resident.priority = float(self.num_touches)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trace cost under one policy."""

    policy: str
    zipf: float
    hit_rate: float
    num_loads: int
    loaded_bytes: int
    load_s: float


def run(policy: str, zipf: float, *, num_adapters: int, num_slots: int, num_requests: int, num_running: int) -> Outcome:
    """Play one trace; the first tenth warms the pool and is not counted."""
    random = np.random.default_rng(0)
    weights = np.arange(1, num_adapters + 1) ** -zipf
    trace = random.choice(num_adapters, num_requests, p=weights / weights.sum())
    pages = [-(-RANKS[rank] // PAGE_ROWS) for rank in random.integers(0, len(RANKS), num_adapters)]
    cost: Callable[[str], float] = lambda digest: LATENCY_S + pages[int(digest)] * PAGE_BYTES / BYTES_PER_S  # noqa: E731
    kind = LruPool if policy == "LRU" else PagePool
    pool = kind((round(num_slots * float(np.mean(pages))),), (PAGE_BYTES,), num_adapters, cost)
    running: deque[str] = deque()
    hits = loads = loaded_bytes = 0
    load_s = 0.0
    for i, adapter in enumerate(trace):
        digest, counted = str(adapter), i >= num_requests // 10
        if len(running) == num_running:
            pool.release(running.popleft())
        if digest in pool.residents:
            hits += counted
        else:
            while pool.reserve(digest, (pages[adapter],)) is None:
                pool.release(running.popleft())  # those in use never leave: it waits for one of them
            pool.publish(digest)
            loads += counted
            loaded_bytes += counted * pages[adapter] * PAGE_BYTES
            load_s += counted * cost(digest)
        pool.acquire(digest)
        running.append(digest)
    pool.check_integrity()
    return Outcome(policy, zipf, round(hits / (hits + loads), 4), loads, loaded_bytes, round(load_s, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--slots", type=int, default=64, help="adapters of mean size that the pool holds")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--running", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    outcomes = [
        run(
            policy, zipf, num_adapters=args.adapters, num_slots=args.slots, num_requests=args.requests,
            num_running=args.running,
        )
        for zipf in (0.8, 1.0, 1.2)
        for policy in ("LRU", "GDSF")
    ]  # fmt: skip
    for outcome in outcomes:
        print(
            f"zipf {outcome.zipf}  {outcome.policy:5} hits {outcome.hit_rate:.1%}  loads {outcome.num_loads}"
            f"  {outcome.loaded_bytes / 1e9:.2f} GB  {outcome.load_s:.1f} s"
        )
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({"settings": settings, "outcomes": [asdict(o) for o in outcomes]}, indent=1))


if __name__ == "__main__":
    main()

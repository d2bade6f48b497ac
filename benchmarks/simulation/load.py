"""Loads to simulate, generated from rates and popularity."""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from benchmarks.simulation.run import Arrival
from protocol.wire import messages as m
from protocol.wire.keys import INTERACTIVE
from scheduler.placement import AdapterFacts

RANKS = (8, 16, 32, 64)
BYTES_PER_RANK = 1_250_000

FAR_AHEAD_MS = 1 << 50
"""A deadline that no simulation reaches."""


@dataclass(frozen=True, slots=True)
class SyntheticLoad:
    """A generated load: Poisson arrivals, Zipf-popular adapters, exponentially distributed lengths."""

    rate: float  # requests per second
    seconds: float
    num_adapters: int = 1000
    zipf: float = 1.0  # popularity of the i-th adapter ~ 1 / i^zipf
    num_tenants: int = 8  # 0: each adapter is a tenant
    prompt_tokens: int = 256  # mean
    output_tokens: int = 128  # mean
    seed: int = 0


def adapters(num: int, seed: int = 0) -> dict[str, AdapterFacts]:
    """Return `num` adapters, "a0", "a1", …, of mixed ranks."""
    rng = random.Random(f"adapters {seed}")
    ranks = {f"a{i}": rng.choice(RANKS) for i in range(num)}
    return {digest: AdapterFacts(rank, rank * BYTES_PER_RANK) for digest, rank in ranks.items()}


def generate(load: SyntheticLoad) -> Iterator[Arrival]:
    """Yield the requests of a load, ordered by time."""
    rng = random.Random(load.seed)
    popularity = list(accumulate((i + 1) ** -load.zipf for i in range(load.num_adapters)))
    at_ms, number = 0.0, 0
    while (at_ms := at_ms + 1000 * rng.expovariate(load.rate)) < 1000 * load.seconds:
        digest = f"a{bisect.bisect(popularity, rng.random() * popularity[-1])}" if popularity else ""
        tenant = f"t{rng.randrange(load.num_tenants)}" if load.num_tenants else digest
        num_prompt = 1 + int(rng.expovariate(1 / load.prompt_tokens))
        num_output = 1 + int(rng.expovariate(1 / load.output_tokens))
        sub = m.RequestHead(
            rid=f"r{number}", tenant=tenant, cls=INTERACTIVE, digest=digest, num_prompt_tokens=num_prompt,
            max_new_tokens=4 * load.output_tokens + num_output, deadline_ms=FAR_AHEAD_MS, gateway="",
        )  # fmt: skip
        number += 1
        yield Arrival(at_ms, sub, num_output)

"""Virtual token counters: who has had how much. Sheng et al., "Fairness in serving large language models", 2024."""

from __future__ import annotations

from collections import Counter

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0

HEADROOM = 0.125
"""Share of the fleet's capacity that no tenant takes alone, while others come now and then."""

RECENT_MS = 20_000.0


class Headroom:
    """Keeps room for those who ask now and then. A flood on an idle fleet would else fill it whole, at one moment,
    with requests that also end at one moment: counters decide only about what is free."""

    def __init__(self) -> None:
        self.running: Counter[str] = Counter()
        """Tenant -> requests it has on workers."""
        self._last_ms: dict[str, float] = {}  # tenant -> when it last asked, the longest ago first

    def asked(self, tenant: str, now_ms: float) -> None:
        """Note that a tenant has sent a request."""
        self._last_ms.pop(tenant, None)
        self._last_ms[tenant] = now_ms

    def allows(self, tenant: str, capacity: int, now_ms: float) -> bool:
        """Tell whether a tenant may have one more request on a fleet of this capacity."""
        if self.running[tenant] < capacity - max(1, int(capacity * HEADROOM)):
            return True
        while self._last_ms and now_ms - (oldest := next(iter(self._last_ms.items())))[1] > RECENT_MS:
            del self._last_ms[oldest[0]]
        return not (self._last_ms.keys() - {tenant})


class TokenCounters:
    """Service per tenant, in tokens over its weight. The tenant with the least is served first.

    `level` is the least counter among the tenants being served. A tenant that had nothing queued gained no claim by
    that: `lift` raises it to `level`. One whose requests could not run, because their adapters were not there, may
    be behind `level` by at most `max_lag`. Counters never fall.
    """

    def __init__(self, max_lag: float) -> None:
        self._max_lag = max_lag
        self._counters: dict[str, float] = {}
        self._prune_at = 1024
        self.level = 0.0

    def __getitem__(self, tenant: str) -> float:
        """Return a tenant's counter; one that is not known is at `level`."""
        return self._counters.get(tenant, self.level)

    def __len__(self) -> int:
        return len(self._counters)

    def lift(self, tenant: str) -> float:
        """Return the counter of a tenant that becomes active, raised to `level`."""
        counter = self._counters[tenant] = max(self[tenant], self.level)
        return counter

    def serve(self, tenant: str, counter: float, least_passed_over: float | None) -> None:
        """Note that a tenant at `counter` was served, though one at `least_passed_over` could have been."""
        missed = self.level - self._max_lag - counter
        if missed > 0:
            self._counters[tenant] = self[tenant] + missed
            counter += missed
        self.level = max(self.level, counter if least_passed_over is None else min(counter, least_passed_over))

    def rise_to(self, tenant: str) -> None:
        """Note that nothing was queued for a while, after the last request of `tenant`: nobody waited for anybody."""
        self.level = max(self.level, self[tenant])

    def charge(self, tenant: str, num_input_tokens: int, num_output_tokens: int, weight: float) -> None:
        """Add service that a tenant has had."""
        cost = (INPUT_WEIGHT * num_input_tokens + OUTPUT_WEIGHT * num_output_tokens) / weight
        self._counters[tenant] = self[tenant] + cost
        if len(self._counters) > self._prune_at:
            # What is at or below `level` would be lifted to it anyway when its tenant returns.
            self._counters = {name: value for name, value in self._counters.items() if value > self.level}
            self._prune_at = max(1024, 2 * len(self._counters))

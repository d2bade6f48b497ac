"""Virtual token counters: who has had how much. Sheng et al., "Fairness in serving large language models", 2024."""

from __future__ import annotations

import math
from collections import Counter

from scheduler.request import decrement

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0

RECENT_MS = 20_000.0
"""How long after its last request a tenant still counts as one that asks now and then."""


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


class Shares:
    """Which tenants have more than their share, and give way while others, who have less, ask now and then.

    Shares are max-min fair: where the open requests of all, queued or running, are more than the places that are not
    kept free, a tenant's share are so many of them, by its weight, that what those with less leave is divided among
    the rest. Where all fit, it is as many as are kept free: a crowd is noticed before it has filled the fleet. A
    tenant has less if no more of its requests are open than that, and no tenant with more is further than
    `slack_tokens` behind it: one that asks for little at a time, but without a pause, would otherwise be served before
    all others. Counters alone protect nobody who asks now and then: they decide only about what is free, and a flood
    fills an idle fleet at one moment.
    """

    def __init__(self, counters: TokenCounters, slack_tokens: float) -> None:
        self._counters = counters
        self._slack_tokens = slack_tokens
        self.num_open: Counter[str] = Counter()
        """Tenant -> its requests that have not ended, queued or running; batch work does not count."""
        self._kinds: Counter[tuple[int, float]] = Counter()  # (open requests, weight) -> tenants that have both
        self._last_ms: dict[str, float] = {}  # tenant -> when it last asked, the longest ago first
        self._weights: dict[str, float] = {}  # of the same tenants
        self._share = math.inf  # open requests that a tenant of weight 1 may have
        self._least_over = math.inf  # counter of the tenants with more
        self._some_have_less = False

    def asked(self, tenant: str, weight: float, now_ms: float) -> None:
        """Note that a tenant has sent a request."""
        self._last_ms.pop(tenant, None)
        self._last_ms[tenant] = now_ms
        self._set(tenant, self.num_open[tenant] + 1, weight)

    def ended(self, tenant: str) -> None:
        """Note that a request has ended."""
        self._set(tenant, self.num_open[tenant] - 1, self._weights[tenant])

    def begin(self, num_places: int, num_kept: int, now_ms: float) -> None:
        """Look at all tenants anew, for a fleet with `num_places`, of which `num_kept` are kept for those with less."""
        self._forget_old(now_ms)
        self._share = self._fair_share(num_places - num_kept, num_kept)
        self._least_over = math.inf
        self._some_have_less = False
        if self._share < math.inf:
            share, weights = self._share, self._weights
            over = [tenant for tenant, num in self.num_open.items() if num > share * weights[tenant]]
            self._least_over = min(map(self._counters.__getitem__, over), default=math.inf)
            self._some_have_less = not all(map(self.is_over, weights))

    def gives_way(self, tenant: str, *, batch: bool = False) -> bool:
        """Tell whether a tenant's next request gives way to others; one of class `batch` does to all that are not."""
        return bool(self._weights) if batch else self._some_have_less and self.is_over(tenant)

    def is_over(self, tenant: str) -> bool:
        """Tell whether a tenant has more than its share, whether or not there are others who have less."""
        if max(1, self.num_open[tenant]) > self._share * self._weights[tenant]:
            return True
        return self._counters[tenant] > self._least_over + self._slack_tokens

    def _fair_share(self, num_places: int, if_all_fit: int) -> float:
        """Return the open requests per weight up to which all tenants together fill so many places.

        Infinite if not even one of each fits: then counters alone say who is next.
        """
        asking = sorted((num / own, own * num_tenants) for (num, own), num_tenants in self._kinds.items())
        left, weight = float(num_places), sum(own for _, own in asking)
        for num, own in asking:
            if num * weight >= left:
                share = left / weight
                return share if share * max(own for _, own in self._kinds) >= 1 else math.inf
            left -= num * own
            weight -= own
        return if_all_fit / min((own for _, own in self._kinds), default=1.0)

    def _set(self, tenant: str, num: int, weight: float) -> None:
        if before := self.num_open[tenant]:
            decrement(self._kinds, (before, self._weights[tenant]))
        self._weights[tenant] = weight
        if num:
            self.num_open[tenant] = num
            self._kinds[num, weight] += 1
        else:
            del self.num_open[tenant]

    def _forget_old(self, now_ms: float) -> None:
        while self._last_ms and now_ms - self._last_ms[tenant := next(iter(self._last_ms))] > RECENT_MS:
            del self._last_ms[tenant]
            if self.num_open[tenant]:
                self._last_ms[tenant] = now_ms  # it waits, which is a way of asking
            else:
                del self._weights[tenant]

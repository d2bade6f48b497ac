"""Fairness: the next tenant and the requests that yield, by virtual token counters and max-min fair shares. Pure.

Virtual token counters: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024. Max-min fair shares:
Bertsekas and Gallager, "Data Networks", 1992, section 6.5.
"""

from __future__ import annotations

import math
from collections import Counter

from protocol.wire.keys import BATCH
from scheduler.request import QueuedRequest, decrement

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0

RECENT_MS = 20_000.0
"""Milliseconds after a tenant's last request during which another tenant does not count as alone."""


class VirtualTokenCounters:
    """Service per tenant, in weighted tokens divided by the tenant's weight. The tenant with the least is next.

    `level` is the lowest counter among the tenants being served. A tenant does not gain a claim while nothing of it is
    queued: `lift` raises its counter to `level`. If a tenant's requests cannot run because their adapters are not
    resident, its counter may lag behind `level` by at most `max_lag` tokens. Counters never fall.
    """

    def __init__(self, max_lag: float) -> None:
        self._max_lag = max_lag
        self._counters: dict[str, float] = {}
        self._prune_at = 1024
        self.level = 0.0

    def __getitem__(self, tenant: str) -> float:
        """Return a tenant's counter; `level` for an unknown tenant."""
        return self._counters.get(tenant, self.level)

    def __len__(self) -> int:
        return len(self._counters)

    def lift(self, tenant: str) -> float:
        """Raise the counter of a tenant that becomes active to `level`, and return it."""
        counter = self._counters[tenant] = max(self[tenant], self.level)
        return counter

    def serve(self, tenant: str, counter: float, least_held: float | None) -> None:
        """Record that a tenant was served when its counter was `counter`.

        least_held: lowest counter among tenants whose held request was overtaken, None without any; `level` does not
        rise above it.
        """
        missed = self.level - self._max_lag - counter
        if missed > 0:
            self._counters[tenant] = self[tenant] + missed
            counter += missed
        self.level = max(self.level, counter if least_held is None else min(counter, least_held))

    def rise_to(self, tenant: str) -> None:
        """Raise `level` to the counter of the last tenant served, because the queue was empty after it."""
        self.level = max(self.level, self[tenant])

    def charge(self, tenant: str, num_input_tokens: int, num_output_tokens: int, weight: float) -> None:
        """Add the tokens that a tenant has received to its counter."""
        cost = (INPUT_WEIGHT * num_input_tokens + OUTPUT_WEIGHT * num_output_tokens) / weight
        self._counters[tenant] = self[tenant] + cost
        if len(self._counters) > self._prune_at:
            # A counter at or below `level` would be raised to it anyway when its tenant returns.
            self._counters = {name: value for name, value in self._counters.items() if value > self.level}
            self._prune_at = max(1024, 2 * len(self._counters))


class FairShares:
    """Decides which requests yield to others: those of tenants with more than their max-min fair share.

    The slots of all workers are shared, and a tenant's use is its number of open requests: interactive ones, queued or
    running. If the open requests of all tenants exceed the unreserved slots, a tenant that asks for less than its share
    gets all that it asks for, and the rest is divided by weight. If all fit, a share is the number of reserved slots,
    so that a flood is noticed before it has filled the workers.

    Two more kinds of tenants yield. The first is a tenant that is alone, while no other has open requests or has asked
    recently, so that a newcomer need not wait for it. Among yielding requests, workers prefer those of a tenant that
    was alone. The second is a tenant whose counter is more than `slack_tokens` above that of a tenant over its share.
    Otherwise, a tenant with few requests at a time but no pause between them would always be served first.

    Counters alone would not protect tenants that ask only sometimes: they decide about free slots only, and a flood can
    fill all workers at once.
    """

    def __init__(self, counters: VirtualTokenCounters, slack_tokens: float) -> None:
        self._counters = counters
        self._slack_tokens = slack_tokens
        self.num_open: Counter[str] = Counter()
        """Number of open requests per tenant; tenants without any are missing."""
        self._weights: dict[str, float] = {}  # weight by tenant, for the tenants in `num_open`
        self._demands: Counter[tuple[int, float]] = Counter()  # (open requests, weight) -> number of such tenants
        self._asked_ms: dict[str, float] = {}  # tenant -> ms of its last request, the oldest first
        self._is_alone = True  # whether at most one tenant has open or recent requests
        self._share = math.inf  # maximum open requests of a tenant of weight 1 within its share
        self._least_over: float | None = None  # lowest counter of tenants over their share, computed on demand

    def opened(self, tenant: str, weight: float, now_ms: float) -> None:
        """Count a submitted request."""
        self._asked_ms.pop(tenant, None)
        self._asked_ms[tenant] = now_ms
        self._set(tenant, self.num_open[tenant] + 1, weight)

    def closed(self, tenant: str) -> None:
        """Count the end of a request."""
        self._set(tenant, self.num_open[tenant] - 1, self._weights[tenant])

    def update(self, num_places: int, num_reserved: int, now_ms: float) -> None:
        """Compute the fair share of the workers' `num_places` slots, of which `num_reserved` are reserved."""
        while self._asked_ms and now_ms - self._asked_ms[tenant := next(iter(self._asked_ms))] > RECENT_MS:
            del self._asked_ms[tenant]
        is_one = len(self.num_open) <= 1 and len(self._asked_ms) <= 1
        self._is_alone = is_one and len(self.num_open.keys() | self._asked_ms.keys()) <= 1
        self._share = self._fair_share(num_places - num_reserved, num_reserved)
        self._least_over = None

    def yields(self, request: QueuedRequest) -> bool:
        """Return whether a request yields: batch work does, and other resumed requests do not."""
        if request.submit.cls == BATCH:
            return True
        return not request.resumed and self.tenant_yields(request.submit.tenant)

    def tenant_yields(self, tenant: str) -> bool:
        """Return whether a tenant's next interactive request yields."""
        if self._is_alone or self._is_over(tenant):
            return True
        if self._least_over is None:
            over = (self._counters[name] for name in self.num_open if self._is_over(name))
            self._least_over = min(over, default=math.inf)
        return self._counters[tenant] > self._least_over + self._slack_tokens

    def is_alone(self, tenant: str) -> bool:
        """Return whether a tenant yields only because it is alone."""
        return self._is_alone and not self._is_over(tenant)

    def _is_over(self, tenant: str) -> bool:
        return tenant in self._weights and self.num_open[tenant] > self._share * self._weights[tenant]

    def _fair_share(self, num_places: int, if_all_fit: int) -> float:
        """Return the open requests per weight up to which all tenants together fill `num_places` slots.

        Infinite if not even one request of each tenant fits; counters alone decide then. if_all_fit: the share if all
        open requests fit.
        """
        asking = sorted((num / weight, weight * num_tenants) for (num, weight), num_tenants in self._demands.items())
        left, total_weight = float(num_places), sum(weight for _, weight in asking)
        for num, weight in asking:
            if num * total_weight >= left:
                share = left / total_weight
                return share if share * max(own for _, own in self._demands) >= 1 else math.inf
            left -= num * weight
            total_weight -= weight
        return if_all_fit / min((own for _, own in self._demands), default=1.0)

    def _set(self, tenant: str, num: int, weight: float) -> None:
        if before := self.num_open[tenant]:
            decrement(self._demands, (before, self._weights[tenant]))
        if num:
            self.num_open[tenant], self._weights[tenant] = num, weight
            self._demands[num, weight] += 1
        else:
            del self.num_open[tenant], self._weights[tenant]

"""Labels with untrusted values, such as names of adapters: the most used have their own series, all others share one.

Pure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from heapq import nlargest

from prometheus_client.metrics import MetricWrapperBase

OTHER = "other"
"""The label's value for all names without series of their own."""

CANDIDATES = 4
"""How many names are counted, as a multiple of those with series, so that a name in heavier use can get a series."""

RANK_S = 60.0
"""Seconds between selections of the most used names. Each selection halves the earlier counts."""


class TopNames:
    """The values of one label, of which at most `limit` have series.

    A free place is taken immediately. Once a minute the most used names get the places. A name without series needs
    twice the uses of one with series, so that two equally used names do not alternate. A dropped series is deleted and
    starts at 0 when its name returns, as after a restart: rates stay correct, and `other` never jumps.
    """

    def __init__(self, label: str, *metrics: MetricWrapperBase, now_s: Callable[[], float] = time.monotonic) -> None:
        """label: the label of `metrics` that has the names as values."""
        self._label = label
        self._metrics = metrics
        self._now_s = now_s
        self._limit = 100
        self._uses: dict[str, float] = {}  # use counts of names with series and of candidates
        self._named: set[str] = set()
        self._due_s = 0.0
        self.on_drop: Callable[[str], object] = lambda _: None
        """Called with each name that loses its series."""

    def set_limit(self, limit: int) -> None:
        """Set how many names may have series, at least 0; excess ones are dropped immediately."""
        self._limit = limit
        self._choose()

    def of(self, name: str) -> str:
        """Count a use of a name, and return the label's value: the name or `OTHER`."""
        if self._now_s() >= self._due_s:
            self._choose()
        uses = self._uses
        if name in uses:
            uses[name] += 1
        elif len(uses) < CANDIDATES * self._limit:
            uses[name] = 1
        if name in self._named:
            return name
        if len(self._named) < self._limit and name != OTHER:
            self._named.add(name)
            return name
        return OTHER

    def shown(self, name: str) -> str:
        """Return the label's value for a name, without counting a use of it."""
        return name if name in self._named else OTHER

    def _choose(self) -> None:
        """Give the series to the most used names, and drop the least used candidates."""
        uses, named = self._uses, self._named
        wanted = {name: uses.get(name, 0.0) * (2 if name in named else 1) for name in named | uses.keys()}
        kept = set(nlargest(self._limit, wanted, key=wanted.__getitem__)) - {OTHER}
        for name in named - kept:
            for metric in self._metrics:
                metric.remove_by_labels({self._label: name})
            self.on_drop(name)
        counted = nlargest(CANDIDATES * self._limit // 2, uses, key=uses.__getitem__)
        self._uses = {name: uses[name] / 2 for name in counted if uses[name] >= 1}
        self._named = kept
        self._due_s = self._now_s() + RANK_S

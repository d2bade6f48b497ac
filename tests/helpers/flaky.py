"""Makes service loops fail: each turn of the named loops raises `times` times, then the loop runs normally."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from prometheus_client import REGISTRY

from protocol.runtime.backoff import Backoff
from protocol.runtime.guarded import Loop

SOON = Backoff(0.005, 0.02)


class InjectedError(Exception):
    """An error that no loop expects."""


@dataclass
class Flaky:
    """Wraps the work of loops."""

    failing: frozenset[str]  # names of loops; "": all
    times: int = 3
    error: Callable[[], BaseException] = lambda: InjectedError("from a test")
    failed: Counter[str] = field(default_factory=Counter)
    begun: Counter[str] = field(default_factory=Counter)  # turns that did not fail
    names: set[str] = field(default_factory=set)

    def __call__(self, loop: Loop) -> Loop:
        """Return the loop that runs in place of `loop`."""
        self.names.add(loop.name)

        async def work() -> None:
            if (loop.name in self.failing or "" in self.failing) and self.failed[loop.name] < self.times:
                self.failed[loop.name] += 1
                raise self.error()
            self.begun[loop.name] += 1
            await loop.work()

        return replace(loop, work=work, backoff=SOON)

    def goes_on(self) -> bool:
        """Return whether all named loops have failed `times` times, and every loop has completed a turn."""
        due = self.names if "" in self.failing else self.failing
        return all(self.failed[name] == self.times for name in due) and all(self.begun[name] for name in self.names)


def failures(names: Iterable[str]) -> dict[str, float]:
    """Return the number of failures of each loop, from the metric."""
    return {n: REGISTRY.get_sample_value("lorafleet_loop_failures_total", {"loop": n}) or 0.0 for n in names}

"""Runs one fuzzing target: tries cases from a seed, counts their outcomes, and shrinks a crash to its smallest case."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.strategies import SearchStrategy

SLOW_S = 20.0
"""Seconds after which a case counts as a crash: far above every limit, so that a busy machine causes none."""

MAX_CPU_S = 1.0
"""Maximum CPU seconds for a case, of the thread that processes it, for services their event loop's. Cases are small and
take a few milliseconds; more is a crash."""

Check = Callable[[Any], str]
"""Tries one case and returns the name of its outcome. Raises an error that no input may cause."""


@dataclass(frozen=True, slots=True)
class OnLoop:
    """A check whose cases are processed by another thread, that of an event loop."""

    check: Check
    cpu_s: Callable[[], float]  # returns the CPU seconds of that thread

    def __call__(self, case: Any) -> str:
        """Try a case."""
        return self.check(case)


@dataclass(frozen=True, slots=True)
class Target:
    """A component that receives untrusted input."""

    name: str
    cases: SearchStrategy[Any]
    opened: Callable[[], AbstractContextManager[Check]]
    cost: float = 1.0  # relative cost of a case; 1 for the cheapest targets. A run's cases are distributed by it


@dataclass(slots=True)
class Result:
    """The results of a target's cases."""

    target: str
    num_cases: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    most_cpu_s: float = 0.0  # of the thread that processes cases
    crash: str = ""  # the smallest crashing case and its error; "": none


class _TooSlow(BaseException):  # not an Exception: hypothesis would repeat it to shrink it
    """A case took too long."""


def pure(check: Check) -> Callable[[], AbstractContextManager[Check]]:
    """Return an opener for a target that needs no setup."""

    @contextmanager
    def opened() -> Iterator[Check]:
        yield check

    return opened


def run(target: Target, num_cases: int, seed: int) -> Result:
    """Try `num_cases` cases of a target; the same seed gives the same cases."""
    result = Result(target.name)
    began_s = time.monotonic()
    with target.opened() as check:
        clock = check.cpu_s if isinstance(check, OnLoop) else time.thread_time

        @seeded(seed)
        @settings(
            max_examples=num_cases, database=None, deadline=None, phases=(Phase.generate, Phase.shrink),
            suppress_health_check=[*HealthCheck],  # type: ignore[list-item]
            report_multiple_bugs=False, print_blob=False,
        )  # fmt: skip
        @given(target.cases)
        def attempt(case: Any) -> None:
            started_s, before_s = time.perf_counter(), clock()
            outcome = check(case)
            took_s, used_s = time.perf_counter() - started_s, clock() - before_s
            result.num_cases += 1
            result.outcomes[outcome] += 1
            result.slowest_s = max(result.slowest_s, took_s)
            result.most_cpu_s = max(result.most_cpu_s, used_s)
            if took_s > SLOW_S or used_s > MAX_CPU_S:
                raise _TooSlow(f"a case took {took_s:.1f} s, and {used_s:.1f} s of the thread that reads it: {case!r}")

        try:
            attempt()
        except _TooSlow as error:
            result.crash = str(error)
        except Exception as error:  # noqa: BLE001 - any exception is a finding
            result.crash = "".join([*traceback.format_exception(error)[-12:], *getattr(error, "__notes__", ())])
    result.seconds = time.monotonic() - began_s
    return result

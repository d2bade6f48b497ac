"""Runs one fuzzing target: so many cases from a seed, their outcomes counted, a crash shrunk to its smallest case."""

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
"""A case that takes longer is a crash: far above every limit, so that a busy machine makes none."""

MAX_CPU_S = 1.0
"""CPU seconds of the thread that reads a case, of services their event loop's, that are a crash. Cases are small, and
take a few milliseconds."""

Check = Callable[[Any], str]
"""Tries one case and returns the name of its outcome. Raises what no input may cause."""


@dataclass(frozen=True, slots=True)
class OnLoop:
    """A check whose case is read by another thread, an event loop's."""

    check: Check
    cpu_s: Callable[[], float]  # what that thread has used

    def __call__(self, case: Any) -> str:
        """Try a case."""
        return self.check(case)


@dataclass(frozen=True, slots=True)
class Target:
    """A place where strangers' input arrives."""

    name: str
    cases: SearchStrategy[Any]
    opened: Callable[[], AbstractContextManager[Check]]
    cost: float = 1.0  # of a case, relative to a case of the cheapest targets: the cases of a run are shared out by it


@dataclass(slots=True)
class Result:
    """What came of a target's cases."""

    target: str
    num_cases: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    most_cpu_s: float = 0.0  # of the thread that reads cases
    crash: str = ""  # the smallest case that crashes, and how; "": none


class _TooSlow(BaseException):  # no error to hypothesis, which would try it again and again to shrink it
    """A case has taken too long."""


def pure(check: Check) -> Callable[[], AbstractContextManager[Check]]:
    """Return how a target is opened that needs nothing."""

    @contextmanager
    def opened() -> Iterator[Check]:
        yield check

    return opened


def run(target: Target, num_cases: int, seed: int) -> Result:
    """Try so many cases of a target; the same seed tries the same ones."""
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
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what was looked for
            result.crash = "".join([*traceback.format_exception(error)[-12:], *getattr(error, "__notes__", ())])
    result.seconds = time.monotonic() - began_s
    return result

"""The cost of steps: totals by phase, and a model of step time that is fitted at run time.

The model: seconds = a + b·tokens + c·kv_tokens + d·(sum of ranks) + e·passes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np

from protocol.wire.messages import StepModel, WorkerCounters

FORGET = 0.998
"""Weight that a step keeps per later step, so that about the last 500 count.

A shorter window often holds steps of one size only, which cannot determine the other terms.
"""

MIN_STEPS = 20
"""Steps before the model is fitted, and between two fits."""

MAX_SURPRISE = 4.0
"""Cap on a step's measured over expected time in the fit: beyond it the expectation was wrong, not the step."""

SURPRISE = 1.5
"""Ratio of measured to expected time beyond which a limited step triggers a fit at once.

As long as all steps had one size, the cost of larger ones was unknown; the first long step shows it.
"""

_SCALE = np.array([1.0, 1e3, 1e5, 1e3, 10.0])  # typical sizes of the five terms, for well-conditioned equations
_RIDGE = 1e-6
"""Relative weight of the previous fit, which determines the terms that recent steps leave open."""

Phase = Literal["plan", "inputs", "forward", "sample", "finish"]


@dataclass(frozen=True, slots=True)
class StepWork:
    """The work of a step: the quantities from which its time is modeled."""

    num_tokens: int
    num_kv_tokens: int  # cached tokens to which its sequences attend
    sum_ranks: int  # over its distinct adapters
    num_passes: int = 0  # forward passes of single sequences; 0 if all sequences share one


class StepMeter:
    """Measures an engine's steps. A step is `start`, one `lap` at the end of each phase, `stop`."""

    def __init__(self) -> None:
        self.counters = WorkerCounters()  # totals since the start
        self.fit = StepFit()
        self.model = StepModel()  # fitted model of step time
        self.last_s = 0.0  # seconds of the last counted step
        self.started_s = self._lap_s = self._stopped_s = 0.0

    def start(self) -> None:
        """Start the clock. No `stop` follows for a step that finds nothing to do."""
        self.started_s = self._lap_s = time.perf_counter()

    @property
    def elapsed_s(self) -> float:
        """Seconds from the start of the step to its last lap."""
        return self._lap_s - self.started_s

    def lap(self, phase: Phase) -> None:
        """Add the time since the last lap to a phase."""
        now_s, total = time.perf_counter(), f"{phase}_s"
        setattr(self.counters, total, getattr(self.counters, total) + now_s - self._lap_s)
        self._lap_s = now_s

    def set_aside(self, seconds: float) -> None:
        """Exclude the draft model's time, spent since the last lap, from the step and its phases."""
        self.counters.draft_s += seconds
        self.started_s += seconds
        self._lap_s += seconds

    def stop(self, work: StepWork, num_output: int = 0, *, since_s: float = 0.0, is_limited: bool = False) -> None:
        """Count a step, up to the last lap, that emitted `num_output` tokens. is_limited: whether its time was limited.

        since_s: its start, if before the last `start`. A step launched while another ran is timed from that one's stop.
        """
        self.counters.num_computed_tokens += work.num_tokens
        self.counters.num_output_tokens += num_output
        seconds = self._lap_s - max(since_s or self.started_s, self._stopped_s)
        self._stopped_s = self._lap_s
        self.learn(seconds, work, is_limited=is_limited)

    def learn(self, seconds: float, work: StepWork, *, is_limited: bool = False) -> None:
        """Record a step's time and work; refit the model every `MIN_STEPS` steps or after a surprise."""
        self.last_s = seconds
        self.counters.num_steps += 1
        self.fit.add(seconds, work.num_tokens, work.num_kv_tokens, work.sum_ranks, work.num_passes)
        expected_s = self.model.seconds(work.num_tokens, work.num_kv_tokens, work.sum_ranks, work.num_passes)
        if self.counters.num_steps % MIN_STEPS == 0 or (is_limited and seconds > SURPRISE * expected_s):
            self.model = self.fit.model()


class StepFit:
    """Least squares over recent steps. No term is negative, since more work never makes a step shorter."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._terms = np.zeros(5)  # the last fit, scaled
        self._moments = np.zeros((5, 5))
        self._targets = np.zeros(5)
        self._new: list[tuple[float, ...]] = []  # steps not yet in the moments: five quantities and the seconds

    def add(self, seconds: float, num_tokens: int, num_kv_tokens: int, sum_ranks: int, num_passes: int = 0) -> None:
        """Add one step; see `StepWork` for the arguments."""
        self._new.append((1.0, num_tokens, num_kv_tokens, sum_ranks, num_passes, seconds))
        self._num_steps += 1
        if self._num_steps % MIN_STEPS == 0:
            self._terms = self._solve()

    def model(self) -> StepModel:
        """Return the fitted terms; all zero before `MIN_STEPS` steps."""
        if self._num_steps < MIN_STEPS:
            return StepModel()
        return StepModel(*(float(term) for term in self._solve() / _SCALE))

    def _solve(self) -> np.ndarray:
        self._count_new()
        return _solve_nonnegative(self._moments, self._targets, self._terms)

    def _count_new(self) -> None:
        """Add the steps since the last call in one go: adding them singly would cost each step 0.1 ms."""
        if not self._new:
            return
        rows = np.array(self._new)
        self._new.clear()
        x, seconds = rows[:, :5] / _SCALE, rows[:, 5]
        # Errors are relative to the expected time. With absolute errors a few long prefills would outweigh all decodes;
        # relative to the measured time, randomly slow steps would count little and the model would be too fast.
        units = np.maximum(x @ self._terms, seconds / MAX_SURPRISE) if self._terms.any() else seconds
        x /= units[:, None]
        weights = FORGET ** np.arange(len(x))[::-1]
        kept = FORGET ** len(x)
        self._moments = kept * self._moments + (x.T * weights) @ x
        self._targets = kept * self._targets + (weights * seconds / units) @ x


def _solve_nonnegative(moments: np.ndarray, targets: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Minimize x·M·x - 2 t·x over x >= 0, near `before`, by repeatedly dropping the most negative term."""
    active = list(range(len(targets)))
    terms = np.zeros(len(targets))
    while active:
        part = moments[np.ix_(active, active)]
        ridge = _RIDGE * (np.diag(part) + 1e-12)
        solved = np.linalg.solve(part + np.diag(ridge), targets[active] + ridge * before[active])
        if (solved >= 0).all():
            terms[active] = solved
            break
        del active[int(solved.argmin())]
    return terms

"""How long a step takes, learnt while running: seconds = a + b·tokens + c·kv_tokens + d·(sum of ranks)."""

from __future__ import annotations

import numpy as np

from protocol.wire.messages import StepModel

FORGET = 0.998
"""Weight a step keeps per later step: about the last 500 count. Fewer are often steps of one size, which leave open how
long others take."""

MIN_STEPS = 20

MAX_SURPRISE = 4.0
"""A step that takes longer than so many times what was expected counts as that: little had been learnt."""

_SCALE = np.array([1.0, 1e3, 1e5, 1e3])  # usual sizes of the four terms, so that the equations are well conditioned
_RIDGE = 1e-6  # relative: two terms that always varied together share the time instead of fighting over it


class StepFit:
    """Least squares over recent steps; every term is kept at zero or above, since no work makes a step shorter."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._terms = np.zeros(4)  # as they were a moment ago, scaled
        self._moments = np.zeros((4, 4))
        self._targets = np.zeros(4)

    def add(self, seconds: float, num_tokens: int, num_kv_tokens: int, sum_ranks: int) -> None:
        """Learn from one step."""
        x = np.array([1.0, num_tokens, num_kv_tokens, sum_ranks]) / _SCALE
        # Errors count relatively, else a few long prefills would outweigh all decodes. And relatively to what was
        # expected: to what was measured, steps slow by chance would count little, and the sum come out too short.
        unit = max(float(x @ self._terms), seconds / MAX_SURPRISE) if self._terms.any() else seconds
        x /= unit
        self._moments = FORGET * self._moments + np.outer(x, x)
        self._targets = FORGET * self._targets + x * (seconds / unit)
        self._num_steps += 1
        if self._num_steps % MIN_STEPS == 0:
            self._terms = _solve_nonnegative(self._moments, self._targets)

    def model(self) -> StepModel:
        """Return the fitted terms; all zero while too few steps have been seen."""
        if self._num_steps < MIN_STEPS:
            return StepModel()
        terms = _solve_nonnegative(self._moments, self._targets) / _SCALE
        a, b, c, d = (float(term) for term in terms)
        return StepModel(a=a, b=b, c=c, d=d)


def _solve_nonnegative(moments: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Minimize x·M·x - 2 t·x over x >= 0 by dropping the most negative term until none is left."""
    active = list(range(len(targets)))
    terms = np.zeros(len(targets))
    while active:
        part = moments[np.ix_(active, active)]
        solved = np.linalg.solve(part + _RIDGE * np.diag(np.diag(part) + 1e-12), targets[active])
        if (solved >= 0).all():
            terms[active] = solved
            break
        del active[int(solved.argmin())]
    return terms

"""Which parametrized cases run: all with `make test-all` or for files named on the command line, otherwise some."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

are_many = False
"""Set before test files are imported."""


def of(many: int) -> int:
    """Return the number of hypothesis examples, given the number `many` of a thorough run."""
    return many if are_many else max(many // 4, 10)


def some(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Return cases for `parametrize`: those in `kept` always run, the others are marked `thorough`.

    Raises ValueError if `kept` contains an unknown case.
    """
    known = list(cases)
    if unknown := [case for case in kept if case not in known]:
        raise ValueError(f"no such cases: {unknown}")
    return [case if case in kept else pytest.param(case, marks=pytest.mark.thorough) for case in known]

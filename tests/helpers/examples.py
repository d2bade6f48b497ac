"""Which examples run: all of them in `make test-all` and where files are named, else some."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

are_many = False
"""Set before test files are imported."""


def of(many: int) -> int:
    """Return how many examples hypothesis draws where a long run draws `many`."""
    return many if are_many else max(many // 4, 10)


def some(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Return cases for `parametrize`: those of `kept` always run, the others are marked `thorough`.

    Raises ValueError where `kept` names what is no case.
    """
    known = list(cases)
    if unknown := [case for case in kept if case not in known]:
        raise ValueError(f"no such cases: {unknown}")
    return [case if case in kept else pytest.param(case, marks=pytest.mark.thorough) for case in known]

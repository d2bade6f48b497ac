"""How many examples hypothesis draws: all of them in `make test-all` and where files are named, else some."""

from __future__ import annotations

are_many = False
"""Set before test files are imported."""


def of(many: int) -> int:
    """Return how many examples to draw where a long run draws `many`."""
    return many if are_many else max(many // 4, 10)

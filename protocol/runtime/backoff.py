"""Pauses before something that failed is tried again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses after failures in a row."""

    first_s: float
    max_s: float

    def pause_s(self, num_failures: int) -> float:
        return min(self.first_s * 2.0 ** min(num_failures - 1, 30), self.max_s)


TROUBLE = Backoff(1.0, 60.0)
"""Somebody did not answer, a disk is full: it passes by itself."""
REFUSAL = Backoff(5.0, 600.0)
"""It does not exist, is private, is no good: that stays so unless somebody does something about it."""

"""Pauses before a failed operation is tried again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses that double with each failure in a row."""

    first_s: float
    max_s: float

    def pause_s(self, num_failures: int) -> float:
        """Return the pause after `num_failures` failures in a row, at least one."""
        return min(self.first_s * 2.0 ** min(num_failures - 1, 30), self.max_s)


TROUBLE = Backoff(1.0, 60.0)
"""For trouble that passes by itself: a server that does not answer, a full disk."""
REFUSAL = Backoff(5.0, 600.0)
"""For refusals that last until somebody acts: what was asked for does not exist, is private or is invalid."""

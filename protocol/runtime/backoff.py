"""Pauses between attempts of a failing operation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff: the pause doubles with each consecutive failure, up to `max_s`."""

    first_s: float
    max_s: float

    def pause_s(self, num_failures: int) -> float:
        """Return the pause in seconds after `num_failures` consecutive failures, at least one."""
        return min(self.first_s * 2.0 ** min(num_failures - 1, 30), self.max_s)


TROUBLE = Backoff(1.0, 60.0)
"""For temporary failures: an unreachable server, a full disk."""
REFUSAL = Backoff(5.0, 600.0)
"""For refusals that last until someone acts: the requested object does not exist, is private or is invalid."""

"""The part of the settings that the scheduler decides by."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.runtime.settings import Settings


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The scheduler's settings."""

    slack_tokens: float = 4096.0  # weighted tokens that others may receive before a held request must be placed
    max_attempts: int = 3  # workers that may die while they have a request, before it fails
    beat_timeout_s: float = 3.5  # silence after which a worker counts as dead
    wait_for_worker_s: float = 0.0  # after which a call ends while there is no worker; 0: at its deadline
    max_swap_wait_s: float = 30.0  # bound on waiting for a base while another is served beyond its share
    min_residency_s: float = 5.0  # for which a worker keeps a base that has work

    @property
    def max_lag(self) -> float:
        """How far the counter of a tenant whose requests could not run may be below the others', in weighted tokens."""
        return 4 * self.slack_tokens

    @classmethod
    def of(cls, settings: Settings) -> SchedulerConfig:
        """Return the part of a service's settings that concerns the scheduler's decisions."""
        return cls(
            float(settings.affinity_slack_tokens),
            settings.max_attempts,
            settings.beat_timeout_s,
            settings.wait_for_worker_s,
            settings.max_swap_wait_s,
            settings.min_residency_s,
        )

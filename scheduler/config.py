"""The settings that the scheduler's decisions depend on."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.runtime.settings import Settings


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The scheduler's settings."""

    slack_tokens: float = 4096.0  # weighted tokens that other tenants may receive before a held request must be placed
    max_attempts: int = 3  # workers that may die under a request before it fails
    beat_timeout_s: float = 3.5  # seconds without a heartbeat after which a worker counts as dead
    wait_for_worker_s: float = 0.0  # seconds after which a call ends if there is no worker; 0: only at its deadline
    max_swap_wait_s: float = 30.0  # maximum seconds to wait for a base while another is served beyond its share
    min_residency_s: float = 5.0  # minimum seconds for which a worker keeps a base that has work

    @property
    def max_lag(self) -> float:
        """Maximum weighted tokens by which a tenant's counter may lag behind while its requests cannot run."""
        return 4 * self.slack_tokens

    @classmethod
    def of(cls, settings: Settings) -> SchedulerConfig:
        """Return the part of a service's settings that the scheduler's decisions depend on."""
        return cls(
            float(settings.affinity_slack_tokens),
            settings.max_attempts,
            settings.beat_timeout_s,
            settings.wait_for_worker_s,
            settings.max_swap_wait_s,
            settings.min_residency_s,
        )

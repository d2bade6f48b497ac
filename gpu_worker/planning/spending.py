"""Which tenant received most tokens in recent steps. Pure.

The scheduler shares slots. A tenant with few slots can still fill every step with prompts: a step of 512 tokens takes
thirty times as long as the decode of a client that streams beside it.
"""

from __future__ import annotations

from collections.abc import Iterable

KEEP = 0.98
"""Weight that a step keeps per later step, so that about the last 50 count."""

MOST = 2 / 3
"""Share of all recent tokens above which a tenant counts as the heaviest."""

FEW = 1 / 8
"""Tokens per step and slot below which no tenant is the heaviest: decodes in the slots that it may have where all fit
(`scheduler.fairness`)."""


class Spending:
    """Tokens that each tenant received in recent steps, newer ones counting more."""

    def __init__(self, num_places: int) -> None:
        """num_places: maximum running sequences."""
        self._few = FEW * num_places / (1 - KEEP)
        self._tokens: dict[str, float] = {}

    def note(self, step: Iterable[tuple[str, int]]) -> None:
        """Count a step's tokens, as (tenant, tokens); a tenant may occur several times."""
        self._tokens = {tenant: KEEP * num for tenant, num in self._tokens.items() if num > 0.5}
        for tenant, num in step:
            self._tokens[tenant] = self._tokens.get(tenant, 0.0) + num

    def heaviest(self) -> str:
        """Return the tenant with most of the recent tokens, "" if there is none or its name is unknown."""
        tenant = max(self._tokens, key=self._tokens.__getitem__, default="")
        num = self._tokens.get(tenant, 0.0)
        return tenant if num > max(self._few, MOST * sum(self._tokens.values())) else ""

"""Which tenant received most tokens in recent steps. Pure.

The scheduler shares places. A tenant with few of them can still fill every step, by prompts: a step of 512 tokens takes
thirty times as long as the decode of one who streams beside it.
"""

from __future__ import annotations

from collections.abc import Iterable

KEEP = 0.98
"""Weight that a step keeps per later step: about the last 50 count."""

MOST = 2 / 3
"""Share of all recent tokens above which a tenant counts as the heaviest."""

FEW = 1 / 8
"""Tokens per step and slot up to which no tenant has too much: decodes in the slots that it may have where all fit
(`scheduler.fairness`)."""


class Spending:
    """Tokens that each tenant received in recent steps, newer ones counting more."""

    def __init__(self, num_places: int) -> None:
        """num_places: sequences that run at once."""
        self._few = FEW * num_places / (1 - KEEP)
        self._tokens: dict[str, float] = {}

    def note(self, step: Iterable[tuple[str, int]]) -> None:
        """Count the tokens of a step; a tenant may come several times."""
        self._tokens = {tenant: KEEP * num for tenant, num in self._tokens.items() if num > 0.5}
        for tenant, num in step:
            self._tokens[tenant] = self._tokens.get(tenant, 0.0) + num

    def heaviest(self) -> str:
        """Return the tenant that had most, "" if none had, or if it is not known whose that is."""
        tenant = max(self._tokens, key=self._tokens.__getitem__, default="")
        num = self._tokens.get(tenant, 0.0)
        return tenant if num > max(self._few, MOST * sum(self._tokens.values())) else ""

"""The bases that a worker's process may serve: those in its settings, and those added while the fleet runs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from protocol.queue.bus import Bus
from protocol.runtime.model_files import is_here, settings_of_further, worker_bases
from protocol.runtime.settings import Settings


class WorkerBases:
    """The bases by name.

    An added base counts once its files are on this machine, so that no swap waits for a download.
    """

    def __init__(self, settings: Settings, own: str, added: Mapping[str, str] | None = None) -> None:
        """Start with the bases in the settings.

        own: the base of this process. added: models of the added bases that the previous process knew, by name.
        """
        self._settings, self._own = settings, own
        self._in_settings = worker_bases(settings)
        self.added = dict(added or {})
        """Models of the added bases by name, as of the last `look`; the worker's own base is kept if it was removed."""

    @property
    def fleet(self) -> list[str]:
        """The names of the fleet's bases in the settings, its own first; empty if there is only one, under any name."""
        return list(dict.fromkeys([self._own, *self._in_settings])) if self._settings.more_models else []

    @property
    def others(self) -> list[str]:
        """The names of the bases that the worker can swap to, those in the settings first."""
        several = self._settings.more_models or self._own in self.added
        names = dict.fromkeys([*(self._in_settings if several else ()), *self.added])
        return [name for name in names if name != self._own] if self._settings.swaps else []

    def settings(self, name: str) -> Settings:
        """Return the settings for serving a base."""
        if name in self._in_settings:
            return self._in_settings[name]
        return settings_of_further(self._settings, self.added[name], name)

    async def look(self, bus: Bus) -> None:
        """Update the set of added bases from the queue; does nothing for a worker that never swaps.

        Raises UnreadableRecord.
        """
        if not self._settings.swaps:
            return
        models = {name: base.model for name, base in (await bus.added_bases.get()).bases.items()}
        if models:
            models = await asyncio.to_thread(lambda: {name: model for name, model in models.items() if is_here(model)})
        self.added = {name: self.added[name] for name in self.added if name == self._own} | models

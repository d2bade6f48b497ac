"""What a gateway reads of each base: its tokenizer, chat template and end tokens, and a sandbox with its tokenizer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from gateway.grammars.check import GrammarCheck
from gateway.http.http_client import HttpClient
from gateway.sandbox.sandbox import SandboxPool
from gateway.text.own_files import OwnFiles
from gateway.text.tokenizer import ModelFiles, load_model_files
from peft_adapters.texts.files import TOKENIZER
from protocol.queue.bus import Bus
from protocol.runtime.model_files import TOKENIZER_FILES, base_settings, check_text_files, model_folder
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, LorafleetError, NotFound, Unavailable, panics_as

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BaseTexts:
    """The files of one base, and of its adapters."""

    own: OwnFiles
    grammars: GrammarCheck
    sandbox: SandboxPool

    @property
    def files(self) -> ModelFiles:
        """The base's own."""
        return self.own.base


class GatewayBases:
    """The bases of a gateway: the default one, and further ones by name, of its settings and added while it runs."""

    def __init__(
        self,
        default: BaseTexts,
        further: Mapping[str, BaseTexts | str],
        read: Callable[[str, str], Awaitable[BaseTexts]] | None = None,
        *,
        added: Callable[[], m.AddedBases] = m.AddedBases,
        shows_reasons: bool = True,
    ) -> None:
        """further: those of the settings; in place of what a base has, why it cannot be read.

        read: the files of a base of a name and a model. added: what operators have added and taken away, as is known
        now. shows_reasons: as of `FleetView`.
        """
        self.default = default
        self._shows_reasons = shows_reasons
        self._further = dict(further)
        self._read = read
        self.in_settings = (default.files.name, *further)
        """The names of the bases that the settings name, which nobody adds or takes away."""
        self._known = added
        self._added: dict[str, m.AddedBase] = {}  # those that have been read

    @property
    def names(self) -> list[str]:
        """The names of the further bases, those that are still to be read among them."""
        return [*self.in_settings[1:], *(name for name in self._known().bases if name not in self.in_settings)]

    @property
    def removed(self) -> list[str]:
        """The names of bases that were taken away."""
        return self._known().removed

    @property
    def several_in_settings(self) -> bool:
        """Whether stores name the base of every adapter. Where bases are only added, an unnamed one is the default."""
        return len(self.in_settings) > 1

    def why_unreadable(self, name: str) -> str:
        """Return why a further base cannot be read, "" if it can."""
        found = "" if self.is_being_read(name) else self._further.get(name, "")
        return found if isinstance(found, str) else ""

    def is_being_read(self, name: str) -> bool:
        """Return whether a base was added, and has not been read yet as it is now."""
        known = self._known().bases.get(name) if name not in self.in_settings else None
        return known is not None and self._added.get(name) != known

    def of(self, name: str) -> BaseTexts:
        """Return what a base has; the name of a gateway's only one does not matter.

        Raises Unavailable if it cannot be read or has not been yet, and NotFound if it was taken away, or is none of
        several.
        """
        if name in ("", self.default.files.name):
            return self.default
        if name in self.removed and name not in self.in_settings:
            raise NotFound(f"the base `{name}` was removed", param="model", code="base_not_served")
        if self.is_being_read(name):
            raise Unavailable(
                f"the base `{name}` is still loading in this gateway", param="model", code="base_starting"
            )
        names = self.names
        if names and name not in names:
            raise NotFound(f"the base `{name}` is not served here", param="model", code="base_not_served")
        found = self._further[name] if names else self.default
        if isinstance(found, str):
            why = f": {found}" if self._shows_reasons else ""
            raise Unavailable(
                f"the base `{name}` cannot be served by this gateway{why}", param="model", code="base_unreadable"
            )
        return found

    async def read(self) -> None:
        """Read the bases that were added, one after the other, and leave those that were removed."""
        known = self._known()
        for name in [name for name, base in self._added.items() if known.bases.get(name) != base]:
            del self._added[name]
            await _close(self._further.pop(name))
        for name, base in known.bases.items():
            if name in self._added or name in self.in_settings or self._read is None:
                continue
            try:
                found = await self._read(name, base.model)
            except Exception as error:  # noqa: BLE001  the base's edge: whatever its files are, others are read
                found = _why(name, error)
            self._added[name], self._further[name] = base, found

    async def close(self) -> None:
        """End what each has started."""
        for base in (self.default, *self._further.values()):
            await _close(base)


async def _close(base: BaseTexts | str) -> None:
    if isinstance(base, BaseTexts):
        await base.sandbox.close()


def _why(name: str, error: Exception) -> str:
    """Log why a base cannot be read, and return it."""
    why = error.message if isinstance(error, LorafleetError) else f"{error!s:.300}".split("\n", 1)[0] or repr(error)
    logger.warning("the base %s cannot be served by this gateway: %s", name, why)
    return why


async def open_bases(
    settings: Settings, bus: Bus, stores: HttpClient, on_wait: Callable[[], object], added: Callable[[], m.AddedBases]
) -> GatewayBases:
    """Read the files of `model` and of `more_models`. A further base that cannot be read fails its own calls only.

    on_wait: as of `SandboxPool`. added: as of `GatewayBases`. Raises BadRequest where `model` cannot be read.
    """

    async def read(one: Settings) -> BaseTexts:
        files = await asyncio.to_thread(load_model_files, one)
        tokenizer = await asyncio.to_thread(model_folder, one.model, TOKENIZER_FILES) / TOKENIZER
        sandbox = SandboxPool(settings.sandboxes, str(tokenizer), on_wait, template_s=settings.template_timeout_s)
        return BaseTexts(
            OwnFiles(bus, files, sandbox, stores), GrammarCheck(sandbox, settings.grammar_timeout_s), sandbox
        )

    async def read_added(name: str, model: str) -> BaseTexts:
        with panics_as(BadRequest):
            await asyncio.to_thread(check_text_files, model)
            return await read(settings.model_copy(update={"model": model, "served_name": name}))

    default, *others = base_settings(settings).values()
    found: dict[str, BaseTexts | str] = {}
    made = await read(default)
    for one in others:
        try:
            found[one.served_name] = await read(one)
        except (BadRequest, OSError) as error:
            found[one.served_name] = _why(one.served_name, error)
    return GatewayBases(made, found, read_added, added=added, shows_reasons=not settings.api_keys)

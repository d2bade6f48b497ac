"""A gateway's data about each base: tokenizer, chat template, end tokens, and a sandbox with the tokenizer."""

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
    """The text files of one base and of its adapters."""

    own: OwnFiles
    grammars: GrammarCheck
    sandbox: SandboxPool

    @property
    def files(self) -> ModelFiles:
        """The base's own files."""
        return self.own.base


class GatewayBases:
    """The bases of a gateway: the default one, and further ones by name, from its settings or added while it runs."""

    def __init__(
        self,
        default: BaseTexts,
        further: Mapping[str, BaseTexts | str],
        read: Callable[[str, str], Awaitable[BaseTexts]] | None = None,
        *,
        added: Callable[[], m.AddedBases] = m.AddedBases,
        shows_reasons: bool = True,
    ) -> None:
        """further: the other bases of the settings; for an unreadable base, the reason.

        read: reads the files of a base, given its name and model. added: returns the bases that operators have added
        and removed so far. shows_reasons: as for `FleetView`.
        """
        self.default = default
        self._shows_reasons = shows_reasons
        self._further = dict(further)
        self._read = read
        self.in_settings = (default.files.name, *further)
        """Names of the bases in the settings, which cannot be added or removed at run time."""
        self._known = added
        self._added: dict[str, m.AddedBase] = {}  # added bases whose files have been read

    @property
    def names(self) -> list[str]:
        """Names of the further bases, including those not read yet."""
        return [*self.in_settings[1:], *(name for name in self._known().bases if name not in self.in_settings)]

    @property
    def removed(self) -> list[str]:
        """Names of removed bases."""
        return self._known().removed

    @property
    def several_in_settings(self) -> bool:
        """Whether the settings have several bases.

        If so, stores name the base of every adapter; otherwise none means the default.
        """
        return len(self.in_settings) > 1

    def why_unreadable(self, name: str) -> str:
        """Return why a further base cannot be read, "" if it can."""
        found = "" if self.is_being_read(name) else self._further.get(name, "")
        return found if isinstance(found, str) else ""

    def is_being_read(self, name: str) -> bool:
        """Return whether the current version of an added base has not been read yet."""
        known = self._known().bases.get(name) if name not in self.in_settings else None
        return known is not None and self._added.get(name) != known

    def of(self, name: str) -> BaseTexts:
        """Return a base's files; a gateway with only one base ignores the name.

        Raises Unavailable if they cannot be read or are not read yet, and NotFound for a removed or unknown base.
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
        """Read the files of added bases one after the other, and close removed ones."""
        known = self._known()
        for name in [name for name, base in self._added.items() if known.bases.get(name) != base]:
            del self._added[name]
            await _close(self._further.pop(name))
        for name, base in known.bases.items():
            if name in self._added or name in self.in_settings or self._read is None:
                continue
            try:
                found = await self._read(name, base.model)
            except Exception as error:  # noqa: BLE001  broken files of one base must not affect others
                found = _why(name, error)
            self._added[name], self._further[name] = base, found

    async def close(self) -> None:
        """Close the sandboxes of all bases."""
        for base in (self.default, *self._further.values()):
            await _close(base)


async def _close(base: BaseTexts | str) -> None:
    if isinstance(base, BaseTexts):
        await base.sandbox.close()


def _why(name: str, error: Exception) -> str:
    """Log and return why a base cannot be read."""
    why = error.message if isinstance(error, LorafleetError) else f"{error!s:.300}".split("\n", 1)[0] or repr(error)
    logger.warning("the base %s cannot be served by this gateway: %s", name, why)
    return why


async def open_bases(
    settings: Settings, bus: Bus, stores: HttpClient, on_wait: Callable[[], object], added: Callable[[], m.AddedBases]
) -> GatewayBases:
    """Read the files of `model` and `more_models`. An unreadable further base fails only its own calls.

    on_wait: as for `SandboxPool`. added: as for `GatewayBases`. Raises BadRequest if `model` cannot be read.
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

    default, *others = base_settings(settings)
    found: dict[str, BaseTexts | str] = {}
    made = await read(default)
    for one in others:
        try:
            found[one.served_name] = await read(one)
        except (BadRequest, OSError) as error:
            found[one.served_name] = _why(one.served_name, error)
    return GatewayBases(made, found, read_added, added=added, shows_reasons=not settings.api_keys)

"""A gateway's data about each base: tokenizer, chat template, end tokens, and a sandbox with the tokenizer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from gateway.fleet.view import FleetView
from gateway.grammars.check import GrammarCheck
from gateway.http.http_client import HttpClient
from gateway.sandbox.sandbox import SandboxPool
from gateway.text.own_files import OwnFiles
from gateway.text.tokenizer import load_model_files
from peft_adapters.texts.files import TOKENIZER
from protocol.queue.bus import Bus
from protocol.runtime.model_files import TOKENIZER_FILES, check_text_files, model_folder
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, LorafleetError, NotFound, Unavailable, panics_as

logger = logging.getLogger(__name__)


class GatewayBases:
    """The files of a gateway's bases: the default one, and further ones, from its settings or added while it runs."""

    def __init__(
        self, fleet: FleetView, default: OwnFiles, read: Callable[[str, m.AddedBase], Awaitable[OwnFiles]]
    ) -> None:
        """default: the files of the default base. read: reads the files of a base, given its name and model."""
        self.fleet = fleet
        self.default = default
        self._read = read
        self._found: dict[str, tuple[m.AddedBase, OwnFiles | str]] = {}
        self._found[fleet.names[0]] = next(iter(fleet.known.values())), default

    def found(self, name: str) -> OwnFiles | str | None:
        """Return a base's files, or why they cannot be read; None if its current version has not been read yet."""
        base, found = self._found.get(name, (None, None))
        return found if base == self.fleet.known.get(name) else None

    def of(self, name: str) -> OwnFiles:
        """Return a base's files; a gateway with only one base ignores the name.

        Raises Unavailable if they cannot be read or are not read yet, and NotFound for a removed or unknown base.
        """
        if name in ("", self.fleet.names[0]):
            return self.default
        if name not in self.fleet.removed and not self.fleet.further:
            return self.default
        if name not in self.fleet.further:
            what = "was removed" if name in self.fleet.removed else "is not served here"
            raise NotFound(f"the base `{name}` {what}", param="model", code="base_not_served")
        found = self.found(name)
        if isinstance(found, OwnFiles):
            return found
        if found is None:
            what, code = "is still loading in this gateway", "base_starting"
        else:
            what, code = "cannot be served by this gateway", "base_unreadable"
            what += f": {found}" if self.fleet.shows_reasons else ""
        raise Unavailable(f"the base `{name}` {what}", param="model", code=code)

    async def read(self) -> None:
        """Read the files of unread bases one after the other, and close removed ones."""
        known = self.fleet.known
        for name in [name for name, (base, _) in self._found.items() if known.get(name) != base]:
            if isinstance(found := self._found.pop(name)[1], OwnFiles):
                await found.sandbox.close()
        for name, base in known.items():
            if name in self._found:
                continue
            try:
                found = await self._read(name, base)
            except Exception as error:  # noqa: BLE001  broken files of one base must not affect others
                why = f"{error!s:.300}".split("\n", 1)[0] or repr(error)
                found = error.message if isinstance(error, LorafleetError) else why
                logger.warning("the base %s cannot be served by this gateway: %s", name, found)
            self._found[name] = base, found

    async def close(self) -> None:
        """Close the sandboxes of all bases."""
        for _, found in self._found.values():
            if isinstance(found, OwnFiles):
                await found.sandbox.close()


async def open_bases(
    settings: Settings, fleet: FleetView, bus: Bus, stores: HttpClient, on_wait: Callable[[], object]
) -> GatewayBases:
    """Read the files of all bases. An unreadable further base fails only its own calls.

    on_wait: as for `SandboxPool`. Raises BadRequest if the default base cannot be read.
    """

    async def read(name: str, base: m.AddedBase) -> OwnFiles:
        with panics_as(BadRequest):
            if base.added_ms:
                await asyncio.to_thread(check_text_files, base.model)
            own = settings.model_copy(update={"model": base.model, "served_name": name})
            files = await asyncio.to_thread(load_model_files, own)
            tokenizer = await asyncio.to_thread(model_folder, base.model, TOKENIZER_FILES) / TOKENIZER
        sandbox = SandboxPool(settings.sandboxes, str(tokenizer), on_wait, template_s=settings.template_timeout_s)
        return OwnFiles(bus, files, sandbox, stores, GrammarCheck(sandbox, settings.grammar_timeout_s))

    default = await read(*next(iter(fleet.known.items())))
    default.sandbox.warm_up()
    bases = GatewayBases(fleet, default, read)
    await bases.read()
    return bases

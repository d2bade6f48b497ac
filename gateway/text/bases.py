"""What a gateway reads of each base: its tokenizer, chat template and end tokens, and a sandbox with its tokenizer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gateway.grammars.check import GrammarCheck
from gateway.sandbox.sandbox import SandboxPool
from gateway.text.own_files import OwnFiles
from gateway.text.tokenizer import ModelFiles, load_model_files
from peft_adapters.texts.files import TOKENIZER
from protocol.queue.bus import Bus
from protocol.runtime.model_files import TOKENIZER_FILES, base_settings, model_folder
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest, Unavailable

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
    """The bases that a gateway was given: the default one, and further ones by name."""

    def __init__(
        self, default: BaseTexts, further: Mapping[str, BaseTexts | str], *, shows_reasons: bool = True
    ) -> None:
        """further: in place of what a base has, why it cannot be read. shows_reasons: as of `FleetView`."""
        self.default = default
        self._shows_reasons = shows_reasons
        self._further = further

    @property
    def names(self) -> list[str]:
        """The names of the further bases."""
        return list(self._further)

    def of(self, name: str) -> BaseTexts:
        """Return what a base has; the default one's name does not matter. Raises Unavailable if it cannot be read."""
        found = self._further.get(name, self.default)
        if isinstance(found, str):
            why = f": {found}" if self._shows_reasons else ""
            raise Unavailable(f"the base `{name}` cannot be asked here{why}", param="model", code="base_unreadable")
        return found

    async def close(self) -> None:
        """End what each has started."""
        for base in (self.default, *self._further.values()):
            if isinstance(base, BaseTexts):
                await base.own.close()
                await base.sandbox.close()


async def open_bases(settings: Settings, bus: Bus, bearer: str, on_wait: Callable[[], object]) -> GatewayBases:
    """Read the files of `model` and of `more_models`. A further base that cannot be read fails its own calls only.

    bearer: authorizes at the stores. on_wait: as of `SandboxPool`. Raises BadRequest where `model` cannot be read.
    """

    async def read(one: Settings) -> BaseTexts:
        files = await asyncio.to_thread(load_model_files, one)
        tokenizer = model_folder(one.model, TOKENIZER_FILES) / TOKENIZER
        sandbox = SandboxPool(settings.sandboxes, str(tokenizer), on_wait, template_s=settings.template_timeout_s)
        return BaseTexts(
            OwnFiles(bus, files, sandbox, bearer), GrammarCheck(sandbox, settings.grammar_timeout_s), sandbox
        )

    default, *others = base_settings(settings)
    found: dict[str, BaseTexts | str] = {}
    made = await read(default)
    for one in others:
        try:
            found[one.served_name] = await read(one)
        except (BadRequest, OSError) as error:  # the Hub's own errors are OSErrors
            why = error.message if isinstance(error, BadRequest) else str(error).split("\n", 1)[0]
            logger.warning("the base %s cannot be asked here: %s", one.served_name, why)
            found[one.served_name] = why
    return GatewayBases(made, found, shows_reasons=not settings.api_keys)

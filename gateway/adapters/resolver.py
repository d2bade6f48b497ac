"""Resolves the model name in a call to its target, and makes the model objects of `/v1/models`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.adapters.aliases import Aliases
from gateway.adapters.catalogue import CatalogueCopy
from gateway.adapters.views import adapter_object, base_object
from gateway.auth.callers import EVERYBODY, Caller
from gateway.bodies.fields import BASE
from gateway.fleet.bases import GatewayBases
from gateway.text.tokenizer import ModelFiles
from protocol.queue.bus import Bus
from protocol.wire import messages as m
from protocol.wire.errors import ClientError, ModelNotFound, Unavailable

SOURCES = ("hub", "local", "s3")
"""Kinds of adapter sources, as named in LoRAX's `adapter_source`."""


@dataclass(frozen=True, slots=True)
class CallTarget:
    """The model that answers a call: the base model, an adapter, or a merge of adapters."""

    name: str  # name shown by the API
    digest: str  # "" for the base model
    files: ModelFiles  # the base's, possibly with its own tokens and chat template
    texts: str = ""  # hash of its own text files, "" if it has none
    vocab_size: int = 0  # size of its vocabulary; 0: the base's
    source: str = ""  # kind of its source, one of SOURCES; "" for the base model
    num_labels: int = 0  # labels of its own head; 0: no head
    num_virtual: int = 0  # virtual tokens before every prompt

    def within(self, base: m.ServedModel) -> m.ServedModel:
        """Return the base model with its context reduced to what the target leaves for prompts and outputs."""
        return base.less(self.num_virtual)

    def payer(self, caller: Caller) -> str:
        """Return the tenant charged for a caller's request: its own or, without API keys, the model."""
        return caller.name or self.digest or BASE


class Resolver:
    """Resolves names of base models and adapters."""

    def __init__(
        self, bus: Bus, aliases: Aliases, bases: GatewayBases, folder: Path | None, *, shows_paths: bool = False
    ) -> None:
        """bases: files of the bases and of adapters. folder: root whose subfolders are served as adapters.

        shows_paths: model objects include an adapter's path on this machine.
        """
        self._bus = bus
        self._folder = folder
        self._shows_paths = shows_paths
        self._aliases = aliases
        self.bases, self._fleet = bases, bases.fleet
        self.catalogue = CatalogueCopy(bus)

    async def resolve(self, name: str, base: m.ServedModel, timeout_s: float, caller: Caller = EVERYBODY) -> CallTarget:
        """Return the target of `base`, a base's own name or "", of an adapter's name or source, or of `base:adapter`.

        Waits up to `timeout_s` while the adapter is being fetched. caller: must see the name; has the token for its
        source. Raises ModelNotFound, PermissionDenied, AdapterRefused, Unavailable.
        """
        if is_base(name, base):
            return CallTarget(base.name, "", self.bases.of(base.name).base)
        alias = await self._served(self._plain(name, base), timeout_s, caller)
        if not self.is_of(alias, base):
            raise ModelNotFound(name, f"It is an adapter of the base `{alias.base}`, not of `{base.name}`.")
        own = self.bases.of(base.name)
        facts = await own.facts(alias.digest)
        files = await own.files(alias.digest, facts.texts, caller.name or alias.digest)
        source = alias.source.partition(":")[0]
        return CallTarget(
            alias.name, alias.digest, files, facts.texts, facts.vocab_size, source, facts.num_labels, facts.num_virtual
        )

    def is_of(self, alias: m.Alias, base: m.ServedModel) -> bool:
        """Return whether an adapter belongs to a base. If no store has named its base, it is the gateway's only one.

        If the settings have several bases, stores name the base of every adapter; otherwise none means the default.
        """
        if alias.base:
            return alias.base == base.name
        return len(self._fleet.in_settings) == 1 and base.name not in self._fleet.further

    async def _served(self, name: str, timeout_s: float, caller: Caller) -> m.Alias:
        """Return an adapter's alias once it is on disk. Raises as `resolve`, also while its base is unknown."""
        try:
            alias = await self._aliases.served(name, timeout_s, caller)
        except ModelNotFound:
            if gone := _named(name, self._fleet.removed):
                self.bases.of(gone)  # raises NotFound: it was removed
            raise
        if len(self._fleet.in_settings) > 1 and not alias.base:
            text = f"the base of `{name}` is not known yet: an adapter store of several bases has to look at it first"
            raise Unavailable(text, param="model")
        return alias

    async def base_of(self, name: str, source: str | None, timeout_s: float, caller: Caller) -> str:
        """Return the base that a name is, or whose adapter it is; "" for the default base.

        Waits up to `timeout_s` while the adapter is being fetched. Raises as `name_in` and `resolve`.
        """
        default = self._fleet.names[0]
        if name not in ("", BASE, *self._fleet.names):
            name = await self.name_in(source, name, caller)
        named = _named(name, self._fleet.names)
        if named:
            return "" if named == default else named
        if name in ("", BASE) or name.startswith(f"{BASE}:"):
            return ""
        alias = await self._served(name, timeout_s, caller)
        if not alias.base:
            return ""
        if alias.base not in self._fleet.names:
            raise ModelNotFound(
                name, f"It is an adapter of the base `{alias.base}`, which this gateway does not serve."
            )
        return "" if alias.base == default else alias.base

    async def name_in(self, source: str | None, adapter_id: str, caller: Caller) -> str:
        """Return the name by which an adapter of LoRAX's `adapter_source` is resolved; without a source, its id.

        Raises ClientError for an unknown source, and ModelNotFound for a folder that is not served.
        """
        kind = (source or "").lower()
        if not kind:
            return adapter_id
        if kind not in SOURCES:
            text = f"Invalid source '{source}' when downloading adapter '{adapter_id}': it may be {', '.join(SOURCES)}"
            raise ClientError(text, param="adapter_source")
        name = self._in_folder(adapter_id) if kind == "local" else adapter_id
        known = await self.known(name, caller)
        if known is not None and known.source.startswith(f"{kind}:"):
            return name
        if kind == "local":
            raise ModelNotFound(adapter_id, "The adapter folder has no adapter of this name.")
        scheme = "s3://" if kind == "s3" else "hub:"
        return adapter_id if adapter_id.startswith(scheme) else f"{scheme}{adapter_id}"

    def _in_folder(self, adapter_id: str) -> str:
        """Return the name of an adapter given by its folder's path; other ids are returned unchanged."""
        if self._folder is None or not adapter_id.startswith("/"):
            return adapter_id
        try:
            return str(Path(adapter_id).relative_to(self._folder.absolute()))
        except ValueError:
            return adapter_id

    async def known(self, name: str, caller: Caller) -> m.Alias | None:
        """Return the alias that a caller sees under a name, in any state: its tenant's, else the shared one.

        None if there is neither.
        """
        alias = await self._bus.adapters.alias(name, caller.name) if caller.name else None
        if alias is None:
            alias = await self._bus.adapters.alias(name)
        return alias if alias is not None and caller.sees(alias) else None

    def _plain(self, name: str, base: m.ServedModel) -> str:
        """Return an adapter's name without the prefix `base:`. Raises ModelNotFound if nothing is left."""
        prefixes = (f"{base.name}:",) if base.name in self._fleet.further else (f"{base.name}:", f"{BASE}:")
        for prefix in prefixes:
            if name == prefix:
                raise ModelNotFound(name, "No adapter is named after the colon.")
            if name.startswith(prefix):
                return name.removeprefix(prefix)
        return name

    async def models(self, bases: Sequence[m.ServedModel], caller: Caller) -> bytes:
        """Return a JSON list of the model objects that a caller sees: the bases, then the adapters by name."""
        default = self._default(bases)
        return await self.catalogue.listed(
            caller,
            ("models", m.encode(bases)),
            [base_object(one) for one in bases],
            lambda alias, record: adapter_object(alias, record, default, self._folder, shows_paths=self._shows_paths),
        )

    def listed(self, name: str, bases: Sequence[m.ServedModel]) -> m.ServedModel | None:
        """Return the listed base of a name; None if there is none, or for `base` while the default one is unknown."""
        wanted = self._default(bases) if name in ("", BASE) else name
        return next((base for base in bases if base.name == wanted), None)

    def _default(self, bases: Sequence[m.ServedModel]) -> str:
        """Return the name of the default base: the first of `bases`, unless it has not been reported yet."""
        return self._fleet.names[0] if self._fleet.further else bases[0].name

    async def model(self, name: str, bases: Sequence[m.ServedModel], caller: Caller) -> dict[str, Any]:
        """Return the object of one model in any state. Raises ModelNotFound."""
        if (base := self.listed(name, bases)) is not None:
            return base_object(base)
        named = _named(name, [one.name for one in bases])
        base = next((one for one in bases if one.name == named), bases[0])
        plain = self._plain(name, base)
        alias = await self.known(plain, caller)
        if alias is None or (plain != name and not self.is_of(alias, base)):
            raise ModelNotFound(name)
        record = await self._bus.get(self._bus.keys.adapter(alias.digest), m.AdapterRecord) if alias.digest else None
        return adapter_object(alias, record, self._default(bases), self._folder, shows_paths=self._shows_paths)


def _named(name: str, bases: Sequence[str]) -> str:
    """Return the base that a name is, or that it begins with before a colon; "" for none."""
    longest_first = sorted(bases, key=len, reverse=True)  # one may begin with another and a colon
    return next((base for base in longest_first if name == base or name.startswith(f"{base}:")), "")


def is_base(name: str, base: m.ServedModel) -> bool:
    """Return whether a name is the base model's."""
    return name in ("", BASE, base.name)

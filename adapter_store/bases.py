"""The base to which an adapter belongs: the one it is registered for, the one it names, or the only one it fits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from adapter_store.mirror import Mirror, Mirrored, NeedsBase, fits_none
from adapter_store.sources import Source, SourceAccess
from protocol.wire.brief import brief
from protocol.wire.errors import AdapterRefused, BadRequest, Unavailable
from protocol.wire.messages import AdapterRecord, AddedBases, ServedModel

NONE = AddedBases()


class Bases:
    """The bases of a fleet, for which a store checks adapters."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        """names: of all bases, the default one first. In a fleet with one base, its name need not be right."""
        self._in_settings = tuple(names)
        self._only = names[0] if names else ""
        self._known: dict[str, ServedModel] = {}
        self._state: tuple[object, ...] = ()  # everything that the checks of adapters depend on
        self.set(())

    def set(self, reported: Iterable[ServedModel], failed: Iterable[str] = (), by_operators: AddedBases = NONE) -> bool:
        """Set the bases that workers have reported, the first one first, and those of which no worker has started.

        by_operators: the bases that operators have added and removed. An adapter that names a removed base has an
        unknown base, and is not checked for another. Returns whether the checks depend on a change, so that all
        adapters must be checked again.
        """
        self._removed = frozenset(by_operators.removed) - set(self._in_settings)
        names = (*self._in_settings, *sorted({*by_operators.bases, *self._removed} - set(self._in_settings)))
        self._names = names if len(names) > 1 else ()
        found = {base.name: base for base in reported}
        only = self._only if self._only in found else next(iter(found), "")
        served = [name for name in self._names or [only] if name in found and name not in self._removed]
        self._known = {name: found[name] for name in served} or self._known
        self._failed = frozenset(failed).intersection(self._names) - self._known.keys()
        identities = [(name, base.identity) for name, base in self._known.items()]
        before, self._state = self._state, (identities, self._failed, self._names)
        return before != self._state

    @property
    def names(self) -> list[str]:
        """The names of the bases that workers have reported."""
        return list(self._known)

    def get(self, name: str) -> ServedModel | None:
        """Return a base by the name in an alias, None if it is unknown.

        "" means the only base of the fleet. In a fleet of several it is unknown, since the alias is older than the
        others.
        """
        return self._known.get(name) if name or self._names else next(iter(self._known.values()), None)

    async def take(
        self, mirror: Mirror, source: Source, target: str, asked: str, access: SourceAccess, tenant: str = ""
    ) -> tuple[Mirrored, str, AdapterRecord | None]:
        """Bring an adapter into the blobs and check it for its base. Returns it with the base's name and its record.

        The name is "" in a fleet with one base. asked: the base for which it is registered, "" for none. The record is
        None while the only base is unknown. Raises as `Mirror.take` and `Mirror.describe`. Also raises:
        - BadRequest for a base that this fleet does not have.
        - AdapterRefused, with the candidates, for an adapter that fits no base or several.
        - Unavailable while the result depends on a base that no worker has reported.
        """
        if asked and asked not in (names := self._names or list(self._known) or [asked]):
            raise BadRequest(f"this fleet has no base {brief(asked)}; it has {', '.join(names)}", param="base")
        if not self._names:
            only = self.get("")
            mirrored = await mirror.take(source, target, only, access, tenant)
            record = None if only is None else await mirror.describe(mirrored.digest, mirrored.version.source, only)
            return mirrored, "", record
        mirrored: Mirrored | None = None

        async def read(base: ServedModel) -> tuple[Mirrored, AdapterRecord]:
            found = mirrored or await mirror.take(source, target, base, access, tenant)
            return found, await mirror.describe(found.digest, found.version.source, base)

        candidates = [] if asked or self._missing else list(self._known.values())
        try:
            mirrored = await mirror.take(source, target, self._known.get(asked), access, tenant, candidates)
            name = asked or self._named_by(await asyncio.to_thread(mirror.blobs.named_base, mirrored.version.key))
        except NeedsBase as error:
            (named,) = error.args
            name = self._named_by(named or "")
            if named is not None and not name:  # not tried with each base, since a conversion takes minutes
                text = "it is converted for one base, and names none of this fleet"
                raise AdapterRefused([f"{text}: set base_model_name_or_path, or register it with `base`"]) from error
        if not name:
            return await self._fitting(read)
        base = self._known.get(name)
        if base is None:
            what = "which was removed" if name in self._removed else "of which no worker has started yet"
            raise Unavailable(f"it is an adapter of the base {name}, {what}")
        try:
            mirrored, record = await read(base)
            return mirrored, name, record
        except AdapterRefused as error:
            how = "it is registered for" if asked else "its base_model_name_or_path says"
            raise AdapterRefused([f"{how} the base {name}, which it does not fit: {error.message}"]) from error

    def _named_by(self, text: str) -> str:
        """Return the base that a `base_model_name_or_path` means: by name, by model, or by the last part of a path.

        Returns "" if it is no base of this fleet, such as the model from which a base was trained, or if it is
        ambiguous.
        """

        def ending(path: str) -> str:
            return path.rstrip("/").rpartition("/")[2].lower()

        if not text:
            return ""
        for found in (
            [name for name in self._names if text == name],
            [name for name, base in self._known.items() if text == base.model],
            [name for name in self._names if ending(text) == ending(name)],
        ):
            if len(found) == 1:
                return found[0]
        return ""

    @property
    def _missing(self) -> list[str]:
        """The names of bases that may still start, and are unknown until then.

        Added bases are left out until their first worker has started, so that adding a base makes no adapter
        unavailable.
        """
        return [name for name in self._in_settings if name not in self._known.keys() | self._failed]

    async def _fitting(
        self, read: Callable[[ServedModel], Awaitable[tuple[Mirrored, AdapterRecord]]]
    ) -> tuple[Mirrored, str, AdapterRecord]:
        """Return an adapter with the only base that it fits, among those that have not failed to start.

        read: checks the adapter for a base. Raises AdapterRefused; Unavailable while a base is still starting.
        """
        if missing := self._missing:
            text = (
                f"it names no base of this fleet, and may fit {', '.join(missing)}, of which no worker has started yet"
            )
            raise Unavailable(f"{text}: set base_model_name_or_path, or register it with `base`")
        fits: dict[str, tuple[Mirrored, AdapterRecord]] = {}
        refused: dict[str, AdapterRefused] = {}
        for name, base in self._known.items():
            try:
                fits[name] = await read(base)
            except AdapterRefused as error:
                refused[name] = error
        if len(fits) == 1:
            [(name, (mirrored, record))] = fits.items()
            return mirrored, name, record
        if fits:
            text = f"it fits several bases of this fleet ({', '.join(fits)}) and names none of them"
            raise AdapterRefused([f"{text}: set base_model_name_or_path, or register it with `base`"])
        raise fits_none(refused)

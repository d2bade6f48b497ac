"""Which base of its fleet an adapter belongs to: the one it is registered for, that it names, or that alone it fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from adapter_store.mirror import Mirror, Mirrored
from adapter_store.sources import Source, SourceAccess
from protocol.wire.brief import brief
from protocol.wire.errors import AdapterRefused, BadRequest, Unavailable
from protocol.wire.messages import AdapterRecord, ServedModel

MAX_REASON = 200
"""Characters of why an adapter does not fit one of several bases."""


class Bases:
    """The bases of a fleet that a store checks adapters for."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        """names: of all bases, the default one first. Of a fleet with one base it need not be right."""
        self._names = tuple(names) if len(names) > 1 else ()
        self._only = names[0] if names else ""
        self._known: dict[str, ServedModel] = {}
        self._failed: frozenset[str] = frozenset()

    def set(self, reported: Iterable[ServedModel], failed: Iterable[str] = ()) -> bool:
        """Take the bases that workers have reported, the first one first, and those of which none has started.

        Returns whether any that adapters are checked for has changed, so that all have to be checked again.
        """
        found = {base.name: base for base in reported}
        if not self._names:
            name = self._only if self._only in found else next(iter(found), "")
            found = {name: found[name]} if name else {}
        else:
            found = {name: found[name] for name in self._names if name in found}
        before = self._state
        self._known = found or self._known
        self._failed = frozenset(failed).intersection(self._names) - self._known.keys()
        return before != self._state

    @property
    def _state(self) -> tuple[object, ...]:
        return tuple((name, base.identity) for name, base in self._known.items()), self._failed

    @property
    def are_known(self) -> bool:
        """Whether workers have reported any base."""
        return bool(self._known)

    @property
    def names(self) -> list[str]:
        """The names of the bases that workers have reported."""
        return list(self._known)

    def get(self, name: str) -> ServedModel | None:
        """Return a base by the name that an alias has, "" for that of a fleet with one base; None if it is unknown."""
        return self._known.get(name) if name else next(iter(self._known.values()), None)

    async def take(
        self, mirror: Mirror, source: Source, target: str, asked: str, access: SourceAccess, tenant: str = ""
    ) -> tuple[Mirrored, str, AdapterRecord | None]:
        """Bring an adapter into the blobs, and check it for its base. Returns it, its base's name and its record.

        The name is "" in a fleet with one base. asked: the base that it is registered for, "" for none. The record is
        None while the only base is not known. Raises as `Mirror.take` and `Mirror.describe`; BadRequest for a base that
        this fleet does not have; AdapterRefused, with the candidates, for an adapter that fits none or several; and
        Unavailable while no worker has reported one of several bases that the answer depends on.
        """
        if not self._names:
            only = self.get("")
            if asked and only is not None and asked != only.name:
                raise BadRequest(f"this fleet has no base {brief(asked)}; it has {only.name}", param="base")
            mirrored = await mirror.take(source, target, only, access, tenant)
            record = None if only is None else await mirror.describe(mirrored.digest, mirrored.version.source, only)
            return mirrored, "", record
        if asked and asked not in self._names:
            raise BadRequest(f"this fleet has no base {brief(asked)}; it has {', '.join(self._names)}", param="base")
        mirrored = await mirror.take(source, target, self._known.get(asked), access, tenant)
        name = asked or self._named_by(await mirror.named_base(source, mirrored.version, access))
        if not name:
            return mirrored, *await self._fitting(mirror, mirrored)
        base = self._known.get(name)
        if base is None:
            raise Unavailable(f"it is an adapter of the base {name}, of which no worker has come up yet")
        try:
            return mirrored, name, await mirror.describe(mirrored.digest, mirrored.version.source, base)
        except AdapterRefused as error:
            how = "it is registered for" if asked else "its base_model_name_or_path says"
            raise AdapterRefused([f"{how} the base {name}, which it does not fit: {error.message}"]) from error

    def _named_by(self, text: str) -> str:
        """Return the base that a `base_model_name_or_path` means: by its name, its model or the end of either's path.

        "" for one that this fleet does not have, such as the model that a base was trained from, or that several are.
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

    async def _fitting(self, mirror: Mirror, mirrored: Mirrored) -> tuple[str, AdapterRecord]:
        """Return the base that alone an adapter fits, of all but those that have failed to start.

        Raises AdapterRefused; Unavailable while one is still starting.
        """
        if missing := [name for name in self._names if name not in self._known.keys() | self._failed]:
            text = (
                f"it names no base of this fleet, and may fit {', '.join(missing)}, of which no worker has come up yet"
            )
            raise Unavailable(f"{text}: set base_model_name_or_path, or register it with `base`")
        fits: dict[str, AdapterRecord] = {}
        reasons: list[str] = []
        for name, base in self._known.items():
            try:
                fits[name] = await mirror.describe(mirrored.digest, mirrored.version.source, base)
            except AdapterRefused as error:
                reasons.append(f"{name}: {error.message[:MAX_REASON]}")
        if len(fits) == 1:
            return next(iter(fits.items()))
        if fits:
            text = f"it fits several bases of this fleet ({', '.join(fits)}) and names none of them"
            raise AdapterRefused([f"{text}: set base_model_name_or_path, or register it with `base`"])
        raise AdapterRefused([f"it fits no base of this fleet; {'; '.join(reasons)}"])

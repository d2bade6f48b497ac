"""What a `model` name stands for, and what the fleet looks like right now."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.adapters.merged import MergedAdapters, merge_of_request
from gateway.adapters.names import Names
from gateway.auth.callers import EVERYBODY, Caller
from gateway.text.own_files import OwnFiles
from gateway.text.tokenizer import ModelFiles
from peft_adapters.recipe import digest_of_merge
from protocol.queue.bus import CONNECTION_ERRORS, Bus
from protocol.runtime.metrics import FLEET_QUEUED, FLEET_RUNNING, FLEET_WORKERS, WORKERS
from protocol.wire import messages as m
from protocol.wire.errors import ClientError, ModelNotFound, Unavailable

logger = logging.getLogger(__name__)

BASE = "base"
SOURCES = ("hub", "local", "s3")
REFRESH_S = 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """A resolved name."""

    name: str  # as the API shows it
    digest: str  # "" for the base model
    files: ModelFiles  # its own, or the base's
    texts: str = ""  # hash of its own files
    vocab_size: int = 0  # tokens it knows, 0: those of the base
    source: str = ""  # where it lies: one of SOURCES; "" for the base model

    @property
    def tenant(self) -> str:
        """Who the request counts for in the scheduler's fairness where there are no API keys."""
        return self.digest or BASE


class Fleet:
    """The base model, the number of live workers and the scheduler's view, refreshed once a second."""

    def __init__(self, bus: Bus, beat_timeout_s: float) -> None:
        self._bus = bus
        self._beat_timeout_ms = int(beat_timeout_s * 1000)
        self.base: m.ServedModel | None = None
        self.status: m.SchedulerStatus | None = None
        self.num_workers = 0

    @property
    def is_ready(self) -> bool:
        """Whether a worker that is alive has said what it serves."""
        return self.base is not None and self.num_workers > 0

    async def refresh(self) -> None:
        """Look at the queue once."""
        fleet = await self._bus.members.summary(self._beat_timeout_ms)
        self.num_workers, self.base, self.status = fleet.num_workers, fleet.base, fleet.status
        FLEET_WORKERS.set(self.num_workers)
        FLEET_QUEUED.set(self.status.queued if self.status else 0)
        FLEET_RUNNING.set(self.status.running if self.status else 0)

    async def watch(self) -> None:
        """Refresh until cancelled."""
        while True:
            try:
                await self.refresh()
            except CONNECTION_ERRORS as error:
                logger.warning("the fleet cannot be seen: %s", error)
            except Exception:
                logger.exception("the fleet cannot be seen")
            await asyncio.sleep(REFRESH_S)

    async def show_workers(self) -> None:
        """Let the metrics tell of every live worker, of none while the queue is out of reach."""
        try:
            beats = await self._bus.members.worker_beats()
        except CONNECTION_ERRORS as error:
            logger.warning("the workers cannot be seen: %s", error)
            beats = {}
        WORKERS.show(beat for beat in beats.values() if beat is not None)

    async def require(self, *, worker: bool) -> m.ServedModel:
        """Return the base model. Raises Unavailable while no worker has told it, or, with `worker`, none is alive."""
        if self.base is None or (worker and not self.is_ready):
            await self.refresh()  # one may just have come up
        if self.base is None or (worker and not self.is_ready):
            raise Unavailable("no worker is ready to serve the model; it may still be loading")
        return self.base


class Catalogue:
    """Names of the base model and the adapters. Reads what adapter_store writes."""

    def __init__(self, bus: Bus, names: Names, own: OwnFiles, folder: Path | None) -> None:
        """folder: whose folders are adapters."""
        self._bus = bus
        self._folder = folder
        self.names = names
        self.own = own

    async def resolve(self, name: str, base: m.ServedModel, timeout_s: float, caller: Caller = EVERYBODY) -> Target:
        """Return what a name stands for: `base`, the base's name or "", an adapter's name or place, or `base:adapter`.

        Waits while the adapter is being fetched, on behalf of the caller. Raises ModelNotFound, PermissionDenied,
        AdapterRefused, Unavailable.
        """
        if is_base(name, base):
            return Target(base.name, "", self.own.base)
        alias = await self.names.served(self._plain(name, base), timeout_s, caller)
        texts, vocab_size = await self.own.facts(alias.digest)
        files = await self.own.files(alias.digest, texts)
        return Target(alias.name, alias.digest, files, texts, vocab_size, alias.source.partition(":")[0])

    async def resolve_all(
        self, names: Sequence[str], base: m.ServedModel, timeout_s: float, caller: Caller = EVERYBODY
    ) -> list[Target]:
        """Return what several names stand for, waiting for all at once. Raises as `resolve`."""
        return await asyncio.gather(*(self.resolve(name, base, timeout_s, caller) for name in names))

    async def resolve_merged(
        self, request: MergedAdapters, base: m.ServedModel, timeout_s: float, caller: Caller = EVERYBODY
    ) -> Target:
        """Return the adapter that a request has made of others. Raises as `resolve`, and BadRequest."""
        parts = await self.resolve_all(request.ids, base, timeout_s, caller)
        digest = digest_of_merge(merge_of_request(request, [part.digest for part in parts]))
        return Target("+".join(part.name for part in parts), digest, self.own.base)

    async def name_in(self, source: str | None, adapter_id: str, caller: Caller) -> str:
        """Return the name that an adapter of a source, in LoRAX's words, is known by; its id where none is given.

        Raises ClientError, and ModelNotFound for a folder that is not served.
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
            raise ModelNotFound(adapter_id, "No adapter of this name lies in the folder that is served.")
        scheme = "s3://" if kind == "s3" else "hub:"
        return adapter_id if adapter_id.startswith(scheme) else f"{scheme}{adapter_id}"

    def _in_folder(self, adapter_id: str) -> str:
        """Return the name of a folder that was named by its path. What lies elsewhere has no name here."""
        if self._folder is None or not adapter_id.startswith("/"):
            return adapter_id
        try:
            return str(Path(adapter_id).relative_to(self._folder.absolute()))
        except ValueError:
            return adapter_id

    async def known(self, name: str, caller: Caller) -> m.Alias | None:
        """Return a name as the caller sees it, in whatever state: its own, or everybody's; None if there is none."""
        alias = await self._bus.adapters.alias(name, caller.name) if caller.name else None
        if alias is None:
            alias = await self._bus.adapters.alias(name)
        return alias if alias is not None and caller.sees(alias) else None

    async def visible(self, caller: Caller) -> list[m.Alias]:
        """Return the names that the caller sees, in order. A tenant's own hides everybody's of the same name."""
        found = [alias for alias in await self._bus.adapters.aliases(caller.name) if caller.sees(alias)]
        return sorted({alias.name: alias for alias in sorted(found, key=_is_own)}.values(), key=_name_of)

    def _plain(self, name: str, base: m.ServedModel) -> str:
        """Return an adapter's name without the base's before it."""
        for prefix in (f"{base.name}:", f"{BASE}:"):
            if name.startswith(prefix):
                return name.removeprefix(prefix)
        return name

    async def models(self, base: m.ServedModel, caller: Caller) -> list[dict[str, Any]]:
        """Return the model objects that a caller sees: the base first, then the adapters by name."""
        aliases = await self.visible(caller)
        digests = sorted({alias.digest for alias in aliases if alias.digest})
        records = await self._bus.adapters.records(digests)
        return [base_object(base), *(adapter_object(alias, records.get(alias.digest), base) for alias in aliases)]

    async def model(self, name: str, base: m.ServedModel, caller: Caller) -> dict[str, Any]:
        """Return one model object, in whatever state. Raises ModelNotFound."""
        if name in (BASE, base.name):
            return base_object(base)
        alias = await self.known(self._plain(name, base), caller)
        if alias is None:
            raise ModelNotFound(name)
        record = await self._bus.get(self._bus.keys.adapter(alias.digest), m.AdapterRecord) if alias.digest else None
        return adapter_object(alias, record, base)


def is_base(name: str, base: m.ServedModel) -> bool:
    """Tell whether a request that names this wants the base model."""
    return name in ("", BASE, base.name)


def _name_of(alias: m.Alias) -> str:
    return alias.name


def _is_own(alias: m.Alias) -> bool:
    return bool(alias.tenant)


def base_object(base: m.ServedModel) -> dict[str, Any]:
    """Return the base model as the API shows it."""
    return {
        "id": base.name,
        "object": "model",
        "created": base.created_ms // 1000,
        "owned_by": "lorafleet",
        "root": base.name,
        "parent": None,
        "max_model_len": base.max_model_len,
    }


def adapter_object(alias: m.Alias, record: m.AdapterRecord | None, base: m.ServedModel) -> dict[str, Any]:
    """Return an adapter as the API shows it; `root` is its source, never a path of this machine."""
    return {
        "id": alias.name,
        "object": "model",
        "created": alias.created_ms // 1000,
        "owned_by": alias.tenant or "lorafleet",
        "root": alias.source or alias.name,
        "parent": base.name,
        "digest": alias.digest or None,
        "rank": record.rank if record else None,
        "state": alias.state,
        "reason": alias.reason or None,
    }

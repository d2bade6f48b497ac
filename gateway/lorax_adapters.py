"""From `adapter_id`, `adapter_source` and `merged_adapters` to what is served under them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from gateway.callers import Caller
from gateway.catalogue import BASE, Catalogue, Target
from gateway.lorax_api import AdapterParameters, NativeMerge
from gateway.lorax_errors import GenerationFailed
from gateway.merged import merge_of_request
from protocol import messages as m
from protocol.errors import BadRequest, ClientError, LorafleetError, ModelNotFound, Unavailable
from protocol.merging import digest_of_merge
from protocol.settings import Settings

SOURCES = ("hub", "local", "s3")


class NativeAdapters:
    """The adapters that native requests name."""

    def __init__(self, catalogue: Catalogue, settings: Settings) -> None:
        self._catalogue = catalogue
        self._folder = settings.adapters
        self._timeout_s = settings.request_timeout_s

    async def resolve(self, p: AdapterParameters, base: m.ServedModel, caller: Caller) -> Target:
        """Return what a request is for. The target's name is the id as it was given.

        Raises BadRequest for contradictions, GenerationFailed for an adapter that cannot be served, Unavailable.
        """
        if p.merged_adapters is None:
            return await self._one(p.adapter_id or "", p.adapter_source, base, caller)
        if p.adapter_id:
            raise BadRequest("at most one of `adapter_id` or `adapters` may be provided", param="merged_adapters")
        return await self._merged(p.merged_adapters, p.adapter_source, base, caller)

    async def _one(self, adapter_id: str, source: str | None, base: m.ServedModel, caller: Caller) -> Target:
        if adapter_id in ("", BASE, base.name):
            return Target("", "", self._catalogue.own.base)
        try:
            name = await self._name(adapter_id, source, caller)
            target = await self._catalogue.resolve(name, base, self._timeout_s, caller)
        except Unavailable:
            raise
        except LorafleetError as error:
            raise GenerationFailed(error) from error
        return replace(target, name=adapter_id)

    async def _name(self, adapter_id: str, source: str | None, caller: Caller) -> str:
        """Return the name that the catalogue knows an adapter of this source by. Raises ClientError."""
        kind = (source or "").lower()
        if not kind:
            return adapter_id
        if kind not in SOURCES:
            text = f"Invalid source '{source}' when downloading adapter '{adapter_id}': it may be {', '.join(SOURCES)}"
            raise ClientError(text, param="adapter_source")
        name = self._in_folder(adapter_id) if kind == "local" else adapter_id
        known = await self._catalogue.known(name, caller)
        if known is not None and known.source.startswith(f"{kind}:"):
            return name
        if kind == "local":
            raise ModelNotFound(adapter_id, "No adapter of this name lies in the folder that is served.")
        if kind == "s3":
            return adapter_id if adapter_id.startswith("s3://") else f"s3://{adapter_id}"
        return adapter_id if adapter_id.startswith("hub:") else f"hub:{adapter_id}"

    def _in_folder(self, adapter_id: str) -> str:
        """Return the name of a folder that was named by its path. What lies elsewhere has no name here."""
        if self._folder is None or not adapter_id.startswith("/"):
            return adapter_id
        try:
            return str(Path(adapter_id).relative_to(self._folder.absolute()))
        except ValueError:
            return adapter_id

    async def _merged(self, asked: NativeMerge, source: str | None, base: m.ServedModel, caller: Caller) -> Target:
        if not asked.ids:
            raise BadRequest(
                "at least one adapter ID must be provided when setting `adapters`", param="merged_adapters"
            )
        if len(asked.weights) != len(asked.ids):
            raise BadRequest("number of adapter IDs must match number of adapter weights", param="merged_adapters")
        targets = await asyncio.gather(*(self._one(name, source, base, caller) for name in asked.ids))
        merge = merge_of_request(asked, [target.digest or BASE for target in targets])
        return Target(",".join(asked.ids), digest_of_merge(merge), self._catalogue.own.base)

"""From `adapter_id`, `adapter_source` and `merged_adapters` to what is served under them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from gateway.adapters.merged import merge_of_request
from gateway.adapters.resolver import BASE, Resolver, Target, is_base
from gateway.auth.callers import Caller
from gateway.lorax.api import AdapterParameters, NativeMerge
from gateway.lorax.errors import GenerationFailed
from peft_adapters.recipe import digest_of_merge
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, LorafleetError, Unavailable


class NativeAdapters:
    """The adapters that native requests name."""

    def __init__(self, resolver: Resolver, settings: Settings) -> None:
        self._resolver = resolver
        self._timeout_s = settings.request_timeout_s

    async def resolve(self, p: AdapterParameters, base: m.ServedModel, caller: Caller) -> Target:
        """Return what a request is for. The target's name is the id as it was given; a token beside it goes
        before the caller's.

        Raises BadRequest for contradictions, GenerationFailed for an adapter that cannot be served, Unavailable.
        """
        if p.api_token:
            caller = replace(caller, token=p.api_token)
        if p.merged_adapters is None:
            return await self._one(p.adapter_id or "", p.adapter_source, base, caller)
        if p.adapter_id:
            raise BadRequest("at most one of `adapter_id` or `adapters` may be provided", param="merged_adapters")
        return await self._merged(p.merged_adapters, p.adapter_source, base, caller)

    async def _one(self, adapter_id: str, source: str | None, base: m.ServedModel, caller: Caller) -> Target:
        if is_base(adapter_id, base):
            return Target("", "", self._resolver.own.base)
        try:
            name = await self._resolver.name_in(source, adapter_id, caller)
            target = await self._resolver.resolve(name, base, self._timeout_s, caller)
        except Unavailable:
            raise
        except LorafleetError as error:
            raise GenerationFailed(error) from error
        return replace(target, name=adapter_id)

    async def _merged(self, asked: NativeMerge, source: str | None, base: m.ServedModel, caller: Caller) -> Target:
        if not asked.ids:
            raise BadRequest(
                "at least one adapter ID must be provided when setting `adapters`", param="merged_adapters"
            )
        if len(asked.weights) != len(asked.ids):
            raise BadRequest("number of adapter IDs must match number of adapter weights", param="merged_adapters")
        targets = await asyncio.gather(*(self._one(name, source, base, caller) for name in asked.ids))
        merge = merge_of_request(asked, [target.digest or BASE for target in targets])
        sources = ",".join(sorted({target.source for target in targets}))
        return Target(",".join(asked.ids), digest_of_merge(merge), self._resolver.own.base, source=sources)

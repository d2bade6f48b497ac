"""The operations on adapters: list, register, preload, pin, evict, unload. `operator_routes.py` has the routes.

An operation is checked here and written to Redis; stores and workers execute it, while this waits for the result.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import orjson

from gateway.adapters.aliases import Aliases, error_of, is_settled
from gateway.adapters.catalogue import OBJECTS_AT_ONCE, CatalogueCopy
from gateway.adapters.memory import AdapterMemory, Freed
from gateway.adapters.views import AdapterObjects
from gateway.auth.callers import Caller
from gateway.bodies.fields import BASE
from gateway.bodies.json_slices import dumps
from gateway.http.http_client import HttpClient
from gateway.overload.cost import held, hold
from gateway.overload.loop_slice import each
from protocol.queue.bus import CONNECTION_ERRORS, Bus, now_ms
from protocol.runtime.adapter_refs import FOLDER, Reference, SourcePolicy, in_root, parse_reference, parse_source
from protocol.runtime.fair_slots import FairSlots
from protocol.runtime.settings import Settings, names_of
from protocol.wire import messages as m
from protocol.wire.brief import brief
from protocol.wire.errors import (
    BadRequest,
    Conflict,
    LorafleetError,
    ModelNotFound,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from protocol.wire.keys import private_name
from protocol.wire.records import AdapterUse

logger = logging.getLogger(__name__)

REMOVAL_S = 10.0
"""Minimum seconds to wait for a store to remove a name."""

MAX_FREEING, FREEING_AT_ONCE, FREEING_S = 100, 2, 30.0
"""Contents unloaded by tenants are freed in the background: maximum pending, maximum concurrent, and maximum seconds to
wait for the requests that use one. Others are evicted when their memory is needed."""

OTHERS = "(another tenant's)"
"""Shown instead of a name that the caller may not see."""

API = "api"
SETTINGS = "settings"
"""Origins of a pin: an API call, or the settings."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A registration to be made."""

    name: str
    source: str  # "": the name is its source
    caller: Caller
    tenant: str  # owner of the name; "": shared by all tenants
    token: str = ""  # access token for the source
    replace: bool = False  # also if the name has another source now
    wait_s: float = 60.0
    base: str = ""  # name of its base; "": the one that it names, or that fits


@dataclass(frozen=True, slots=True)
class Unloaded:
    """A name that is no longer served, and the memory freed by that."""

    name: str
    digest: str
    freed: Freed
    kept_by: list[str]  # other names of the same content, which is therefore kept
    num_ended: int  # number of requests that were failed


class AdapterOperations:
    """The operations of `/v1/adapters`.

    Those that change something first check the caller's rights, even though the routes do too.
    """

    def __init__(
        self, bus: Bus, settings: Settings, aliases: Aliases, catalogue: CatalogueCopy, stores: HttpClient
    ) -> None:
        self._bus = bus
        self._catalogue = catalogue
        self._aliases = aliases
        self._policy = SourcePolicy.of(settings)
        self._has_first = settings.adapters is not None
        first = [settings.adapters] if settings.adapters is not None else []
        self._roots = [*first, *(Path(root).expanduser() for root in names_of(settings.adapter_roots))]
        self.memory = AdapterMemory(bus, stores)
        self._unloading = FairSlots(sys.maxsize, num_of_tenant=1)
        self._free_slots = asyncio.Semaphore(FREEING_AT_ONCE)
        self._freeing: set[asyncio.Task[None]] = set()
        aliases.listeners.append(self.memory.on_event)

    # ------------------------------------------------------------ list

    async def list(self, caller: Caller, tenant: str | None, after: str, limit: int) -> dict[str, Any]:
        """Return a page of at most `limit` adapters by name: those that the caller sees, or a tenant's own.

        after: `last_id` of the previous page. A bare name skips every tenant's adapter of that name.
        """
        owner, parts = None if tenant is None else caller.namespace(tenant), list[bytes]()
        page, has_more = await self._catalogue.page(
            after, limit, caller.sees if owner is None else lambda alias: alias.tenant == owner
        )
        for begin in range(0, len(page), OBJECTS_AT_ONCE):
            parts.append(dumps(await self._show(page[begin : begin + OBJECTS_AT_ONCE], caller))[1:-1])
            hold(held() + len(parts[-1]))
        return {
            "object": "list",
            "data": orjson.Fragment(b"[" + b",".join(parts) + b"]"),
            "has_more": has_more,
            "last_id": f"{page[-1].name},{page[-1].tenant}" if page else None,
        }

    async def get(self, name: str, caller: Caller, tenant: str | None = None) -> dict[str, Any]:
        """Return the object of one adapter that the caller sees. Raises ModelNotFound."""
        return (await self._show([await self.seen(name, caller, tenant)], caller))[0]

    async def seen(self, name: str, caller: Caller, tenant: str | None) -> m.Alias:
        """Return the alias that a caller sees under a name: its own, else the shared one; or that of a given tenant.

        Raises ModelNotFound, PermissionDenied.
        """
        owners = [caller.namespace(tenant)] if tenant is not None else sorted(caller.names, reverse=True)
        for owner in owners:
            alias = await self._bus.adapters.alias(name, owner)
            if alias is not None and (tenant is not None or caller.sees(alias)):
                return alias
        raise ModelNotFound(name)

    async def _show(self, aliases: Sequence[m.Alias], caller: Caller) -> list[dict[str, Any]]:
        """Return the objects of aliases. Only admins see the workers' state: tenants may share an adapter's content."""
        digests = sorted({alias.digest for alias in aliases if alias.digest})
        records = await self._bus.adapters.records(digests)
        if not caller.is_admin:
            bare = AdapterObjects([], {}, shows_paths=False)
            return await each(aliases, lambda alias: bare.of(alias, records.get(alias.digest), None))
        uses = await self._bus.adapters.uses(digests)
        objects = AdapterObjects(await self.memory.beats(), await self._bus.adapters.pins())
        return await each(aliases, lambda a: objects.of(a, records.get(a.digest), uses.get(a.digest, AdapterUse())))

    # ------------------------------------------------------------ register, preload, pin

    async def register(self, wanted: Wanted) -> tuple[bool, bool]:
        """Serve a source under a name, and wait for it. Return whether it is served, and whether the name is new.

        If the name has this source already, the stores check the source again. If they refuse it, everything stays
        unchanged. Raises Conflict, BadRequest, PermissionDenied, Unavailable, and the stores' refusal.
        """
        wanted.caller.require_names_of(wanted.tenant)
        reference = self.reference_of(wanted.source or wanted.name)
        check_name(wanted.name)
        as_fleet = self._check_place(reference, wanted.caller)
        tenant = wanted.tenant
        alias = await self._bus.adapters.alias(wanted.name, tenant)
        before = await self._bus.adapters.registration(wanted.name, tenant)
        if alias is not None and alias.is_folder and reference.source != alias.source:
            raise Conflict(f"`{wanted.name}` is a folder under the adapter root, which comes first", code="name_taken")
        is_known = await self.is_registered(wanted.name, tenant)
        source_before = before.source if before is not None else alias.source if alias is not None else ""
        if is_known and source_before != reference.source and not wanted.replace:
            raise Conflict(
                f"`{wanted.name}` is already served from {source_before}; use replace to change it", code="name_taken"
            )
        asked_ms = now_ms()
        token = self._aliases.sealed(wanted.token, private_name(wanted.name, tenant))
        known = before if before is not None and source_before == reference.source else None
        token = token or (known.token if known is not None else "")
        base = wanted.base or (known.base if known is not None else "")
        registration = m.Registration(
            name=wanted.name, source=reference.source, token=token, tenant=tenant, asked_ms=asked_ms, as_fleet=as_fleet,
            base=base,
        )  # fmt: skip
        await self._aliases.register(registration, wanted.caller)

        def is_answered(found: m.Alias | None) -> bool:
            return found is not None and is_settled(found) and found.asked_ms >= asked_ms

        try:
            found = await self._aliases.wait(wanted.name, tenant, is_answered, wanted.wait_s)
        except Unavailable as error:
            if error.code != "adapter_loading":
                await self._take_back(registration, before)
                raise
            return False, not is_known
        assert found is not None
        if found.status:  # refused; possibly the previous content stays
            with suppress(Unavailable):  # the refusal is the more important error
                await self._take_back(registration, before)
            raise error_of(found)
        return True, not is_known

    async def upload(self, wanted: Wanted, body: AsyncIterator[bytes], length: int) -> tuple[bool, bool]:
        """Store the adapter in a zip and serve it under a name. Returns and raises as `register`.

        A refused adapter is deleted. Also raises PermissionDenied unless the caller is an operator, BadRequest for an
        invalid zip, TooLarge, Overloaded, and Conflict if the name is taken or the store accepts no uploads.
        """
        wanted.caller.require("admin")
        check_name(wanted.name)
        if not wanted.replace and await self.is_registered(wanted.name, wanted.tenant):
            raise Conflict(f"`{wanted.name}` is already served; use replace to change it", code="name_taken")
        source, url = await self.memory.send_upload(body, length)
        try:
            return await self.register(replace(wanted, source=source))
        except LorafleetError:
            await self.memory.drop_upload(source, url)
            raise

    def _check_place(self, reference: Reference, caller: Caller) -> bool:
        """Return whether a source is read with the fleet's own credentials. Raises PermissionDenied.

        A tenant may use them only for sources that it sees, whatever name it registers.
        """
        if reference.path.startswith("/") and caller.tenant is not None and not caller.is_admin:
            text = "only keys with the scope admin may load from --adapter-roots, whose adapters belong to no tenant"
            raise PermissionDenied(text, param="source")
        is_visible = caller.may_use(reference.place)
        as_fleet = caller.is_admin or (is_visible and self._policy.lends(reference))
        if reference.scheme == "local" and not is_visible:
            raise PermissionDenied(
                f"the folder {brief(reference.source, 200)} is not available to this tenant", param="source"
            )
        self._policy.check(reference, on_request=False, as_fleet=as_fleet)
        return as_fleet

    async def _take_back(self, registration: m.Registration, before: m.Registration | None) -> None:
        """Undo a registration unless there is a newer one. Raises Unavailable if no store removes a new name."""
        if before is None:
            name, tenant, asked_ms = registration.name, registration.tenant, registration.asked_ms
            if await self._bus.adapters.unregister(name, tenant, unless_asked_after=asked_ms):
                await self._aliases.wait(
                    name, tenant, lambda found: found is None or found.is_folder or found.asked_ms > asked_ms, REMOVAL_S
                )
            return
        same = msgspec.structs.replace(before, asked_ms=registration.asked_ms, on_request=registration.on_request)
        is_other = same != registration
        if is_other and await self._bus.adapters.registration(registration.name, registration.tenant) == registration:
            await self._bus.adapters.register(msgspec.structs.replace(before, asked_ms=now_ms()))

    def reference_of(self, source: str) -> Reference:
        """Parse an adapter's source, its path under an adapter root, or its folder's name.

        Raises BadRequest, and NotFound for a path under no root.
        """
        path = source.removeprefix("local:")
        if path.startswith("/"):
            return self._of_path(path)
        reference = parse_source(source) or parse_source(f"local:{source}")
        if reference is None:
            raise BadRequest(
                f"{brief(source, 300)} is not an adapter source: use local:FOLDER or a path under the adapter"
                " root, ORG/NAME[@REVISION] on the Hub, s3://BUCKET/PREFIX",
                param="source",
            )
        return reference

    def _of_path(self, path: str) -> Reference:
        """Return the reference of an absolute path: relative to the first root, or absolute in a further root."""
        place = PurePosixPath(path)
        for number, root in enumerate(self._roots):
            real = PurePosixPath(os.path.realpath(root))
            for known in (PurePosixPath(root), real):
                if place.is_relative_to(known):
                    folder = str(place.relative_to(known))
                    is_first = number == 0 and self._has_first
                    reference = parse_source(f"local:{folder if is_first else real / folder}")
                    if reference is None or not in_root(folder):
                        raise _not_a_folder(path)
                    return reference
        raise NotFound(
            f"{brief(path, 300)} is in no adapter folder; these are set by --adapters and --adapter-roots",
            param="source",
        )

    async def preload(self, name: str, caller: Caller, tenant: str, wait_s: float) -> bool:
        """Have every worker of its base fetch an adapter that the caller sees; return whether all have within `wait_s`.

        Raises ModelNotFound, PermissionDenied.
        """
        caller.require("adapters")
        alias = await self._served(name, wait_s, tenant)
        if not (caller.is_admin or caller.sees(alias)):
            raise ModelNotFound(name)
        await self.memory.prefetch(alias.digest, alias.base)
        return await self._wait_workers(alias, lambda beat: alias.digest in (*beat.resident, *beat.host), wait_s)

    async def pin(self, name: str, caller: Caller, wait_s: float) -> bool:
        """Have every worker load and keep an adapter; return whether all have within `wait_s`.

        Raises ModelNotFound, and PermissionDenied unless the caller is an operator.
        """
        caller.require("admin")
        alias = await self._served(name, wait_s)
        await self._bus.adapters.pin(name, API)
        return await self._wait_workers(
            alias, lambda beat: beat.pinned.get(alias.digest) == "" and alias.digest in beat.resident, wait_s
        )

    async def pin_when_served(self, name: str, caller: Caller) -> None:
        """Have every worker load and keep a name's adapter once it is served. Raises PermissionDenied."""
        caller.require("admin")
        await self._bus.adapters.pin(name, API)

    async def refresh(self, name: str, caller: Caller, tenant: str | None, wait_s: float) -> bool:
        """Have the stores check a registered name's source again; return whether they have within `wait_s`.

        Raises ModelNotFound, Conflict for a folder of the adapter root, and the stores' refusal.
        """
        caller.require("adapters")
        known = await self.seen(name, caller, tenant)
        if known.tenant != caller.namespace(tenant) and not caller.is_admin:
            raise PermissionDenied(f"`{name}` is shared by all tenants: only its operator can refresh it", param="name")
        asked_ms = now_ms()
        if not await self._bus.adapters.ask_again(name, known.tenant, asked_ms):
            raise Conflict(
                f"`{name}` is a folder under the adapter root, which stores scan on their own",
                code="adapter_folder",
            )

        def is_answered(found: m.Alias | None) -> bool:
            return found is None or (is_settled(found) and found.asked_ms >= asked_ms)

        try:
            found = await self._aliases.wait(name, known.tenant, is_answered, wait_s)
        except Unavailable as error:
            if error.code != "adapter_loading":
                raise
            return False
        if found is None:
            raise ModelNotFound(name)
        if found.status:
            raise error_of(found)
        return True

    async def is_registered(self, name: str, tenant: str = "") -> bool:
        """Return whether a name is registered or a folder; False if only calls have used it as a source."""
        alias, registration = (
            await self._bus.adapters.alias(name, tenant),
            await self._bus.adapters.registration(name, tenant),
        )
        return any(known is not None and not known.on_request for known in (alias, registration))

    async def unpin(self, name: str, caller: Caller) -> None:
        """Allow workers to evict an adapter again.

        Raises ModelNotFound, Conflict if the settings pin it, and PermissionDenied unless the caller is an operator.
        """
        caller.require("admin")
        by = (await self._bus.adapters.pins()).get(name)
        if by == SETTINGS:
            raise Conflict(f"`{name}` is pinned by the settings", code="pinned_by_settings")
        if by is None and await self._bus.adapters.alias(name) is None:
            raise ModelNotFound(name)
        await self._bus.adapters.unpin(name)

    async def _served(self, name: str, wait_s: float, tenant: str = "") -> m.Alias:
        alias = await self._bus.adapters.alias(name, tenant)
        if alias is not None and not is_settled(alias):
            alias = await self._aliases.wait(name, tenant, lambda found: found is None or is_settled(found), wait_s)
        if alias is None:
            raise ModelNotFound(name)
        if alias.state == "failed":
            raise error_of(alias)
        return await self._aliases.confirmed(alias, wait_s)

    async def _wait_workers(self, alias: m.Alias, has: Callable[[m.WorkerBeat], bool], wait_s: float) -> bool:
        deadline_s = time.monotonic() + wait_s
        beats = await self.memory.beats()
        while not all(has(beat) for beat in beats if beat.is_of(alias.base)):
            if time.monotonic() > deadline_s:
                return False
            beats = await self.memory.next_beats()
        return True

    # ------------------------------------------------------------ evict, unload

    async def evict(self, name: str, caller: Caller, wait_s: float) -> Freed:
        """Free an adapter's memory in workers; it is still served.

        Raises ModelNotFound, Conflict if it is pinned, and PermissionDenied unless the caller is an operator.
        """
        caller.require("admin")
        alias = await self._served(name, wait_s)
        aliases = {other.name: other for other in await self._bus.adapters.aliases()}
        for pinned in await self._bus.adapters.pins():
            if pinned in aliases and aliases[pinned].digest == alias.digest:
                raise Conflict(f"`{pinned}` is pinned: unpin it first", code="adapter_pinned")
        return await self.memory.evict(alias.digest, wait_s)

    async def unload(
        self, name: str, caller: Caller, tenant: str, *, force: bool, blob: bool, wait_s: float
    ) -> Unloaded:
        """Stop serving a tenant's name, and free its content's memory unless another name refers to it.

        New requests are refused at once; accepted ones end first, or are failed with `force`. blob: free the stores'
        disks too. Raises ModelNotFound, Conflict for a folder of the adapter root, Unavailable without a store,
        PermissionDenied for another tenant's name. A tenant's unloads run one at a time, so that a name is unloaded
        once.
        """
        caller.require_names_of(tenant)
        if caller.is_admin:
            return await self._unload(name, caller, tenant, force=force, blob=blob, wait_s=wait_s)
        async with self._unloading.held(tenant):
            return await self._unload(name, caller, tenant, force=force, blob=blob, wait_s=wait_s)

    async def _unload(
        self, name: str, caller: Caller, tenant: str, *, force: bool, blob: bool, wait_s: float
    ) -> Unloaded:
        alias, registration = (
            await self._bus.adapters.alias(name, tenant),
            await self._bus.adapters.registration(name, tenant),
        )
        if alias is None and registration is None:
            raise ModelNotFound(name)
        if alias is not None and alias.is_folder:
            raise Conflict(
                f"`{name}` is a folder under the adapter root, and is served while it exists; evict frees its memory",
                code="adapter_folder",
            )
        if not tenant and (await self._bus.adapters.pins()).get(name) == API:
            await self._bus.adapters.unpin(name)
        await self._bus.adapters.unregister(name, tenant)
        await self._aliases.wait(name, tenant, lambda found: found is None or found.is_folder, max(wait_s, REMOVAL_S))
        digest = alias.digest if alias is not None else ""
        names = (await self._catalogue.copy()).after("", "")
        others = [o async for o in names if o.digest == digest and (o.name, o.tenant) != (name, tenant)]
        kept_by = sorted({other.name if caller.sees(other) else OTHERS for other in others})
        error = Conflict(f"the adapter `{name}` was unloaded", param="model", code="adapter_unloaded")
        if not digest or (kept_by if caller.is_admin else kept_by and kept_by != [OTHERS]):
            return Unloaded(name, digest, Freed(), [one for one in kept_by if one != OTHERS or caller.is_admin], 0)
        if not caller.is_admin:
            # Neither freed bytes nor the duration may reveal whether other tenants have this content.
            num_ended = await self.memory.end_requests(digest, error, caller.name) if force else 0
            if not others and len(self._freeing) < MAX_FREEING:
                task = asyncio.create_task(self._free_later(digest, blob=blob, wait_s=min(wait_s, FREEING_S)))
                self._freeing.add(task)
                task.add_done_callback(self._freeing.discard)
            return Unloaded(name, digest, Freed(), [], num_ended)
        num_ended = await self.memory.end_requests(digest, error) if force else 0
        return Unloaded(name, digest, await self._free(digest, blob=blob, wait_s=wait_s), [], num_ended)

    async def _free(self, digest: str, *, blob: bool, wait_s: float) -> Freed:
        """Free a content's memory once no request uses it, or after `wait_s` if one still does."""
        deadline_s = time.monotonic() + wait_s
        await self.memory.wait_unused(digest, wait_s)
        freed = await self.memory.evict(digest, max(deadline_s - time.monotonic(), 2.0))
        if blob and not freed.waiting:
            freed.disk_bytes = await self.memory.drop_blob(digest)
        return freed

    async def _free_later(self, digest: str, *, blob: bool, wait_s: float) -> None:
        try:
            async with self._free_slots:
                await self._free(digest, blob=blob, wait_s=wait_s)
        except LorafleetError as error:
            logger.warning("not all memory of an unloaded adapter was freed: %s", error)
        except CONNECTION_ERRORS as error:
            logger.warning("not all memory of an unloaded adapter was freed: %s", error)


def _not_a_folder(path: str) -> BadRequest:
    return BadRequest(
        f"{brief(path, 300)} is under an adapter root, but cannot be served: at most 8 folders deep,"
        " each name of at most 96 letters, digits, dots, dashes and underscores, the first a letter or a digit",
        param="source",
    )


def check_name(name: str) -> None:
    """Raise BadRequest unless a text is a valid adapter name."""
    if name == BASE or not (FOLDER.fullmatch(name) or parse_reference(name)):
        raise BadRequest(
            f"{brief(name, 200)} is not a valid adapter name: use NAME or ORG/NAME of letters, digits, dots, dashes and"
            " underscores, at most 96 each, or its source",
            param="name",
        )

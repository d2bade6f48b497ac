"""The bases of the fleet for operators, who may add and remove some while it runs."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from pydantic import Field

from gateway.auth.authentication import is_loopback
from gateway.bodies.parameter_check import JsonBody
from gateway.fleet.bases import GatewayBases
from gateway.fleet.view import FleetView
from protocol.queue.bus import Bus
from protocol.queue.members import MAX_BASES
from protocol.runtime.adapter_refs import FOLDER, parse_source
from protocol.runtime.model_files import RESERVED, served_name
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest, Conflict, PermissionDenied


class BaseRequest(JsonBody):
    """`POST /v1/bases`."""

    OBJECT = "base"

    model: Annotated[str, Field(min_length=1, max_length=1000)]
    name: Annotated[str, Field(max_length=193)] = ""  # default: the Hub id, or the folder's name


class BaseAdministration:
    """The bases of the settings, and those that the queue's record adds."""

    def __init__(self, bus: Bus, settings: Settings, fleet: FleetView, bases: GatewayBases) -> None:
        self._record = bus.added_bases
        self._fleet = fleet
        self._bases = bases
        self._may_change = settings.api_keys or is_loopback(settings.host)

    async def list(self) -> dict[str, Any]:
        """Return all bases, the default one first, each with its state in this gateway."""
        await self._fleet.refresh()
        found = [self._view(name, base) for name, base in self._fleet.known.items()]
        return {"object": "list", "data": found, "has_more": False}

    def _view(self, name: str, base: m.AddedBase) -> dict[str, Any]:
        found, reason = self._bases.found(name), self._fleet.failures.get(name)
        if isinstance(found, str):
            state, reason = "unreadable", reason or found
        elif found is None:
            state = "loading"
        elif reason is not None:
            state = "failed"
        else:
            num = self._fleet.load(name).workers if self._fleet.further else self._fleet.num_workers
            state = "ready" if num else "no_worker"
        return {
            "id": name, "object": "base", "model": base.model, "added": base.added_ms > 0, "state": state,
            "reason": reason or None,
        }  # fmt: skip

    async def add(self, asked: BaseRequest) -> tuple[dict[str, Any], bool]:
        """Add a base; return it, and whether it is new. Raises BadRequest, Conflict, PermissionDenied."""
        self._check_allowed()
        await self._fleet.refresh()
        is_path = asked.model.startswith("/") and parse_source(f"local:{asked.model}") is not None
        if not is_path and ("/" not in asked.model or not FOLDER.fullmatch(asked.model)):
            text = f"model {brief(asked.model)} is neither a Hub id, org/name, nor an absolute path"
            raise BadRequest(text, param="model")
        name = await asyncio.to_thread(served_name, asked.model, asked.name)  # the same name as its workers use
        if not FOLDER.fullmatch(name):
            text = "at most 96 letters, digits, dots, underscores and hyphens, or two such with a slash between them"
            raise BadRequest(f"the name of a base is {text}; {brief(name)} is not", param="name")
        if name in RESERVED:
            raise BadRequest(f"a base cannot be named {name}, which {RESERVED[name]}", param="name")
        in_settings = self._fleet.in_settings
        if name in in_settings or asked.model in {base.model for base in in_settings.values()}:
            raise Conflict(f"the settings of this fleet name the base {name} or its model already", code="base_exists")
        default = next(iter(in_settings))
        if self._fleet.base is not None and self._fleet.base.name != default:
            text = f"the workers serve {self._fleet.base.name}, and this gateway's settings name it {default}"
            raise Conflict(f"{text}: in a fleet of several bases both must be one name", code="base_named_otherwise")
        is_new = await self._record.add(name, asked.model, MAX_BASES - len(in_settings))
        await self._fleet.refresh()
        return self._view(name, m.AddedBase(model=asked.model, added_ms=1)), is_new

    async def remove(self, name: str) -> dict[str, Any]:
        """Remove a base. Raises Conflict for a base of the settings, NotFound, PermissionDenied."""
        self._check_allowed()
        if name in self._fleet.in_settings:
            text = f"the base {name} is in the settings of this fleet: take it out of --more-models and restart"
            raise Conflict(text, code="base_in_settings")
        await self._record.remove(name)
        return {"id": name, "object": "base.deleted", "deleted": True}

    def _check_allowed(self) -> None:
        if not self._may_change:
            text = "without API keys, bases are added and removed only at gateways that listen on this machine alone"
            raise PermissionDenied(f"{text}: turn on --api-keys", code="bases_need_keys")

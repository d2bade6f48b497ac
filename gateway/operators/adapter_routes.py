"""The routes of `/v1/adapters`, and vLLM's two routes with its status codes, except 4xx where it answers 500.

Each handler parses its request, calls `operations.py` and writes the outcome. A source in a path may contain slashes or
be percent-encoded.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from gateway.adapters.memory import Freed
from gateway.adapters.operations import AdapterOperations, Unloaded, Wanted
from gateway.auth.callers import caller_of
from gateway.bodies.json_bodies import json_response
from gateway.bodies.parameter_check import JsonBody
from gateway.books.audit import AuditedRoute, about, done
from gateway.http import openapi
from gateway.http.access import ADAPTERS, ADMIN, ADMIN_FILE, READ_ADAPTERS, Routes
from gateway.http.paths import UPLOAD
from protocol.wire.errors import BadRequest, Conflict, NotFound, Unavailable

MAX_WAIT_S = 600.0

PAGE, MAX_PAGE = 100, 1000
"""Adapters per page of the list, default and maximum."""

Wait = Annotated[float, Query(ge=0, le=MAX_WAIT_S)]


class RegisterRequest(JsonBody):
    """`POST /v1/adapters`."""

    OBJECT = "register"

    name: Annotated[str, Field(min_length=1, max_length=1100)]
    source: Annotated[str, Field(max_length=1100)] = ""  # default: the name
    token: Annotated[str, Field(max_length=1000)] = ""  # for the source; default: the bearer, if a Hub token
    replace: bool = False
    pin: bool = False
    preload: bool = False
    wait_s: Annotated[float, Field(ge=0, le=MAX_WAIT_S)] = 60.0
    base: Annotated[str, Field(max_length=300)] = ""  # default: the base that it names, or that fits
    tenant: Annotated[str, Field(max_length=64)] | None = None  # owner of the name; only admins may set it


class LoadRequest(JsonBody):
    """`POST /v1/load_lora_adapter`, in vLLM's form, and `/load_lora_adapter`, which trainers use."""

    OBJECT = "load_lora"

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadRequest(JsonBody):
    """`POST /v1/unload_lora_adapter`, in vLLM's form, and `/unload_lora_adapter`."""

    OBJECT = "unload_lora"

    lora_name: str


class OperatorEndpoints:
    """The routes' handlers."""

    def __init__(self, operations: AdapterOperations) -> None:
        self._operations = operations

    async def list(
        self,
        request: Request,
        after: str = "",
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = PAGE,
        tenant: str | None = None,
    ) -> Response:
        """Answer with a page of adapters."""
        return json_response(await self._operations.list(caller_of(request), tenant, after, limit))

    async def get(self, name: str, request: Request, tenant: str | None = None) -> Response:
        """Answer with one adapter."""
        return json_response(await self._operations.get(name, caller_of(request), tenant))

    async def register(self, body: RegisterRequest, request: Request) -> Response:
        """Answer 201 once a new name is served, 200 for a known one, 202 if it is not served within `wait_s`."""
        caller = caller_of(request)
        about(request, body.name, f"source={body.source or body.name} replace={body.replace} pin={body.pin}")
        tenant = caller.namespace(body.tenant)
        if body.pin and tenant:
            raise BadRequest("only an adapter shared by all tenants can be pinned", param="pin")
        token = body.token or caller.token
        wanted = Wanted(body.name, body.source, caller, tenant, token, body.replace, body.wait_s, body.base)
        is_served, is_new = await self._operations.register(wanted)
        done(request)
        if body.pin:
            await self._operations.pin_when_served(body.name, caller)
        if body.preload and is_served:
            await self._operations.preload(body.name, caller, tenant, 0.0)
        status = (201 if is_new else 200) if is_served else 202
        return json_response(await self._operations.get(body.name, caller, tenant), status)

    async def upload(
        self,
        request: Request,
        name: Annotated[str, Query(min_length=1, max_length=200)],
        replace: bool = False,
        wait_s: Wait = 60.0,
    ) -> Response:
        """Answer 201 once the adapter in the body, a zip, is served; 200 if its name was before; 202 as `register`."""
        about(request, name)
        caller, length = caller_of(request), request.headers.get("content-length", "")
        caller.require("admin")
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/zip":
            raise BadRequest("an adapter is uploaded as application/zip", code="bad_zip")
        if not length.isdecimal() or not int(length):
            raise BadRequest("an upload needs a Content-Length", code="bad_zip")
        wanted = Wanted(name, "", caller, "", replace=replace, wait_s=wait_s)
        is_served, is_new = await self._operations.upload(wanted, request.stream(), int(length))
        done(request)
        status = (201 if is_new else 200) if is_served else 202
        return json_response(await self._operations.get(name, caller, ""), status)

    async def unload(
        self,
        name: str,
        request: Request,
        force: bool = False,
        blob: bool = False,
        wait_s: Wait = 30.0,
        tenant: str | None = None,
    ) -> Response:
        """Answer 200 with the freed bytes, or 202 if workers will free more once their requests end."""
        caller = caller_of(request)
        owner = caller.namespace(tenant)
        return _unloaded(await self._operations.unload(name, caller, owner, force=force, blob=blob, wait_s=wait_s))

    async def preload(self, name: str, request: Request, wait_s: Wait = 0.0, tenant: str | None = None) -> Response:
        """Answer 200 once every worker has the adapter, 202 if they do not within `wait_s`."""
        caller = caller_of(request)
        known = await self._operations.seen(name, caller, tenant)
        is_there = await self._operations.preload(name, caller, known.tenant, wait_s)
        done(request)
        return json_response(await self._operations.get(name, caller, tenant), 200 if is_there else 202)

    async def refresh(self, name: str, request: Request, wait_s: Wait = 30.0, tenant: str | None = None) -> Response:
        """Answer 200 once a store has checked the name's source again, 202 if none has within `wait_s`."""
        caller = caller_of(request)
        is_looked_at = await self._operations.refresh(name, caller, tenant, wait_s)
        done(request)
        return json_response(await self._operations.get(name, caller, tenant), 200 if is_looked_at else 202)

    async def pin(self, name: str, request: Request, wait_s: Wait = 0.0) -> Response:
        """Answer 200 once every worker has loaded and pinned the adapter, 202 if they have not within `wait_s`."""
        caller = caller_of(request)
        is_loaded = await self._operations.pin(name, caller, wait_s)
        done(request)
        return json_response(await self._operations.get(name, caller, ""), 200 if is_loaded else 202)

    async def unpin(self, name: str, request: Request) -> Response:
        """Answer with the adapter, which is no longer pinned."""
        caller = caller_of(request)
        await self._operations.unpin(name, caller)
        done(request)
        return json_response(await self._operations.get(name, caller, ""))

    async def evict(self, name: str, request: Request, wait_s: Wait = 30.0) -> Response:
        """Answer 200 with the freed bytes, or 202 if workers will free more once their requests end."""
        freed = await self._operations.evict(name, caller_of(request), wait_s)
        return json_response({"name": name, **_freed(freed)}, 202 if freed.waiting else 200)

    # ------------------------------------------------------------ vLLM

    async def load_lora(self, body: LoadRequest, request: Request) -> Response:
        """Register an adapter and fetch it, as vLLM's route of this path does."""
        await self._load(body, request, in_place=body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def load_for_trainer(self, body: LoadRequest, request: Request) -> Response:
        """Load an adapter, replacing any of its name, as clients of prime-rl and SGLang expect."""
        await self._load(body, request, in_place=True)
        answer = {"success": True, "status": "ok", "error_message": ""}
        return json_response({**answer, "loaded_adapters": {body.lora_name: body.lora_path}})

    async def _load(self, body: LoadRequest, request: Request, *, in_place: bool) -> None:
        """Register an adapter and fetch it. Raises as `register`."""
        if not body.lora_name or not body.lora_path:
            raise BadRequest("Both 'lora_name' and 'lora_path' must be provided.")
        caller = caller_of(request)
        about(request, body.lora_name, f"source={body.lora_path} replace={in_place}")
        tenant = caller.namespace(None)
        if not in_place and await self._operations.is_registered(body.lora_name, tenant):
            raise BadRequest(
                f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load the adapter in"
                " place, set 'load_inplace' to True."
            )
        wanted = Wanted(body.lora_name, body.lora_path, caller, tenant, caller.token, in_place, MAX_WAIT_S)
        try:
            is_served, _ = await self._operations.register(wanted)
        except Conflict as error:
            raise BadRequest(error.message, code=error.code) from None
        if not is_served:
            raise Unavailable(f"the adapter `{body.lora_name}` is still being downloaded", code="adapter_loading")
        done(request)
        await self._operations.preload(body.lora_name, caller, tenant, 0.0)

    async def unload_lora(self, body: UnloadRequest, request: Request) -> Response:
        """Unload an adapter, as vLLM's route of this path does."""
        freed = (await self._unload(body, request)).freed
        return PlainTextResponse(
            f"Success: LoRA adapter '{body.lora_name}' removed successfully."
            f" Freed {freed.pool_bytes} bytes of pools and {freed.host_bytes} of host memory."
        )

    async def unload_for_trainer(self, body: UnloadRequest, request: Request) -> Response:
        """Unload an adapter, as SGLang's route of this path does."""
        await self._unload(body, request)
        return json_response({"success": True, "status": "ok", "error_message": ""})

    async def _unload(self, body: UnloadRequest, request: Request) -> Unloaded:
        """Unload an adapter. Raises BadRequest and NotFound."""
        if not body.lora_name:
            raise BadRequest("'lora_name' needs to be provided to unload a LoRA adapter.")
        about(request, body.lora_name)
        try:
            caller = caller_of(request)
            owner = caller.namespace(None)
            return await self._operations.unload(body.lora_name, caller, owner, force=False, blob=False, wait_s=30.0)
        except NotFound:
            raise NotFound(f"The lora adapter '{body.lora_name}' cannot be found.") from None
        except Conflict as error:
            raise BadRequest(error.message, code=error.code) from None


def add_operator_routes(app: FastAPI, endpoints: OperatorEndpoints) -> None:
    """Bind paths to handlers."""
    routes = Routes(app, AuditedRoute)
    routes.get("/v1/adapters", READ_ADAPTERS, responses=openapi.PAGE)(endpoints.list)
    routes.post("/v1/adapters", ADAPTERS, responses=openapi.REGISTERED)(endpoints.register)
    routes.post(UPLOAD, ADMIN_FILE, responses=openapi.REGISTERED, openapi_extra=openapi.ZIP)(endpoints.upload)
    for what, handler, access in (
        ("preload", endpoints.preload, ADAPTERS),
        ("refresh", endpoints.refresh, ADAPTERS),
        ("pin", endpoints.pin, ADMIN),
        ("unpin", endpoints.unpin, ADMIN),
        ("evict", endpoints.evict, ADMIN),
    ):
        routes.post(f"/v1/adapters/{{name:path}}/{what}", access, responses=openapi.LATER)(handler)
    routes.get("/v1/adapters/{name:path}", READ_ADAPTERS)(endpoints.get)
    routes.delete("/v1/adapters/{name:path}", ADAPTERS, responses=openapi.LATER)(endpoints.unload)
    routes.post("/v1/load_lora_adapter", ADAPTERS, response_class=openapi.PlainText)(endpoints.load_lora)
    routes.post("/v1/unload_lora_adapter", ADAPTERS, response_class=openapi.PlainText)(endpoints.unload_lora)
    routes.post("/load_lora_adapter", ADAPTERS)(endpoints.load_for_trainer)
    routes.post("/unload_lora_adapter", ADAPTERS)(endpoints.unload_for_trainer)


def _freed(freed: Freed) -> dict[str, Any]:
    return {
        "freed": {"pool_bytes": freed.pool_bytes, "host_bytes": freed.host_bytes, "disk_bytes": freed.disk_bytes},
        "waiting": freed.waiting,
    }


def _unloaded(unloaded: Unloaded) -> Response:
    shown = {
        "name": unloaded.name,
        "digest": unloaded.digest or None,
        **_freed(unloaded.freed),
        "kept_by": unloaded.kept_by,
        "num_ended": unloaded.num_ended,
    }
    return json_response(shown, 202 if unloaded.freed.waiting else 200)

"""The audit log of the API: a route class that records actions of operators, and of tenants on their adapters.

Every module with such routes uses it. `ACTIONS` defines which routes are actions, and their names.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from gateway.auth.callers import caller_of
from gateway.bodies.json_bodies import JsonRoute
from protocol.queue.books.audit import MAX_TEXT, AuditEntry, AuditLog
from protocol.wire.clock import now_ms
from protocol.wire.errors import LorafleetError

CANCEL = "request.cancel"
"""Recorded only for operators: tenants cancel only their own requests."""

ACTIONS = {
    "POST /v1/adapters": "adapter.register",
    "POST /v1/adapters/upload": "adapter.upload",
    "DELETE /v1/adapters/{name:path}": "adapter.unload",
    "POST /v1/adapters/{name:path}/preload": "adapter.preload",
    "POST /v1/adapters/{name:path}/pin": "adapter.pin",
    "POST /v1/adapters/{name:path}/unpin": "adapter.unpin",
    "POST /v1/adapters/{name:path}/evict": "adapter.evict",
    "POST /v1/adapters/{name:path}/refresh": "adapter.refresh",
    "POST /v1/load_lora_adapter": "adapter.register",
    "POST /v1/unload_lora_adapter": "adapter.unload",
    "POST /load_lora_adapter": "adapter.register",
    "POST /unload_lora_adapter": "adapter.unload",
    "POST /v1/bases": "base.add",
    "DELETE /v1/bases/{name:path}": "base.remove",
    "POST /v1/workers/{name}/drain": "worker.drain",
    "POST /v1/workers/{name}/resume": "worker.resume",
    "POST /v1/dead_letters/{letter_id}/retry": "dead_letter.retry",
    "POST /v1/keys": "key.create",
    "DELETE /v1/keys/{key_id}": "key.revoke",
    "POST /v1/tenants/{name}": "tenant.change",
    "POST /v1/requests/{request_id}/cancel": CANCEL,
}
"""Method and path of a route -> name of its action."""

_ABOUT, _DONE = "lorafleet.audit", "lorafleet.audit.done"
"""ASGI scope keys by which a handler reports the action's target, and that the action was done."""


class AuditedRoute(JsonRoute):
    """A route whose calls are recorded with their outcome, if it is one of `ACTIONS`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler."""
        handler = super().get_route_handler()
        action = next((ACTIONS[name] for name in names_of(self) if name in ACTIONS), "")
        if not action:
            return handler

        async def handle(request: Request) -> Response:
            try:
                response = await handler(request)
            except (HTTPException, RequestValidationError):
                raise  # the action has not begun
            except BaseException as error:
                await _note(request, action, _outcome_of(error))
                raise
            await _note(request, action, "done" if response.status_code < 400 else str(response.status_code))
            return response

        return handle


def names_of(route: JsonRoute) -> list[str]:
    """Return the method and path of a route, as in `ACTIONS`."""
    return [f"{method} {route.path}" for method in sorted(route.methods or ())]


def about(request: Request, target: str, detail: str = "") -> None:
    """Set the target of an action that the path does not name."""
    request.scope[_ABOUT] = (target, detail)


def done(request: Request) -> None:
    """Mark an action as done, even if its answer fails afterwards."""
    request.scope[_DONE] = True


def _outcome_of(error: BaseException) -> str:
    if isinstance(error, LorafleetError):
        return error.code or str(error.status)
    return "unknown"  # the queue or the process failed, possibly after the action


async def _note(request: Request, action: str, outcome: str) -> None:
    caller = caller_of(request)
    if action == CANCEL and not caller.is_admin:
        return
    target, detail = request.scope.get(_ABOUT, ("", ""))
    target = target or " ".join(map(str, request.path_params.values()))
    client = request.scope.get("client")
    log: AuditLog = request.app.state.audit
    await log.note(
        AuditEntry(
            now_ms(), caller.key_id, caller.name, str(client[0]) if client else "", action, target[:MAX_TEXT],
            (detail or str(request.query_params))[:MAX_TEXT], "done" if _DONE in request.scope else outcome,
            caller.is_admin,
        )
    )  # fmt: skip

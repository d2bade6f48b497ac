"""Every check that a request passes before it may use this gateway's resources, from arrival to handler.

    when                     check                    refused with   cost of a refusal
    on arrival               `Admission.check()`      429            nothing has been read; calls only
    then                     `Authentication`         401, 403       two reads of the queue, if there are keys
    before its body is read  `MemoryAccount`          429, 503       its headers
    the same                 `FairSlots`              429            its headers; large bodies wait for a slot

The contents of a call's body are checked against the same limits, through one object (`cost.py`):

    values are counted       `cost.hold_values`       400, 429, 503  one pass over its bytes
    its class is known       `Admission.check(load)`  429, 503       its values
    its prompts are tokens   `cost.hold`, and again   400, 429, 503  its tokens
                             `Admission.check(load)`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.auth.authentication import Authentication
from gateway.auth.callers import CALLER, Caller
from gateway.http.access import MATCH, RouteMatch
from gateway.http.addresses import client_of
from gateway.http.errors import ShapeOf
from gateway.http.headers import header_of
from gateway.http.paths import SMALL_BODY_BYTES
from gateway.overload.admission import Admission
from gateway.overload.cost import COST, LargeBody, RequestCost
from gateway.overload.memory import (
    CALL_BYTES,
    LARGE_FACTOR,
    SMALL_FACTOR,
    MemoryAccount,
    address_holder,
    tenant_holder,
)
from protocol.runtime.fair_slots import FairSlots
from protocol.wire.errors import LorafleetError


@dataclass(frozen=True, slots=True)
class LargeLimits:
    """Limits for large bodies."""

    num_bodies: int = 12  # held at once, from the first byte read until queued: up to 60 MB each as objects
    num_of_tenant: int = 4  # slots per tenant
    num_waiting: int = 64  # unread bodies waiting for a slot
    num_turns: int = 1  # bodies processed at once; each takes up to 800 MB, for four million tokens


class Gate:
    """Passes requests to their handlers or refuses them, and counts their cost until they end."""

    def __init__(
        self,
        app: ASGIApp,
        shape_of: ShapeOf,
        admission: Admission,
        authentication: Authentication,
        memory: MemoryAccount,
        max_body_bytes: int,
        limits: LargeLimits | None = None,
    ) -> None:
        """shape_of: the error format of a request's API.

        max_body_bytes: assumed size of a body without Content-Length.
        """
        limits = limits or LargeLimits()
        self._app = app
        self._shape_of = shape_of
        self._admission = admission
        self._authentication = authentication
        self._memory = memory
        self._max_body_bytes = max_body_bytes
        self._bodies = FairSlots(limits.num_bodies, limits.num_of_tenant, limits.num_waiting)
        self._work = FairSlots(limits.num_turns)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await self._answer(scope, receive, send, is_inner=False)

    async def inner(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request made by this gateway itself: its caller is known, and no client waits for it."""
        await self._answer(scope, receive, send, is_inner=True)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, *, is_inner: bool) -> None:
        cost = RequestCost()
        token = COST.set(cost)
        try:
            try:
                if not is_inner:
                    await self._let_in(scope)
                await self._take(cost, scope)
            except LorafleetError as error:
                headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
                await self._shape_of(scope).response(error, headers)(scope, receive, send)
                return
            await self._app(scope, receive, send)
        finally:
            self._admission.leave()
            COST.reset(token)
            cost.close()

    async def _let_in(self, scope: Scope) -> None:
        """Count a call as in flight, and authenticate the request.

        Raises Overloaded, and as `Authentication.caller`.
        """
        match: RouteMatch = scope[MATCH]
        if match.kind == "call":
            self._admission.check()
            self._admission.enter()
        scope[CALLER] = await self._authentication.caller(match, scope["headers"])

    async def _take(self, cost: RequestCost, scope: Scope) -> None:
        """Charge a request for its body, and wait for a slot if it is large.

        Raises as `Charge.hold` and `FairSlots.take`.
        """
        match: RouteMatch = scope[MATCH]
        holder = _holder_of(scope)
        cost.charge = self._memory.open(holder)
        cost.charge.hold(self._bytes_of(match, scope["headers"]))
        is_small = not match.is_large or _is_small(scope["headers"])
        # Requests that only tokenize have no limit of calls, so each waits for its turn whatever its size.
        if not is_small:
            await self._bodies.take(holder)
        if not is_small or match.kind == "text":
            cost.body = LargeBody(holder, None if is_small else self._bodies, self._work)

    def _bytes_of(self, match: RouteMatch, headers: Sequence[tuple[bytes, bytes]]) -> int:
        """Return the memory that a request may take until its body's values are counted; 0 without a body."""
        length = header_of(headers, b"content-length")
        most = self._max_body_bytes if match.is_large else min(self._max_body_bytes, SMALL_BODY_BYTES)
        if length is None:
            num = most if header_of(headers, b"transfer-encoding") is not None else 0
        else:
            num = min(int(length), most) if length.isdecimal() else most
        if match.kind == "call":  # see `hold_values`
            return CALL_BYTES + 2 * num
        return num * (SMALL_FACTOR if num <= SMALL_BODY_BYTES else LARGE_FACTOR)


def _is_small(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Return whether a request declares a small body or none."""
    length = header_of(headers, b"content-length")
    if length is None:
        return header_of(headers, b"transfer-encoding") is None
    return length.isdecimal() and int(length) <= SMALL_BODY_BYTES


def _holder_of(scope: Scope) -> str:
    """Return the holder of a request's memory and slots: a tenant, its batches or, without keys, an address."""
    caller: Caller = scope[CALLER]
    if caller.is_batch:
        return f"batches of {caller.owner}"
    if caller.tenant is not None:
        return tenant_holder(caller.name)
    return address_holder(client_of(scope))

"""Operations of clients on webhook endpoints, and on failed deliveries."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from gateway.auth.callers import Caller
from gateway.http.list_page import list_page
from gateway.webhooks.outside import Outside, UnreachableError
from gateway.webhooks.sender import MAX_WAITING, WebhookSender, is_success, new_delivery
from gateway.webhooks.sign import EVENTS, new_secret
from gateway.webhooks.webhook_bodies import WebhookChange, WebhookRequest
from protocol.queue.bus import Bus, now_ms
from protocol.runtime.fleet_secret import FleetSecret
from protocol.wire import messages as m
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest, Conflict, NotFound, Overloaded

MAX_ENDPOINTS = 20
"""Maximum endpoints of a tenant."""

OLD_SECRET_MS = 24 * 3600 * 1000
_HINT_CHARACTERS = 4
_RETRY_S = 60.0  # Retry-After, in seconds, at the limit of waiting deliveries


class WebhookService:
    """The webhook endpoints of the fleet."""

    def __init__(self, bus: Bus, outside: Outside, sender: WebhookSender, secret: FleetSecret | None) -> None:
        """secret: seals the signing secrets; None: the fleet has none, and stores no endpoints."""
        self._webhooks = bus.webhooks
        self._outside = outside
        self._sender = sender
        self._secret = secret

    async def create(self, request: WebhookRequest, caller: Caller) -> dict[str, Any]:
        """Store an endpoint; return it with its secret, which no later call returns. Raises BadRequest, Conflict."""
        self._outside.check(request.url)
        events = _checked(request.event_types, "event_types")
        given, id_, created_ms = new_secret(), f"we_{secrets.token_hex(12)}", now_ms()
        endpoint = m.WebhookEndpoint(
            id=id_, tenant=caller.owner, name=request.name, url=request.url, events=events,
            secret=self._sealed(given, id_), hint=given[-_HINT_CHARACTERS:], created_ms=created_ms,
            updated_ms=created_ms,
        )  # fmt: skip
        if not await self._webhooks.keep_endpoint(endpoint, MAX_ENDPOINTS):
            raise Conflict(f"you have reached the limit of {MAX_ENDPOINTS} webhook endpoints: delete some")
        return {**view(endpoint), "signing_secret": given}

    async def get(self, endpoint_id: str, caller: Caller) -> m.WebhookEndpoint:
        """Return an endpoint. Raises NotFound."""
        endpoint = await self._webhooks.endpoint(caller.owner, endpoint_id)
        if endpoint is None:
            raise _not_found(endpoint_id)
        return endpoint

    async def change(self, endpoint_id: str, request: WebhookChange, caller: Caller) -> dict[str, Any]:
        """Change an endpoint; return it. Raises NotFound, BadRequest."""
        endpoint = await self.get(endpoint_id, caller)
        changes: dict[str, Any] = {}
        if request.name is not None:
            changes["name"] = request.name
        if request.url is not None:
            self._outside.check(request.url)
            changes["url"] = request.url
        if request.event_types is not None:
            changes["events"] = _checked(request.event_types, "event_types")
        changed = msgspec.structs.replace(endpoint, **changes)
        if changed != endpoint:
            changed = msgspec.structs.replace(changed, updated_ms=now_ms())
            await self._keep(changed)
        return view(changed)

    async def rotate(self, endpoint_id: str, caller: Caller, *, keep_old: bool) -> dict[str, Any]:
        """Give an endpoint a new secret; return both. keep_old: the old one also signs for a day. Raises NotFound."""
        endpoint, given, now = await self.get(endpoint_id, caller), new_secret(), now_ms()
        changed = msgspec.structs.replace(
            endpoint,
            secret=self._sealed(given, endpoint.id),
            hint=given[-_HINT_CHARACTERS:],
            updated_ms=now,
            old_secret=endpoint.secret if keep_old else "",
            old_until_ms=now + OLD_SECRET_MS if keep_old else 0,
        )
        await self._keep(changed)
        return {**view(changed), "signing_secret": given}

    async def test(self, endpoint_id: str, event_type: str, caller: Caller) -> dict[str, Any]:
        """Send a sample event; return the endpoint's status. Raises NotFound, BadRequest, Overloaded."""
        endpoint = await self.get(endpoint_id, caller)
        [type_] = _checked([event_type], "event_type")
        subject = f"{type_.partition('.')[0]}_test_{secrets.token_hex(8)}"
        try:
            status = await self._sender.test(endpoint, new_delivery(endpoint, type_, subject))
        except UnreachableError as error:
            raise BadRequest(f"{endpoint.url:.200} cannot be reached: {error}", code="webhook_unreachable") from error
        return {
            "object": "webhook_endpoint.test",
            "webhook_endpoint_id": endpoint.id,
            "event_type": type_,
            "status_code": status,
            "success": is_success(status),
        }

    async def list(self, caller: Caller, limit: int, after: str | None) -> dict[str, Any]:
        """Return a page of the caller's endpoints, oldest first. Raises NotFound when `after` is unknown."""
        found = await self._webhooks.endpoints(caller.owner)
        if after is not None:
            ids = [endpoint.id for endpoint in found]
            if after not in ids:
                raise NotFound(f"there is no webhook endpoint {brief(after)}", param="after")
            found = found[ids.index(after) + 1 :]
        return list_page([view(endpoint) for endpoint in found[:limit]], has_more=len(found) > limit)

    async def delete(self, endpoint_id: str, caller: Caller) -> None:
        """Delete an endpoint, also an unreadable one, and its waiting deliveries. Raises NotFound."""
        if not await self._webhooks.delete_endpoint(caller.owner, endpoint_id):
            raise _not_found(endpoint_id)

    # ------------------------------------------------------------ failed deliveries

    async def given_up(self, caller: Caller) -> dict[str, Any]:
        """Return the caller's failed deliveries, newest first."""
        return {"object": "list", "data": [delivery_view(one) for one in await self._webhooks.given_up(caller.owner)]}

    async def retry(self, delivery_id: str, caller: Caller) -> dict[str, Any]:
        """Try a failed delivery again for another day; return it.

        Raises NotFound, Overloaded, and Conflict if its record is unreadable.
        """
        found = [one for one in await self._webhooks.given_up(caller.owner) if one.id == delivery_id]
        if not found:
            raise NotFound(f"there is no failed delivery {brief(delivery_id)}", code="delivery_not_found")
        if not found[0].type:
            raise Conflict(f"the delivery {brief(delivery_id)} cannot be sent again: {found[0].error}")
        again = msgspec.structs.replace(found[0], attempts=0, error="", created_ms=now_ms())
        [num_waiting] = await self._webhooks.add(caller.owner, [again], MAX_WAITING)
        if num_waiting >= 0:
            text = f"{num_waiting} of your deliveries are waiting; the limit is {MAX_WAITING} to all endpoints"
            raise Overloaded(text, _RETRY_S)
        return delivery_view(again)

    async def _keep(self, changed: m.WebhookEndpoint) -> None:
        """Write a changed endpoint. Raises NotFound if it was deleted in the meantime."""
        if not await self._webhooks.keep_endpoint(changed):
            raise _not_found(changed.id)

    def _sealed(self, given: str, endpoint_id: str) -> str:
        if self._secret is None:
            raise BadRequest("this fleet has no secret, which is needed to store webhooks' secrets: set --secret-file")
        return self._secret.seal(given, endpoint_id)


def _not_found(endpoint_id: str) -> NotFound:
    return NotFound(f"there is no webhook endpoint {brief(endpoint_id)}", code="webhook_endpoint_not_found")


def _checked(events: Sequence[str], param: str) -> list[str]:
    """Return event types without duplicates. Raises BadRequest for an unknown type."""
    for type_ in events:
        if type_ not in EVENTS:
            text = f"{param} has {brief(type_)}; supported events: {', '.join(EVENTS)}"
            raise BadRequest(text, param=param)
    return list(dict.fromkeys(events))


def view(endpoint: m.WebhookEndpoint) -> dict[str, Any]:
    """Return an endpoint as OpenAI's object."""
    return {
        "id": endpoint.id,
        "object": "webhook_endpoint",
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": endpoint.events,
        "created_at": endpoint.created_ms // 1000,
        "updated_at": endpoint.updated_ms // 1000,
        "signing_secret_hint": f"whsec_…{endpoint.hint}",
    }


def delivery_view(delivery: m.Delivery) -> dict[str, Any]:
    """Return a delivery as an object."""
    return {
        "id": delivery.id,
        "object": "webhook_delivery",
        "webhook_endpoint_id": delivery.endpoint,
        "event_id": delivery.event,
        "event_type": delivery.type,
        "data": {"id": delivery.subject},
        "created_at": delivery.created_ms // 1000,
        "attempts": delivery.attempts,
        "error": delivery.error or None,
        "tried_at": delivery.tried_ms // 1000 or None,
    }

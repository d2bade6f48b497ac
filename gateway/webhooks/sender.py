"""Sends webhooks: one gateway of the fleet at a time makes deliveries of what has ended.

Each is tried until it arrives, or a day has passed; then it is put aside.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from dataclasses import dataclass

import msgspec

from gateway.calls.jobs import state_of
from gateway.http.paths import RESPONSES
from gateway.webhooks.outside import Outside, UnreachableError
from gateway.webhooks.sign import event_body, event_id, signed_headers
from protocol.queue.bus import CONNECTION_ERRORS, Bus, now_ms
from protocol.queue.kept.webhooks import Ended
from protocol.runtime.fleet_secret import FleetSecret
from protocol.wire import messages as m
from protocol.wire.errors import LorafleetError

logger = logging.getLogger(__name__)

MAX_AGE_MS = 24 * 3600 * 1000
"""Age of a delivery from which on it is not tried any more."""

MAX_WAITING = 1000
"""Deliveries of a tenant that wait to arrive; beyond that, further ones are given up at once."""

_AT_ONCE = 64  # ends, or deliveries, that are looked at together


@dataclass(frozen=True, slots=True)
class SenderPace:
    """What operators do not set, but tests."""

    poll_s: float = 1.0
    lease_s: float = 10.0
    first_retry_s: float = 5.0  # four times as long after each attempt
    max_retry_s: float = 4 * 3600.0
    max_sending: int = 32  # deliveries at once, of all tenants
    max_sending_of_tenant: int = 4


class WebhookSender:
    """Makes and sends deliveries while this gateway leads in that."""

    def __init__(
        self, bus: Bus, gid: str, outside: Outside, secret: FleetSecret | None, pace: SenderPace | None = None
    ) -> None:
        """gid: this gateway. secret: opens what endpoints' secrets are sealed with."""
        self._bus = bus
        self._gid = gid
        self._outside = outside
        self._secret = secret
        self._pace = pace or SenderPace()
        self._sending: dict[str, asyncio.Task[None]] = {}  # by delivery
        self._of_tenant: Counter[str] = Counter()  # those that are being sent

    async def run(self) -> None:
        """Send until cancelled."""
        try:
            while True:
                try:
                    if await self._bus.webhooks.lead(self._gid, int(self._pace.lease_s * 1000)):
                        await self._turn()
                except CONNECTION_ERRORS as error:
                    logger.warning("webhooks wait: %s", error)
                except Exception:
                    logger.exception("webhooks wait")
                await asyncio.sleep(self._pace.poll_s)
        finally:
            for task in self._sending.values():
                task.cancel()
            await asyncio.gather(*self._sending.values(), return_exceptions=True)

    async def _turn(self) -> None:
        """Make deliveries of what has ended, and begin those that are due."""
        webhooks = self._bus.webhooks
        while True:
            ended, cursor = await webhooks.ended(_AT_ONCE)
            if not ended:
                break
            await self._plan(ended, cursor)
        for delivery in await webhooks.due(_AT_ONCE * 4):
            if len(self._sending) >= self._pace.max_sending:
                break
            if delivery.id in self._sending or self._of_tenant[delivery.tenant] >= self._pace.max_sending_of_tenant:
                continue
            self._of_tenant[delivery.tenant] += 1
            self._sending[delivery.id] = asyncio.create_task(self._send(delivery))

    async def _plan(self, ended: list[Ended], cursor: str) -> None:
        webhooks = self._bus.webhooks
        endpoints = await webhooks.endpoints()
        for one in ended:
            wanted = [endpoint for endpoint in endpoints if endpoint.tenant == one.tenant]
            type_ = await self._type_of(one) if wanted else ""
            for endpoint in wanted:
                if type_ not in endpoint.events:
                    continue
                delivery = new_delivery(endpoint, type_, one.id)
                num_waiting = await webhooks.add(delivery, MAX_WAITING)
                if num_waiting >= 0:
                    error = f"{num_waiting} deliveries were waiting already"
                    await webhooks.done(msgspec.structs.replace(delivery, error=error), given_up=True)
        await webhooks.move_on(cursor)

    async def _type_of(self, ended: Ended) -> str:
        """Return the type of the event of an end, "" if nothing is known of it any more."""
        if ended.type:
            return ended.type
        found = await self._bus.jobs.get_many([ended.id])
        if not found:  # it cannot be read, either
            return ""
        job = found[0]
        facts = await self._bus.requests(job.rids)
        state = state_of(facts)[0]
        if job.endpoint != RESPONSES:
            return f"job.{state}"
        is_cut = state == "completed" and any(fact is not None and fact.finish == "length" for fact in facts)
        return "response.incomplete" if is_cut else f"response.{state}"

    async def _send(self, delivery: m.Delivery) -> None:
        """Try a delivery once, and note what came of it."""
        webhooks = self._bus.webhooks
        try:
            endpoint = await webhooks.endpoint(delivery.tenant, delivery.endpoint)
            error = await self.attempt(endpoint, delivery) if endpoint is not None else ""
            tried = msgspec.structs.replace(
                delivery, attempts=delivery.attempts + 1, error=error, tried_ms=now_ms()
            )  # fmt: skip
            if not error or now_ms() - delivery.created_ms > MAX_AGE_MS:
                await webhooks.done(tried, given_up=bool(error))
            else:
                pace = self._pace
                pause_s = min(pace.first_retry_s * 4**delivery.attempts, pace.max_retry_s) * random.uniform(0.8, 1.2)
                await webhooks.later(tried, now_ms() + int(1000 * pause_s))
        except CONNECTION_ERRORS as error:
            logger.warning("a webhook is sent again: %s", error)
        finally:
            self._sending.pop(delivery.id, None)
            self._of_tenant[delivery.tenant] -= 1

    async def attempt(self, endpoint: m.WebhookEndpoint, delivery: m.Delivery) -> str:
        """Send a delivery to its endpoint. Returns what is wrong, "" if it has arrived."""
        try:
            status = await self.post(endpoint, delivery)
        except (UnreachableError, LorafleetError) as error:
            return str(error)
        return "" if 200 <= status < 300 else f"the endpoint answers {status}"

    async def post(self, endpoint: m.WebhookEndpoint, delivery: m.Delivery) -> int:
        """Return the status that an endpoint answers a delivery with. Raises UnreachableError, PermissionDenied."""
        now_s = now_ms() // 1000
        sealed = [endpoint.secret, *([endpoint.old_secret] if endpoint.old_until_ms > now_ms() else [])]
        keys = [self._secret.open(one, endpoint.id) for one in sealed] if self._secret is not None else []
        body = event_body(delivery.event, delivery.type, delivery.subject, delivery.created_ms // 1000)
        return await self._outside.post(endpoint.url, body, signed_headers(delivery.event, body, now_s, keys))


def new_delivery(endpoint: m.WebhookEndpoint, type_: str, subject: str) -> m.Delivery:
    """Return the delivery of an event to an endpoint."""
    event = event_id(type_, subject)
    return m.Delivery(
        id=f"{event}:{endpoint.id}", event=event, endpoint=endpoint.id, tenant=endpoint.tenant, type=type_,
        subject=subject, created_ms=now_ms(),
    )  # fmt: skip

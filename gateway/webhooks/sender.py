"""Sends webhooks: one gateway at a time, the leader, creates and sends the deliveries of ended jobs and batches.

A delivery is retried until it arrives or a day has passed; then it is set aside. Tenants are served round-robin
(`bus.webhooks`), and share the slots of concurrent deliveries (`places`).
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from functools import partial

import msgspec

from gateway.http.paths import RESPONSES
from gateway.jobs.jobs import state_of
from gateway.webhooks.outside import TIMEOUT_S, BusyReceiverError, Outside, UnreachableError
from gateway.webhooks.places import TenantSlots
from gateway.webhooks.sign import event_body, event_id, signed_headers
from protocol.queue.bus import CONNECTION_ERRORS, Bus, now_ms
from protocol.queue.kept.webhooks import EndedWork
from protocol.runtime.backoff import Backoff
from protocol.runtime.fleet_secret import FleetSecret
from protocol.runtime.guarded import FAILED, Items, Loop
from protocol.wire import messages as m
from protocol.wire.errors import LorafleetError, NewerRecord, Overloaded, UnreadableRecord

MAX_AGE_MS = 24 * 3600 * 1000
"""Age in ms at which a delivery is no longer retried."""

MAX_WAITING = 1000
"""Maximum waiting deliveries of a tenant; further ones fail at once."""

CLAIM_MS = 60_000
"""Milliseconds after which a started delivery without a result is due again: its gateway has died."""

MAX_TESTS = 16
"""Concurrent tests of endpoints per gateway, for all tenants. As with all such slots, the last quarter is reserved for
tenants without any."""

MAX_TESTS_OF_TENANT = 2

_TENANTS_AT_ONCE = 16  # tenants whose ended jobs are read per turn
_ENDS_OF_TURN = 16  # ended jobs read per tenant and turn


@dataclass(frozen=True, slots=True)
class SenderPace:
    """Timings and limits that tests set, not operators."""

    poll_s: float = 1.0
    lease_s: float = 10.0
    first_retry_s: float = 5.0  # multiplied by four after each attempt
    max_retry_s: float = 4 * 3600.0
    busy_s: float = 5.0  # seconds before retrying a delivery whose receiver is busy
    max_sending: int = 64  # concurrent deliveries, for all tenants
    max_sending_of_tenant: int = 4


class WebhookSender:
    """Creates and sends deliveries while this gateway is the leader."""

    def __init__(
        self, bus: Bus, gid: str, outside: Outside, secret: FleetSecret | None, pace: SenderPace | None = None
    ) -> None:
        """gid: id of this gateway. secret: unseals the endpoints' signing secrets."""
        self._bus = bus
        self._gid = gid
        self._outside = outside
        self._secret = secret
        self._pace = pace or SenderPace()
        self._sending: dict[tuple[str, str], asyncio.Task[None]] = {}  # by tenant and delivery
        self._places = TenantSlots(self._pace.max_sending, self._pace.max_sending_of_tenant)
        self._tests = TenantSlots(MAX_TESTS, MAX_TESTS_OF_TENANT)
        self._more = asyncio.Event()  # set if a delivery was tried, so another may begin, or there are more ends
        # Unlimited tries: an error is caused by one tenant's records or by a bug here, and the ends are bounded.
        self._plans = Items("webhooks", max_tries=0, backoff=Backoff(1.0, 600.0))

    def loop(self) -> Loop:
        """Return the sending loop. The caller must call `leave` after it."""
        return Loop("webhooks", self._look, self._pace.poll_s, self._more)

    async def leave(self) -> None:
        """Cancel the attempts in progress; the next leader repeats them."""
        tasks = list(self._sending.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        """Run one turn if this gateway is the leader."""
        if await self._bus.webhooks.lead(self._gid, int(self._pace.lease_s * 1000)) and await self._turn():
            self._more.set()

    async def _turn(self) -> bool:
        """Create deliveries of some tenants' ends, and begin those that are due. Return whether there is more to do.

        The cost of a turn does not depend on the backlog: it reads up to `_TENANTS_AT_ONCE` times `_ENDS_OF_TURN` ends,
        and the deliveries of twice as many tenants as there are slots.
        """
        webhooks = self._bus.webhooks
        more = await webhooks.take_over(_TENANTS_AT_ONCE * _ENDS_OF_TURN)
        for tenant in await webhooks.tenants_with_ends(_TENANTS_AT_ONCE):
            if await self._plans.run(tenant, partial(self._plan, tenant)):
                await webhooks.drop_ends(tenant, [])  # moves the tenant behind the others
            else:
                more = True
        await self._begin()
        return more

    async def _begin(self) -> None:
        """Begin due deliveries, first for tenants with the fewest slots.

        Twice as many tenants are considered as there are slots, so at least half of them have none: while slots are
        free, each call begins a delivery or finds all due ones.
        """
        webhooks = self._bus.webhooks
        tenants = await webhooks.tenants_with_deliveries(2 * self._pace.max_sending)
        for tenant in sorted(tenants, key=self._places.of):
            if self._places.num_taken >= self._pace.max_sending:
                break
            room = self._places.room(tenant)
            for delivery in await webhooks.take(tenant, room, CLAIM_MS):
                if (tenant, delivery.id) not in self._sending:
                    self._places.take(tenant)
                    self._sending[tenant, delivery.id] = asyncio.create_task(self._send(delivery))

    async def _plan(self, tenant: str) -> None:
        """Create deliveries of a tenant's oldest ends. Raises NewerRecord if only newer gateways can read them."""
        webhooks = self._bus.webhooks
        endpoints = await webhooks.endpoints(tenant, leave_newer=True)
        ended = await webhooks.ended(tenant, _ENDS_OF_TURN)
        deliveries: list[m.Delivery] = []
        for one in ended if endpoints else ():
            try:
                type_ = await self._type_of(one)
            except (NewerRecord, *CONNECTION_ERRORS):
                raise
            except Exception as error:  # noqa: BLE001  an unreadable record must not block the others
                FAILED.note("webhooks", error, f"the end of {one.id}, which no webhook reports")
                continue
            deliveries += [new_delivery(endpoint, type_, one.id) for endpoint in endpoints if type_ in endpoint.events]
        counts = await webhooks.add(tenant, deliveries, MAX_WAITING) if deliveries else []
        too_many = [
            msgspec.structs.replace(delivery, error=f"{num_waiting} deliveries were waiting already")
            for delivery, num_waiting in zip(deliveries, counts, strict=True)
            if num_waiting >= 0
        ]
        if too_many:
            await webhooks.give_up(tenant, too_many)
        await webhooks.drop_ends(tenant, ended)

    async def _type_of(self, ended: EndedWork) -> str:
        """Return the event type of an end, "" if its job is no longer known."""
        if ended.type:
            return ended.type
        found = await self._bus.jobs.get_many([ended.id], leave_newer=True)
        if not found:  # expired, so that clients cannot read it either
            return ""
        job = found[0]
        facts = await self._bus.requests(job.rids)
        state = state_of(facts)[0]
        if job.endpoint != RESPONSES:
            return f"job.{state}"
        is_cut = state == "completed" and any(fact is not None and fact.finish == "length" for fact in facts)
        return "response.incomplete" if is_cut else f"response.{state}"

    async def _send(self, delivery: m.Delivery) -> None:
        """Try a delivery once, and record the result."""
        was_tried = False
        try:
            error = await self._tried(delivery)
            was_tried = True
            await self._note(
                msgspec.structs.replace(delivery, attempts=delivery.attempts + 1, error=error, tried_ms=now_ms())
            )
        except BusyReceiverError:
            await self._postpone(delivery)
        except Exception as error:  # noqa: BLE001  nothing is recorded: it is due again after `CLAIM_MS`
            FAILED.note("webhooks", error, delivery.id)
        finally:
            self._sending.pop((delivery.tenant, delivery.id), None)
            self._places.leave(delivery.tenant)
            if was_tried:
                self._more.set()

    async def _postpone(self, delivery: m.Delivery) -> None:
        """Retry a delivery after `busy_s`, without counting an attempt; otherwise it would be due after `CLAIM_MS`."""
        try:
            await self._bus.webhooks.later(delivery, now_ms() + int(1000 * self._pace.busy_s))
        except CONNECTION_ERRORS as error:
            FAILED.note("webhooks", error, delivery.id)

    async def _tried(self, delivery: m.Delivery) -> str:
        """Send a delivery to its endpoint. Return the error, "" if it arrived or its endpoint was deleted.

        Raises BusyReceiverError, and one of CONNECTION_ERRORS if the endpoint's record cannot be read.
        """
        try:
            endpoint = await self._bus.webhooks.endpoint(delivery.tenant, delivery.endpoint)
        except UnreadableRecord as error:  # retried: it may be rewritten, or read by another release
            return str(error)
        if endpoint is None:
            return ""
        try:
            status = await self.post(endpoint, delivery)
        except (UnreachableError, LorafleetError) as error:
            return str(error)
        except BusyReceiverError:
            raise
        except Exception as error:  # noqa: BLE001  counted as a failed attempt, and retried
            FAILED.note("webhooks", error, delivery.id)
            return f"it cannot be sent: {type(error).__name__}"
        return "" if is_success(status) else f"the endpoint answered {status}"

    async def _note(self, tried: m.Delivery) -> None:
        """Record a tried delivery as done, as failed, or for a later retry."""
        pace, webhooks = self._pace, self._bus.webhooks
        if not tried.error:
            await webhooks.done(tried)
            return
        if now_ms() - tried.created_ms > MAX_AGE_MS:
            await webhooks.give_up(tried.tenant, [tried])
            return
        # 4**16 exceeds a day for any first pause.
        pause_s = min(pace.first_retry_s * 4 ** min(tried.attempts - 1, 16), pace.max_retry_s)
        await webhooks.later(tried, now_ms() + int(1000 * pause_s * random.uniform(0.8, 1.2)))

    async def test(self, endpoint: m.WebhookEndpoint, delivery: m.Delivery) -> int:
        """Send a delivery immediately, without retries; return the answer's status.

        Raises UnreachableError, PermissionDenied, and Overloaded if too many are in progress.
        """
        with self._tests.held(endpoint.tenant) as has_room:
            if not has_room:
                raise Overloaded(
                    f"{self._tests.of(endpoint.tenant)} tests of your webhooks are being sent, and"
                    f" {self._tests.num_taken} of all tenants; the limits of this gateway are {MAX_TESTS_OF_TENANT} and"
                    f" {MAX_TESTS}",
                    TIMEOUT_S,
                )
            try:
                return await self.post(endpoint, delivery)
            except BusyReceiverError as error:
                raise Overloaded(str(error), TIMEOUT_S) from error

    async def post(self, endpoint: m.WebhookEndpoint, delivery: m.Delivery) -> int:
        """Send a delivery to an endpoint; return the answer's status.

        Raises UnreachableError, BusyReceiverError, PermissionDenied.
        """
        now_s = now_ms() // 1000
        sealed = [endpoint.secret, *([endpoint.old_secret] if endpoint.old_until_ms > now_ms() else [])]
        keys = [self._secret.open(one, endpoint.id) for one in sealed] if self._secret is not None else []
        body = event_body(delivery.event, delivery.type, delivery.subject, delivery.created_ms // 1000)
        headers = signed_headers(delivery.event, body, now_s, keys)
        return await self._outside.post(endpoint.url, body, headers, endpoint.tenant)


def is_success(status: int) -> bool:
    """Return whether a status acknowledges a delivery."""
    return 200 <= status < 300


def new_delivery(endpoint: m.WebhookEndpoint, type_: str, subject: str) -> m.Delivery:
    """Return the delivery of an event to an endpoint."""
    event = event_id(type_, subject)
    return m.Delivery(
        id=f"{event}:{endpoint.id}",
        event=event,
        endpoint=endpoint.id,
        tenant=endpoint.tenant,
        type=type_,
        subject=subject,
        created_ms=now_ms(),
    )

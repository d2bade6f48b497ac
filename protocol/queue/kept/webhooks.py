"""Webhook endpoints, the ends of jobs and batches, and deliveries: events on their way to endpoints.

Pending ends and deliveries are stored per tenant, and tenants are served in turn. The tenant whose turn is longest ago
comes first, and a turn has a bounded number of ends or deliveries. So no tenant waits for another's whole backlog.

One gateway at a time sends; the others are on standby. What it has not recorded as done is repeated by the next sender,
so an event arrives at least once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from protocol.queue.connection.redis_client import Client
from protocol.queue.dead_letters import names_in
from protocol.queue.kept import signatures as lua
from protocol.queue.kept.readable import readable
from protocol.queue.scripts import Scripts
from protocol.runtime.guarded import FAILED
from protocol.wire import messages as m
from protocol.wire.clock import now_ms
from protocol.wire.codec import decode_record
from protocol.wire.errors import NewerRecord, UnreadableRecord
from protocol.wire.keys import Keys

logger = logging.getLogger(__name__)

GIVEN_UP_S = 604_800
"""Retention of a failed delivery."""

MAX_GIVEN_UP = 256
"""Maximum number of stored failed deliveries of a tenant, the newest."""

UNREADABLE = "its record cannot be read"
"""The error of a delivery whose record no longer contains the event."""


@dataclass(frozen=True, slots=True)
class EndedWork:
    """The end of a job or a batch."""

    entry: str  # id of the entry in the tenant's stream
    id: str
    type: str  # event type; "": a job, whose state determines the type


class Webhooks:
    """The webhooks of a fleet."""

    def __init__(self, client: Client, keys: Keys, scripts: Scripts) -> None:
        self._redis = client
        self._keys = keys
        self._scripts = scripts

    # ------------------------------------------------------------ endpoints

    async def endpoints(self, tenant: str, *, leave_newer: bool = False) -> list[m.WebhookEndpoint]:
        """Return the endpoints of a tenant, the oldest first. leave_newer: see `readable`."""
        raws = await self._redis.hvals(self._keys.hooks(tenant))
        found = readable(raws, m.WebhookEndpoint, leave_newer=leave_newer)
        return sorted(found, key=lambda one: (one.created_ms, one.id))

    async def endpoint(self, tenant: str, endpoint_id: str) -> m.WebhookEndpoint | None:
        """Return a tenant's endpoint; None if there is none. Raises UnreadableRecord."""
        raw = await self._redis.hget(self._keys.hooks(tenant), endpoint_id)
        return decode_record(raw, m.WebhookEndpoint) if raw is not None else None

    async def keep_endpoint(self, endpoint: m.WebhookEndpoint, most: int = 0) -> bool:
        """Write an existing endpoint, or a new one if the tenant has fewer than `most`. Returns whether it did."""
        hooks = self._keys.hooks(endpoint.tenant)
        call = lua.KeepHook(hooks=hooks, id=endpoint.id, record=m.encode(endpoint), most=most)
        return bool(await self._scripts.run(call))

    async def delete_endpoint(self, tenant: str, endpoint_id: str) -> bool:
        """Delete an endpoint and its waiting deliveries. Returns whether it existed."""
        existed = bool(await self._redis.hdel(self._keys.hooks(tenant), endpoint_id))
        outbox, ending = self._keys.outbox(tenant), f":{endpoint_id}".encode()
        if ids := [id_ for id_ in await self._redis.hkeys(outbox) if id_.endswith(ending)]:
            pipe = self._redis.pipeline(transaction=True)
            pipe.hdel(outbox, *ids)
            pipe.zrem(self._keys.outbox_times(tenant), *ids)
            await pipe.execute()
        return existed

    # ------------------------------------------------------------ leading

    async def lead(self, gid: str, lease_ms: int) -> bool:
        """Take or renew the lease to send webhooks, for `lease_ms`. Returns whether this gateway holds it."""
        if await self._redis.set(self._keys.sender, gid, nx=True, px=lease_ms):
            return True
        if await self._redis.get(self._keys.sender) != gid.encode():
            return False
        return bool(await self._redis.pexpire(self._keys.sender, lease_ms))

    async def take_over(self, num: int) -> bool:
        """Move about `num` records of each kind from the previous version's keys. Returns whether there may be more."""
        keys = self._keys
        if not await self._redis.exists(keys.old_hooks, keys.old_ends, keys.old_delivery_times):
            return False
        for lost in await self._scripts.run(lua.TakeOver(num=num)):
            logger.error("dropping webhook %r of an earlier release: %s", lost, UNREADABLE)
        return True

    # ------------------------------------------------------------ ends

    async def tenants_with_ends(self, num: int) -> list[str]:
        """Return at most `num` tenants that have ends, those whose turn is longest ago first."""
        found = await self._redis.zrange(self._keys.ends, 0, num - 1)
        return await names_in(self._scripts, self._keys, self._keys.ends, found, 1)

    async def ended(self, tenant: str, num: int) -> list[EndedWork]:
        """Return at most `num` of a tenant's ends without deliveries, oldest first."""
        entries = await self._redis.xrange(self._keys.ends_of(tenant), count=num)
        return [
            EndedWork(entry.decode(), fields.get(b"id", b"").decode(), fields.get(b"type", b"").decode())
            for entry, fields in entries
        ]

    async def drop_ends(self, tenant: str, ended: Sequence[EndedWork]) -> None:
        """Record that deliveries were made for these ends of a tenant, and that the tenant has had its turn."""
        keys = self._keys
        # "0-0" is never an entry: it counts the turn even of a tenant without ends.
        entries = [*(one.entry for one in ended), "0-0"]
        call = lua.DropEnds(tenant_ends=keys.ends_of(tenant), ends=keys.ends, tenant=tenant, entries=entries)
        await self._scripts.run(call)

    # ------------------------------------------------------------ deliveries

    async def add(self, tenant: str, deliveries: Sequence[m.Delivery], max_waiting: int) -> list[int]:
        """Record deliveries of a tenant, new ones or ones given up, as due now. Returns -1 for each.

        A delivery that finds `max_waiting` others of the tenant waiting, or half as many and its endpoint's share of
        `max_waiting`, is not recorded; the number of those waiting is returned for it.
        """
        keys = self._keys
        call = lua.AddDeliveries(
            hooks=keys.hooks(tenant),
            outbox=keys.outbox(tenant),
            times=keys.outbox_times(tenant),
            undelivered=keys.undelivered(tenant),
            outboxes=keys.outboxes,
            tenant=tenant,
            max_waiting=max_waiting,
            deliveries=[lua.DeliveryRow(id=one.id, record=m.encode(one)) for one in deliveries],
        )
        return await self._scripts.run(call)

    async def tenants_with_deliveries(self, num: int) -> list[str]:
        """Return at most `num` tenants that may have due deliveries, those whose turn is longest ago first."""
        found = await self._redis.zrangebyscore(self._keys.outboxes, "-inf", now_ms(), start=0, num=num)
        return await names_in(self._scripts, self._keys, self._keys.outboxes, found, 1)

    async def take(self, tenant: str, num: int, claim_ms: int) -> list[m.Delivery]:
        """Give a tenant its turn: return at most `num` of its due deliveries, the most overdue first.

        They are due again after `claim_ms`, unless `later` or `done` is called. A delivery with an unreadable record is
        given up, with that as its error.
        """
        keys = self._keys
        call = lua.TakeDeliveries(
            outbox=keys.outbox(tenant),
            times=keys.outbox_times(tenant),
            outboxes=keys.outboxes,
            tenant=tenant,
            num=num,
            claim_ms=claim_ms,
        )
        flat = await self._scripts.run(call)
        found: list[m.Delivery] = []
        lost: list[m.Delivery] = []
        for id_, raw in zip(flat[::2], flat[1::2], strict=True):
            try:
                read = decode_record(raw, m.Delivery)
            except NewerRecord as error:  # left for a newer gateway; only the tenant's turn is used
                FAILED.note("records", error, "a Delivery")
                continue
            except UnreadableRecord as error:
                FAILED.note("records", error, "a Delivery")
                read = None
            if read is not None and read.tenant == tenant:
                found.append(read)
            else:
                event, _, endpoint = id_.decode().rpartition(":")
                lost.append(m.Delivery(
                    id=id_.decode(), event=event, endpoint=endpoint, tenant=tenant, type="", subject="",
                    created_ms=now_ms(), error=UNREADABLE,
                ))  # fmt: skip
        if lost:
            await self.give_up(tenant, lost)
        return found

    async def waiting(self, tenant: str) -> list[m.Delivery]:
        """Return a tenant's deliveries that are neither delivered nor given up."""
        return readable(await self._redis.hvals(self._keys.outbox(tenant)), m.Delivery)

    async def later(self, delivery: m.Delivery, due_ms: int) -> None:
        """Write a delivery with the time of its next attempt, unix ms."""
        pipe = self._redis.pipeline(transaction=True)
        pipe.hset(self._keys.outbox(delivery.tenant), delivery.id, m.encode(delivery))
        pipe.zadd(self._keys.outbox_times(delivery.tenant), {delivery.id: due_ms})
        pipe.zadd(self._keys.outboxes, {delivery.tenant: due_ms}, lt=True)
        await pipe.execute()

    async def done(self, delivery: m.Delivery) -> None:
        """Delete a delivery that has arrived."""
        pipe = self._redis.pipeline(transaction=True)
        pipe.hdel(self._keys.outbox(delivery.tenant), delivery.id)
        pipe.zrem(self._keys.outbox_times(delivery.tenant), delivery.id)
        await pipe.execute()

    # ------------------------------------------------------------ given up

    async def give_up(self, tenant: str, deliveries: Sequence[m.Delivery]) -> None:
        """Store at least one delivery of a tenant as given up; only the newest `MAX_GIVEN_UP` are kept."""
        ids, aside = [one.id for one in deliveries], self._keys.undelivered(tenant)
        pipe = self._redis.pipeline(transaction=True)
        pipe.hdel(self._keys.outbox(tenant), *ids)
        pipe.zrem(self._keys.outbox_times(tenant), *ids)
        pipe.hset(aside, mapping={one.id: m.encode(one) for one in deliveries[-MAX_GIVEN_UP:]})
        pipe.expire(aside, GIVEN_UP_S)
        await pipe.execute()
        if await self._redis.hlen(aside) > MAX_GIVEN_UP:
            oldest = sorted(await self.given_up(tenant), key=lambda one: one.created_ms)[:-MAX_GIVEN_UP]
            if oldest:
                await self._redis.hdel(aside, *(one.id for one in oldest))

    async def given_up(self, tenant: str) -> list[m.Delivery]:
        """Return a tenant's deliveries that were given up, newest first."""
        found = readable(await self._redis.hvals(self._keys.undelivered(tenant)), m.Delivery)
        return sorted(found, key=lambda one: -one.created_ms)

"""Webhook endpoints, the ends of jobs and batches, and deliveries: events on their way to endpoints.

One gateway at a time sends; the others keep watch. What it has not noted as done is done again by the next one, so an
event arrives at least once.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.queue.connection.redis_client import Client
from protocol.queue.dead_letters import set_aside
from protocol.queue.kept.readable import readable
from protocol.queue.scripts import Scripts
from protocol.runtime.guarded import FAILED
from protocol.wire import messages as m
from protocol.wire.clock import now_ms
from protocol.wire.codec import decode_record
from protocol.wire.errors import NewerRecord, UnreadableRecord
from protocol.wire.keys import Keys

GIVEN_UP_S = 604_800
"""How long a delivery that was given up is kept."""

WAITING_S = 3 * 86_400
"""How long it is known which deliveries of a tenant wait, after the last one began or was tried: they wait a day."""

MAX_GIVEN_UP = 256
"""Deliveries of a tenant that were given up and are kept, the newest."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a job or a batch."""

    tenant: str
    id: str
    type: str  # of the event; "": a job, whose state tells it


class Webhooks:
    """The webhooks of a fleet."""

    def __init__(self, client: Client, keys: Keys, scripts: Scripts) -> None:
        self._redis = client
        self._keys = keys
        self._scripts = scripts

    # ------------------------------------------------------------ endpoints

    async def endpoints(self, tenant: str | None = None) -> list[m.WebhookEndpoint]:
        """Return the endpoints of a tenant, or of all, the oldest first."""
        found = readable(await self._redis.hvals(self._keys.webhooks), m.WebhookEndpoint)
        return sorted((one for one in found if tenant in (None, one.tenant)), key=lambda one: (one.created_ms, one.id))

    async def endpoint(self, tenant: str, endpoint_id: str) -> m.WebhookEndpoint | None:
        """Return a tenant's endpoint; None if there is no such one."""
        raw = await self._redis.hget(self._keys.webhooks, f"{tenant}:{endpoint_id}")
        return decode_record(raw, m.WebhookEndpoint) if raw is not None else None

    async def put_endpoint(self, endpoint: m.WebhookEndpoint) -> None:
        """Write an endpoint, new or changed."""
        await self._redis.hset(self._keys.webhooks, f"{endpoint.tenant}:{endpoint.id}", m.encode(endpoint))

    async def delete_endpoint(self, tenant: str, endpoint_id: str) -> bool:
        """Delete an endpoint. Returns whether it was there."""
        return bool(await self._redis.hdel(self._keys.webhooks, f"{tenant}:{endpoint_id}"))

    # ------------------------------------------------------------ sending

    async def lead(self, gid: str, lease_ms: int) -> bool:
        """Take or keep the sending of webhooks for `lease_ms`. Returns whether this gateway has it."""
        if await self._redis.set(self._keys.sender, gid, nx=True, px=lease_ms):
            return True
        if await self._redis.get(self._keys.sender) != gid.encode():
            return False
        return bool(await self._redis.pexpire(self._keys.sender, lease_ms))

    async def ended(self, num: int) -> tuple[list[Ended], str]:
        """Return at most `num` ends that no deliveries were made of, and where to go on after them."""
        raw = await self._redis.get(self._keys.event_cursor)
        cursor = raw.decode() if raw else "0"
        entries = await self._redis.xrange(self._keys.events, f"({cursor}", count=num)
        if entries:
            cursor = entries[-1][0].decode()
        fields = [{name.decode(): value.decode() for name, value in entry.items()} for _, entry in entries]
        return [Ended(one["tenant"], one["id"], one["type"]) for one in fields], cursor

    async def add(self, delivery: m.Delivery, max_waiting: int) -> int:
        """Note a delivery, new or one that was given up, due now. Returns -1.

        If `max_waiting` of its tenant's wait already, it returns how many do, and nothing is changed.
        """
        keys, tenant = self._keys, delivery.tenant
        names = [
            keys.tag,
            keys.deliveries,
            keys.delivery_times,
            keys.waiting_deliveries(tenant),
            keys.undelivered(tenant),
        ]
        args = [delivery.id, m.encode(delivery), max_waiting, WAITING_S]
        return await self._scripts.add_delivery(keys=names, args=args)

    async def move_on(self, cursor: str) -> None:
        """Note that deliveries were made of all events up to `cursor`."""
        await self._redis.set(self._keys.event_cursor, cursor)

    async def due(self, num: int) -> list[m.Delivery]:
        """Return at most `num` deliveries whose time has come, the most overdue first."""
        ids = await self._redis.zrangebyscore(self._keys.delivery_times, "-inf", now_ms(), start=0, num=num)
        raws: list[bytes | None] = list(await self._redis.hmget(self._keys.deliveries, ids)) if ids else []
        found: list[m.Delivery] = []
        for id_, raw in zip(ids, raws, strict=True):
            if raw is None:
                await self._redis.zrem(self._keys.delivery_times, id_)
                continue
            try:
                found.append(decode_record(raw, m.Delivery))
            except NewerRecord as error:  # for a newer gateway, once it leads
                FAILED.note("records", error, "a Delivery")
            except UnreadableRecord as error:
                keys = self._keys
                taken = (("HDEL", keys.deliveries, id_), ("ZREM", keys.delivery_times, id_))
                await set_aside(self._scripts, keys, keys.deliveries, raw, error.message, *taken)
        return found

    async def waiting(self) -> list[m.Delivery]:
        """Return all deliveries that have not arrived, and were not given up."""
        return readable(await self._redis.hvals(self._keys.deliveries), m.Delivery)

    async def later(self, delivery: m.Delivery, due_ms: int) -> None:
        """Write a delivery that was tried, and when it is tried again."""
        waiting = self._keys.waiting_deliveries(delivery.tenant)
        pipe = self._redis.pipeline(transaction=True)
        pipe.hset(self._keys.deliveries, delivery.id, m.encode(delivery))
        pipe.zadd(self._keys.delivery_times, {delivery.id: due_ms})
        pipe.sadd(waiting, delivery.id)
        pipe.expire(waiting, WAITING_S)
        await pipe.execute()

    async def done(self, delivery: m.Delivery, *, given_up: bool = False) -> None:
        """Forget a delivery that has arrived; or put it aside, as long as these are few."""
        aside = self._keys.undelivered(delivery.tenant)
        pipe = self._redis.pipeline(transaction=True)
        pipe.hdel(self._keys.deliveries, delivery.id)
        pipe.zrem(self._keys.delivery_times, delivery.id)
        pipe.srem(self._keys.waiting_deliveries(delivery.tenant), delivery.id)
        if given_up:
            pipe.hset(aside, delivery.id, m.encode(delivery))
            pipe.expire(aside, GIVEN_UP_S)
        await pipe.execute()
        if given_up and await self._redis.hlen(aside) > MAX_GIVEN_UP:
            oldest = sorted(await self.given_up(delivery.tenant), key=lambda one: one.created_ms)[:-MAX_GIVEN_UP]
            await self._redis.hdel(aside, *(one.id for one in oldest))

    # ------------------------------------------------------------ given up

    async def given_up(self, tenant: str) -> list[m.Delivery]:
        """Return a tenant's deliveries that were given up, the newest first."""
        found = readable(await self._redis.hvals(self._keys.undelivered(tenant)), m.Delivery)
        return sorted(found, key=lambda one: -one.created_ms)

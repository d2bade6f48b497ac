"""A tenant's webhooks are not delayed by the receivers, host names and records of another tenant."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import pytest
import pytest_asyncio
from helpers.flaky import failures
from helpers.waiting import wait_until

from chaos.dns_server import DnsServer, answering
from gateway.webhooks.names import HostNames
from gateway.webhooks.outside import Outside
from gateway.webhooks.sender import MAX_AGE_MS, SenderPace, WebhookSender
from protocol.metrics.series import UNREADABLE
from protocol.queue.bus import Bus, now_ms
from protocol.runtime.fleet_secret import FleetSecret
from protocol.runtime.guarded import guarded
from protocol.wire import messages as m

SECRET = FleetSecret("0123456789abcdef0123")
PACE = SenderPace(poll_s=0.05, lease_s=5.0, first_retry_s=3600.0, busy_s=0.05)


@dataclass
class Receiver:
    """Receives webhooks and records the tenant of each; only answers those of `answered`."""

    answered: tuple[str, ...] = ("victim",)
    port: int = 0
    got: list[str] = field(default_factory=list)  # tenants
    hosts: set[str] = field(default_factory=set)
    open: set[asyncio.StreamWriter] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open.add(writer)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            tenant = head.split(" ")[1].removeprefix("/")
            self.hosts.add(head.lower().partition("\r\nhost: ")[2].partition("\r\n")[0])
            self.got.append(tenant)
            if tenant in self.answered:
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await reader.read()
        except ConnectionError:
            pass
        finally:
            self.open.discard(writer)
            writer.close()


@pytest_asyncio.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0, backlog=1000)
    receiver.port = server.sockets[0].getsockname()[1]
    yield receiver
    for writer in list(receiver.open):
        writer.close()
    server.close()


@asynccontextmanager
async def sending(bus: Bus, outside: Outside, pace: SenderPace = PACE) -> AsyncIterator[WebhookSender]:
    sender = WebhookSender(bus, "g1", outside, SECRET, pace)
    task = asyncio.create_task(guarded(sender.loop()))
    try:
        yield sender
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await sender.leave()


async def hook(bus: Bus, tenant: str, url: str, number: int = 0) -> m.WebhookEndpoint:
    id_ = f"we_{number}"
    endpoint = m.WebhookEndpoint(
        id=id_, tenant=tenant, name="n", url=url, events=["batch.completed", "job.completed"],
        secret=SECRET.seal("whsec_aaaa", id_), hint="", created_ms=number, updated_ms=0,
    )  # fmt: skip
    assert await bus.webhooks.keep_endpoint(endpoint, 20)
    return endpoint


def deliveries(tenant: str, numbers: range, created_ms: int = 0) -> list[m.Delivery]:
    return [
        m.Delivery(
            id=f"evt_{number}:we_0", event=f"evt_{number}", endpoint="we_0", tenant=tenant, type="batch.completed",
            subject=f"batch_{number}", created_ms=created_ms or now_ms(),
        )
        for number in numbers
    ]  # fmt: skip


def failures_of(loop: str) -> float:
    return failures([loop])[loop]


async def fill(bus: Bus, tenant: str, num: int) -> None:
    for start in range(0, num, 100):
        await bus.webhooks.add(tenant, deliveries(tenant, range(start, start + 100)), 1000)


async def test_a_black_hole_keeps_no_other_tenant_waiting(bus: Bus, receiver: Receiver) -> None:
    """A thousand unanswered deliveries are under way before the victim's starts."""
    async with answering(DnsServer({f"h{n}.example": ["127.0.0.1"] for n in range(20)})) as server:
        for number in range(20):
            await hook(bus, "attacker", f"http://h{number}.example:{receiver.port}/attacker", number)
        await hook(bus, "victim", f"http://127.0.0.1:{receiver.port}/victim")
        await fill(bus, "attacker", 1000)
        async with sending(bus, Outside(private=True, names=HostNames(server.address), timeout_s=600.0)):
            await wait_until(lambda: receiver.got.count("attacker") >= 2, "the attacker is at it")
            await bus.webhooks.add("victim", deliveries("victim", range(3)), 1000)
            await wait_until(lambda: receiver.got.count("victim") == 3, "all of the victim's have arrived")
            await wait_until(lambda: _none_waits(bus, "victim"), "and are forgotten")
            assert receiver.got.count("attacker") <= PACE.max_sending_of_tenant


async def _none_waits(bus: Bus, tenant: str) -> bool:
    return not await bus.webhooks.waiting(tenant)


async def test_names_that_hang_keep_no_other_tenant_waiting(bus: Bus, receiver: Receiver) -> None:
    async with answering(DnsServer({"victim.example": ["127.0.0.1"]})) as server:
        await hook(bus, "attacker", "http://silent.example/")
        await hook(bus, "victim", f"http://victim.example:{receiver.port}/victim")
        await fill(bus, "attacker", 1000)
        names = HostNames(server.address, lookup_s=600.0)
        async with sending(bus, Outside(private=True, names=names, timeout_s=600.0)):
            await wait_until(lambda: server.asked["silent.example"] >= 2, "the attacker's name is looked up")
            await bus.webhooks.add("victim", deliveries("victim", range(3)), 1000)
            await wait_until(lambda: receiver.got.count("victim") == 3, "all of the victim's have arrived")


async def test_many_tenants_with_black_holes_take_turns_with_others(bus: Bus, receiver: Receiver) -> None:
    """Twelve tenants use all slots; a tenant without one gets one of the first to become free."""
    pace = SenderPace(poll_s=0.05, lease_s=5.0, first_retry_s=3600.0, max_sending=8, max_sending_of_tenant=2)
    known = {f"h{number}.example": ["127.0.0.1"] for number in range(12)}
    async with answering(DnsServer(known)) as server:
        for number in range(12):
            await hook(bus, f"t{number}", f"http://h{number}.example:{receiver.port}/t{number}")
            await fill(bus, f"t{number}", 100)
        await hook(bus, "victim", f"http://127.0.0.1:{receiver.port}/victim")
        async with sending(bus, Outside(private=True, names=HostNames(server.address), timeout_s=1.0), pace):
            await wait_until(lambda: len(receiver.got) >= 8, "all places are taken")
            await bus.webhooks.add("victim", deliveries("victim", range(1)), 1000)
            before = len(receiver.got)
            await wait_until(lambda: "victim" in receiver.got, "the victim's has arrived")
            assert receiver.got.index("victim") - before <= 2 * pace.max_sending


async def test_a_flood_of_ends_keeps_no_other_tenant_s_back(bus: Bus, receiver: Receiver) -> None:
    receiver.answered = ("attacker", "victim")
    await hook(bus, "victim", f"http://127.0.0.1:{receiver.port}/victim")
    for number in range(20):
        await hook(bus, "attacker", "http://nowhere.example/", number)
    for tenant, num in (("attacker", 2000), ("victim", 1)):
        pipe = bus._redis.pipeline()
        for number in range(num):
            pipe.xadd(bus.keys.ends_of(tenant), {"id": f"batch_{number}", "type": "batch.completed"})
        pipe.zadd(bus.keys.ends, {tenant: now_ms()}, nx=True)
        await pipe.execute()
    async with answering(DnsServer(none=["nowhere.example"])) as server:
        async with sending(bus, Outside(private=True, names=HostNames(server.address))):
            await wait_until(lambda: "victim" in receiver.got, "the victim's has arrived")
            assert await bus.streams.length(bus.keys.ends_of("attacker")) > 1000
            await wait_until(lambda: _is_looked_at(bus), "all ends were looked at")
        assert len(await bus.webhooks.waiting("attacker")) <= 1000


async def _is_looked_at(bus: Bus) -> bool:
    return not await bus.streams.length(bus.keys.ends_of("attacker"))


class Raising(Outside):
    """Raises an unexpected exception."""

    num_tries = 0

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], tenant: str) -> int:
        """Raise an exception."""
        self.num_tries += 1
        raise ZeroDivisionError("what nobody has thought of")


async def test_whatever_a_delivery_raises_is_an_attempt(bus: Bus) -> None:
    await hook(bus, "a", "https://a.example")
    young, old = deliveries("a", range(2))
    old = msgspec.structs.replace(old, created_ms=now_ms() - MAX_AGE_MS - 1)
    await bus.webhooks.add("a", [young, old], 1000)
    outside = Raising(private=True)

    async def are_tried() -> bool:
        return bool(await bus.webhooks.given_up("a")) and all(one.attempts for one in await bus.webhooks.waiting("a"))

    async with sending(bus, outside):
        await wait_until(are_tried, "both are tried")
        [given_up], [waiting] = await bus.webhooks.given_up("a"), await bus.webhooks.waiting("a")
        assert (given_up.id, given_up.attempts) == (old.id, 1)
        assert given_up.error == waiting.error == "it cannot be sent: ZeroDivisionError"
        assert outside.num_tries == 2, "neither is tried again at once"
        assert await bus._redis.zscore(bus.keys.outbox_times("a"), young.id) > now_ms() + 1_000_000


@pytest.mark.parametrize("newer", ["endpoint", "job"])
async def test_ends_that_a_newer_release_must_tell_of_wait_for_it(bus: Bus, receiver: Receiver, newer: str) -> None:
    """The sender can't read an endpoint or job of a newer release: it leaves it alone, and other tenants' continue."""
    endpoint = await hook(bus, "a", f"http://127.0.0.1:{receiver.port}/a")
    await hook(bus, "victim", f"http://127.0.0.1:{receiver.port}/victim")
    if newer == "endpoint":
        raw = msgspec.msgpack.encode({**msgspec.msgpack.decode(m.encode(endpoint)), "form": 1000})
        await bus._redis.hset(bus.keys.hooks("a"), endpoint.id, raw)
    else:
        await bus._redis.hset(bus.keys.job("job_1"), "b", m.encode({"form": 1000}))
        await bus._redis.expire(bus.keys.job("job_1"), 60)
    for tenant, id_, type_ in (("a", "job_1", ""), ("victim", "batch_1", "batch.completed")):
        await bus._redis.xadd(bus.keys.ends_of(tenant), {"id": id_, "type": type_})
        await bus._redis.zadd(bus.keys.ends, {tenant: 0 if tenant == "a" else 1})
    async with sending(bus, Outside(private=True)):
        await wait_until(lambda: receiver.got == ["victim"], "the other one's has arrived")
        await wait_until(lambda: _has_ends(bus, ["a"]), "and is forgotten")
    assert await bus.streams.length(bus.keys.ends_of("a")) == 1
    await bus._redis.delete(bus.keys.ends, bus.keys.ends_of("a"))


async def test_an_endpoint_that_cannot_be_read_is_tried_for_a_day(bus: Bus) -> None:
    """Its record is damaged, or of a newer release: an attempt like any other, with pauses and an end."""
    young, old = deliveries("a", range(2))
    old = msgspec.structs.replace(old, created_ms=now_ms() - MAX_AGE_MS - 1)
    await bus.webhooks.add("a", [young, old], 1000)
    await bus._redis.hset(bus.keys.hooks("a"), "we_0", m.encode({"form": 1000}))

    async def are_tried() -> bool:
        return bool(await bus.webhooks.given_up("a")) and all(one.attempts for one in await bus.webhooks.waiting("a"))

    async with sending(bus, Outside(private=True)):
        await wait_until(are_tried, "both are tried")
    [given_up], [waiting] = await bus.webhooks.given_up("a"), await bus.webhooks.waiting("a")
    assert (given_up.id, given_up.attempts, waiting.attempts) == (old.id, 1, 1)
    assert "a newer release wrote it" in given_up.error


async def test_a_sender_that_fails_is_told_once_counted_and_goes_on(
    bus: Bus, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    """Inside its own loop as well: errors are not swallowed, so that the metric and its alert work."""
    before = failures_of("webhooks")
    await hook(bus, "victim", f"http://127.0.0.1:{receiver.port}/victim")
    await bus.webhooks.add("victim", deliveries("victim", range(1)), 1000)
    await bus._redis.set(bus.keys.ends, "no sorted set", ex=60)
    async with sending(bus, Outside(private=True)):
        await wait_until(lambda: failures_of("webhooks") - before == 2, "it fails, and again after a pause")
        assert receiver.got == []
        await bus._redis.delete(bus.keys.ends)
        await wait_until(lambda: receiver.got == ["victim"], "it has arrived")
    assert failures_of("webhooks") - before == 2
    assert caplog.text.count("webhooks has failed") <= 1


async def test_urls_that_an_older_version_took_are_sent_or_given_up(bus: Bus, receiver: Receiver) -> None:
    receiver.answered = ("idna",)
    await hook(bus, "idna", f"http://bücher.example:{receiver.port}/idna")
    await hook(bus, "bad", "http://🤖.example/bad")
    await bus.webhooks.add("idna", deliveries("idna", range(1)), 1000)
    await bus.webhooks.add("bad", deliveries("bad", range(1), created_ms=1), 1000)
    known = {"xn--bcher-kva.example": ["127.0.0.1"]}
    async with (
        answering(DnsServer(known)) as server,
        sending(bus, Outside(private=True, names=HostNames(server.address))),
    ):
        await wait_until(lambda: _none_waits(bus, "idna"), "it has arrived")
        [given_up] = await wait_until(lambda: bus.webhooks.given_up("bad"), "the other one is given up")
    assert receiver.hosts == {f"xn--bcher-kva.example:{receiver.port}"}
    assert given_up.error.startswith("the URL cannot be used: ")


async def test_a_job_that_cannot_be_read_takes_no_other_with_it(bus: Bus, receiver: Receiver) -> None:
    before = UNREADABLE.labels("Job")._value.get()
    await hook(bus, "victim", f"http://127.0.0.1:{receiver.port}/victim")
    await bus._redis.hset(bus.keys.job("job_bad"), mapping={"b": b"\x81"})
    await bus._redis.expire(bus.keys.job("job_bad"), 60)
    for id_, type_ in (("job_bad", ""), ("batch_good", "batch.completed")):
        await bus._redis.xadd(bus.keys.ends_of("victim"), {"id": id_, "type": type_})
    await bus._redis.zadd(bus.keys.ends, {"victim": 0})
    async with sending(bus, Outside(private=True)):
        await wait_until(lambda: receiver.got == ["victim"], "the batch's end was told")
        await wait_until(lambda: _none_waits(bus, "victim"), "and is forgotten")
    assert UNREADABLE.labels("Job")._value.get() == before + 1, "it is counted, and told in the log"
    assert await bus.streams.length(bus.keys.ends_of("victim")) == 0


async def test_tenants_whose_records_are_broken_keep_no_other_back(
    bus: Bus, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    """Forty tenants that are processed first have endpoints, deliveries or ends of a wrong type."""
    broken, before = [f"t{number:02}" for number in range(40)], failures_of("webhooks")
    for number, tenant in enumerate(broken):
        await bus._redis.zadd(bus.keys.ends, {tenant: 1})
        await bus._redis.xadd(bus.keys.ends_of(tenant), {"neither": "id nor type"})
        if number % 2:
            await bus._redis.set(bus.keys.hooks(tenant), "no hash", ex=60)
        else:
            await hook(bus, tenant, "http://127.0.0.1:1/")
    await hook(bus, "victim", f"http://127.0.0.1:{receiver.port}/victim")
    await bus._redis.xadd(bus.keys.ends_of("victim"), {"id": "batch_good", "type": "batch.completed"})
    await bus._redis.zadd(bus.keys.ends, {"victim": now_ms()})
    async with sending(bus, Outside(private=True)):
        await wait_until(lambda: receiver.got == ["victim"], "the victim's has arrived")
        await wait_until(lambda: _has_ends(bus, broken[1::2]), "what can be read is done")
    assert caplog.text.count("webhooks has failed with t") <= 1, "one cause is told once"
    assert 20 <= failures_of("webhooks") - before < 200, "and each of them is left alone for a while"
    await bus._redis.delete(bus.keys.ends, *map(bus.keys.ends_of, broken))


async def _has_ends(bus: Bus, tenants: list[str]) -> bool:
    return set(await bus.webhooks.tenants_with_ends(100)) == set(tenants)

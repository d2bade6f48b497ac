"""A queue of several servers behind Sentinels: its URL, and real servers with failovers."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from helpers.waiting import wait_until

from chaos.replicated import SENTINEL_PASSWORD, ReplicatedQueue
from lorafleet.__main__ import main
from protocol.queue.bus import CONNECTION_ERRORS, Bus
from protocol.queue.connection.failover import split
from protocol.queue.connection.redis_client import ping
from protocol.queue.users import SERVERS, table
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicatedQueue]:
    queue = ReplicatedQueue(tmp_path_factory.mktemp("replicated"), guarded=True, cabled=True)
    yield queue
    queue.stop()


# ------------------------------------------------------------ the URL


def test_a_url_names_sentinels_primary_user_and_database() -> None:
    sentinels, url = split(
        "rediss-sentinel://worker:pa%40ss@a:1,[::1]:2,c/my%20fleet/3?ssl_ca_certs=/ca&sentinel_password=s"
    )
    assert sentinels.addresses == [("a", 1), ("::1", 2), ("c", 26379)]
    assert (sentinels.name, sentinels.password) == ("my fleet", "s")
    assert sentinels.tls == {"ssl_ca_certs": "/ca"}
    assert url == "rediss://worker:pa%40ss@primary/3?ssl_ca_certs=%2Fca"
    plain, url = split("redis-sentinel://a/fleet")
    assert (plain.addresses, plain.tls, plain.password, url) == ([("a", 26379)], None, None, "redis://primary/0")
    assert "password" not in repr(sentinels)


@pytest.mark.parametrize("url", ["redis-sentinel:///fleet", "redis-sentinel://a:1", "redis-sentinel://a,/fleet"])
def test_a_url_without_sentinels_or_a_name_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="Sentinel"):
        split(url)


def test_passwords_come_from_files(tmp_path: Path) -> None:
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    own.write_text("p w\n")
    theirs.write_text("s&w\n")
    url = "redis-sentinel://worker@a:1,b:2/fleet/0"
    settings = Settings(redis_url=url, redis_password_file=own, redis_sentinel_password_file=theirs)
    assert settings.queue_url() == "redis-sentinel://worker:p%20w@a:1,b:2/fleet/0?sentinel_password=s%26w"
    assert split(settings.queue_url())[0].password == "s&w"
    with pytest.raises(BadRequest, match="is for a queue at redis-sentinel"):
        Settings(redis_url="redis://a", redis_sentinel_password_file=theirs).queue_url()


def test_users_of_replicas_and_sentinels_are_made_when_asked(tmp_path: Path) -> None:
    assert main(["users", str(tmp_path / "one")]) == 0
    assert main(["users", "--replicated", str(tmp_path / "several")]) == 0
    one, several = ((tmp_path / name / "queue" / "users.acl").read_text() for name in ("one", "several"))
    assert not any(f"user {name} " in one for name in SERVERS)
    assert all(f"user {name} reset on #" in several for name in (*SERVERS, *table()))


# ------------------------------------------------------------ real servers


@pytest.mark.timeout(120)
async def test_every_user_enters_and_goes_on_after_a_failover(replicated: ReplicatedQueue) -> None:
    await replicated.until_whole()
    buses = {user: Bus(replicated.door(user).queue_url()) for user in table()}
    for bus in buses.values():
        await bus.server.check()
        assert not await bus.restarted()
    gateway = buses["gateway"]
    await gateway._redis.set(gateway.keys.tag, "before", px=60_000)
    assert not await replicated.hit("kill", random.Random(1), 0.0)
    for user, bus in buses.items():
        assert await bus.restarted(), f"{user} learns that the server is another one"
    assert await gateway._redis.get(gateway.keys.tag) == b"before"
    await gateway._redis.set(gateway.keys.tag, "after", px=60_000)
    await asyncio.to_thread(ping, replicated.door("operator").queue_url(), 5.0)
    for bus in buses.values():
        await bus.close()


@pytest.mark.timeout(120)
async def test_an_old_primary_that_was_cut_off_takes_nothing(replicated: ReplicatedQueue) -> None:
    """A client still connected to it gets an error, and finds the new primary."""
    await replicated.until_whole()
    old = await replicated.primary()
    assert old is not None
    password = (replicated.folder / "users" / "gateway" / "password").read_text()
    bus = Bus(replicated.door("gateway").queue_url())
    await bus._redis.set(bus.keys.tag, "before", px=60_000)
    with redis.Redis(port=replicated.ports[old], username="gateway", password=password) as client:
        client.get(bus.keys.tag)  # opens a connection to the old primary, which stays open
        process = replicated.servers[old]
        process.send_signal(signal.SIGSTOP)

        async def another() -> bool:
            return await replicated.primary() not in (old, None)

        await wait_until(another, "another one is the primary")
        process.send_signal(signal.SIGCONT)

        def refused() -> bool:
            """Replicas are counted once a second: writes accepted before are lost, as the last second may be."""
            try:
                client.set(bus.keys.tag, "lost", px=60_000)
            except redis.RedisError:
                return True
            return False

        await wait_until(refused, "it takes no writes")

    async def written() -> bool:
        try:
            return bool(await bus._redis.set(bus.keys.tag, "after", px=60_000))
        except CONNECTION_ERRORS:
            return False

    await wait_until(written, "the bus has found the new one")
    await replicated.until_whole()
    assert await bus._redis.get(bus.keys.tag) == b"after"
    await bus.close()


@pytest.mark.timeout(120)
async def test_who_still_reaches_an_old_primary_leaves_it_with_the_others(replicated: ReplicatedQueue) -> None:
    """A client with connections to both the old and the new primary would see two queues."""
    await replicated.until_whole()
    bus = Bus(replicated.door("gateway").queue_url())
    await bus._redis.set(bus.keys.tag, "before", px=60_000)
    async with replicated.cut_off("split"):
        assert await bus._redis.get(bus.keys.tag) == b"before"  # the connection to the old primary, which answers
        await bus._blocking.set(bus.keys.tag, "after", px=60_000)  # through a new connection
        assert await bus._redis.get(bus.keys.tag) == b"after"
    await bus.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["partition", "lag"])
async def test_servers_come_back_from_every_fault(replicated: ReplicatedQueue, how: str) -> None:
    assert await replicated.hit(how, random.Random(1), 1.5) == []


async def test_sentinels_that_are_not_there_are_a_lost_connection(replicated: ReplicatedQueue) -> None:
    bus = Bus(f"redis-sentinel://127.0.0.1:1/fleet/0?sentinel_password={SENTINEL_PASSWORD}")
    with pytest.raises(CONNECTION_ERRORS, match=r"no Sentinel names the queue's primary: 127\.0\.0\.1:1"):
        await bus.server.check()
    await bus.close()
    unknown = Bus(replicated.url.replace("/fleet/", "/other/"))
    with pytest.raises(CONNECTION_ERRORS, match="has no primary named other"):
        await unknown.server.check()
    await unknown.close()

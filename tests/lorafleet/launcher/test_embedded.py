"""The embedded queue keeps its data, is used by one fleet only, and ends with its launcher."""

import asyncio
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest
import redis
from helpers.processes import is_running
from helpers.waiting import wait_until

from lorafleet.launcher.embedded import MEMORY_SHARE, start_embedded
from lorafleet.launcher.machine import memory_bytes
from protocol.wire.errors import Conflict, Internal


def test_what_was_queued_is_there_after_a_restart(tmp_path: Path) -> None:
    first = start_embedded(tmp_path)
    with redis.Redis.from_url(first.url) as client:
        client.rpush("jobs", "one")
    first.stop()
    assert not first.socket.exists()
    second = start_embedded(tmp_path)
    with redis.Redis.from_url(second.url) as client:
        assert client.lrange("jobs", 0, -1) == [b"one"]
    second.stop()


def test_its_memory_is_bounded_and_nothing_is_evicted(tmp_path: Path) -> None:
    for given, expected in ((0, int(MEMORY_SHARE * memory_bytes())), (5_000_000, 5_000_000)):
        server = start_embedded(tmp_path, durable=False, max_bytes=given)
        with redis.Redis.from_url(server.url) as client:
            assert client.config_get("maxmemory*")["maxmemory"] == str(expected)
            assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
        server.stop()


def test_the_memory_of_this_machine_is_the_container_s(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    everything = memory_bytes(limit)
    assert everything > 1 << 28
    limit.write_text("max\n")
    assert memory_bytes(limit) == everything
    limit.write_text("1048576\n")
    assert memory_bytes(limit) == 1 << 20


def test_two_servers_never_share_a_folder(tmp_path: Path) -> None:
    server = start_embedded(tmp_path, durable=False)
    with pytest.raises(Conflict, match="another fleet is using the data folder"):
        start_embedded(tmp_path, durable=False, lock_s=0.0)
    server.stop()
    start_embedded(tmp_path, durable=False).stop()


def test_a_deep_folder_gets_a_socket_elsewhere(tmp_path: Path) -> None:
    server = start_embedded(tmp_path / ("deep" * 20) / ("deeper" * 20), durable=False)
    with redis.Redis.from_url(server.url) as client:
        assert client.ping()
    server.stop()
    assert not server.socket.parent.exists()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    server = start_embedded(tmp_path)
    server.stop()
    for part in (tmp_path / "appendonlydir").glob("*.manifest"):
        part.write_bytes(b"no such thing")
    with pytest.raises(Internal, match=r"(?s)did not start: .*AOF MANIFEST FILE ERROR"):
        start_embedded(tmp_path)


async def test_it_ends_with_a_launcher_killed_by_sigkill(tmp_path: Path) -> None:
    code = (
        "import pathlib, signal, sys; from lorafleet.launcher.embedded import start_embedded;"
        "server = start_embedded(pathlib.Path(sys.argv[1])); print(server.process.pid, flush=True); signal.pause()"
    )
    launcher = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(tmp_path), stdout=PIPE)
    assert launcher.stdout is not None
    server = int(await launcher.stdout.readline())
    assert is_running(server)
    launcher.kill()
    await launcher.wait()
    await wait_until(lambda: not is_running(server), "the server is gone")
    start_embedded(tmp_path).stop()

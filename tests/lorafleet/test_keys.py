"""`lorafleet keys` as an operator runs it."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from lorafleet.__main__ import main
from lorafleet.launcher.embedded import EmbeddedServer, start_embedded
from protocol.queue.books.api_keys import PREFIX, ApiKey, Tenant
from protocol.queue.bus import Bus, now_ms


@pytest.fixture
def flags(queue_server: EmbeddedServer) -> list[str]:
    async def empty() -> None:
        bus = Bus(queue_server.url)
        await bus._redis.flushall()
        await bus.close()

    asyncio.run(empty())
    return ["--redis-url", queue_server.url]


def found(queue_server: EmbeddedServer, key: str) -> tuple[ApiKey, Tenant] | None:
    async def find() -> tuple[ApiKey, Tenant] | None:
        bus = Bus(queue_server.url)
        try:
            for raw in (await bus._redis.hgetall(bus.keys.api_keys)).items():
                assert key.encode() not in b" ".join(raw)
            return await bus.api_keys.find(key)
        finally:
            await bus.close()

    return asyncio.run(find())


async def audited(queue_server: EmbeddedServer) -> list[str]:
    bus = Bus(queue_server.url)
    found = [entry.action for _, entry in await bus.audit.newest(10)]
    await bus.close()
    return found


def test_a_key_is_made_listed_and_revoked(
    queue_server: EmbeddedServer, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ["--requests-per-minute", "60", "--concurrency", "4", "--visible", "acme-*,org/*"]
    create = ["keys", "create", "--tenant", "acme", *flags]
    assert main([*create, "--scopes", "infer,adapters", "--expires", "90d", *limits]) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith(PREFIX)
    known = found(queue_server, key)
    assert known is not None
    assert known[0].scopes == ["infer", "adapters"]
    assert known[0].expires_ms - now_ms() == pytest.approx(90 * 86_400_000, abs=60_000)
    expected = Tenant(name="acme", requests_per_minute=60, concurrency=4, adapters=("acme-*", "org/*"))
    assert known[1] == expected
    assert main([*create, "--tokens-per-minute", "9000"]) == 0  # the tenant's other limits are kept
    other = capsys.readouterr().out.strip()
    known = found(queue_server, other)
    assert known is not None
    assert (known[1].tokens_per_minute, known[1].requests_per_minute) == (9000, 60)
    assert main(["keys", "list", *flags]) == 0
    listed = capsys.readouterr().out
    assert key not in listed
    assert "acme-* org/*" in listed
    first, second = re.findall(r"key_\w+", listed)
    assert main(["keys", "revoke", first, *flags]) == 0
    assert found(queue_server, key) is None
    assert found(queue_server, other) is not None
    assert main(["keys", "revoke", first, *flags]) == 2
    assert f"there is no key {first}" in capsys.readouterr().err
    assert main(["keys", "revoke", second, *flags]) == 0
    assert asyncio.run(audited(queue_server)) == [
        "key.revoke", "key.revoke", "key.create", "tenant.change", "key.create", "tenant.change",
    ]  # fmt: skip
    capsys.readouterr()
    assert main(["keys", "list", *flags]) == 0
    assert "no keys" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tenant", "a:b"], "'a:b' cannot be a tenant's name"),
        (["--tenant", "public"], "'public' cannot be a tenant's name"),
        (["--tenant", "a", "--expires", "soon"], "'soon' is not a lifetime"),
        (["--tenant", "a", "--concurrency", "-1"], "limits must not be negative"),
    ],
)
def test_what_makes_no_sense_is_refused(
    flags: list[str], words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "create", *words, *flags]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("guarded", [True, False])
def test_the_queue_of_a_running_fleet_is_found_by_its_data_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], guarded: bool
) -> None:
    flags = ["--data", str(tmp_path)]
    assert main(["keys", "list", *flags]) == 2
    assert "no fleet runs in" in capsys.readouterr().err
    server = start_embedded(tmp_path / "queue" / "tiny-1", durable=False, guarded=guarded)
    try:
        (tmp_path / "queue" / "ended-2").mkdir()
        assert main(["keys", "list", *flags]) == 0
        assert "no keys" in capsys.readouterr().out
    finally:
        server.stop()


@pytest.mark.parametrize("name", ["flag", "file", "REDIS_URL", "LORAFLEET_REDIS_URL", "LORAFLEET_CONFIG"])
def test_the_queue_is_asked_wherever_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for variable in ("REDIS_URL", "LORAFLEET_REDIS_URL", "LORAFLEET_DATA", "LORAFLEET_CONFIG"):
        monkeypatch.setenv(variable, "")  # set first, so that monkeypatch also removes a variable that the command sets
        monkeypatch.delenv(variable)
    url, file = f"unix://{tmp_path}/none.sock", tmp_path / "fleet.toml"
    file.write_text(f'redis_url = "{url}"\n')
    flags = {"flag": ["--redis-url", url], "file": ["--config", str(file)]}.get(name, [])
    if not flags:
        monkeypatch.setenv(name, str(file) if name == "LORAFLEET_CONFIG" else url)
    assert main(["keys", "list", *flags]) == 1
    assert "cannot reach the queue" in capsys.readouterr().err

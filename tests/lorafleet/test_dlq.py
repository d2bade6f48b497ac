"""`lorafleet dlq` as a user runs it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from helpers import examples

from lorafleet.__main__ import main
from lorafleet.launcher.embedded import EmbeddedServer, start_embedded
from protocol.queue.bus import Bus
from tests.protocol.queue.test_dead_letters import give_up

NAMES_OF_QUEUES = ("REDIS_URL", "LORAFLEET_REDIS_URL", "LORAFLEET_DATA", "LORAFLEET_CONFIG")
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def letter_id(queue_server: EmbeddedServer) -> str:
    async def prepare() -> str:
        bus = Bus(queue_server.url)
        await bus._redis.flushall()
        letter_id = await give_up(bus, "a-0")
        await bus.close()
        return letter_id

    return asyncio.run(prepare())


def test_a_letter_is_listed_shown_and_retried(
    queue_server: EmbeddedServer, letter_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--redis-url", queue_server.url]
    assert main(["dlq", "list", *flags]) == 0
    listed = capsys.readouterr().out
    assert letter_id in listed
    assert "a-0" in listed
    assert main(["dlq", "show", letter_id, *flags]) == 0
    shown = capsys.readouterr().out
    assert "worker-0 (w) in decode, 2 tokens" in shown
    assert "3 in the prompt, 2 of at most 8 generated" in shown
    assert main(["dlq", "show", letter_id, "--json", *flags]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["id"], told["request"]["id"], told["deaths"][0]["phase"]) == (letter_id, "a-0", "decode")
    assert main(["dlq", "retry", letter_id, *flags]) == 0
    assert "a-0 was requeued" in capsys.readouterr().out
    assert asyncio.run(audited(queue_server)) == [("cli", "dead_letter.retry", letter_id)]
    assert main(["dlq", "list", *flags]) == 0
    assert "no dead letters" in capsys.readouterr().out
    assert main(["dlq", "retry", letter_id, *flags]) == 2
    assert "was retried" in capsys.readouterr().err


async def audited(server: EmbeddedServer) -> list[tuple[str, str, str]]:
    bus = Bus(server.url)
    found = [(entry.who, entry.action, entry.target) for _, entry in await bus.audit.newest(10)]
    await bus.close()
    return found


@pytest.mark.parametrize("guarded", [True, False])
def test_the_queue_of_a_running_fleet_is_found_by_its_data_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], guarded: bool
) -> None:
    flags = ["--data", str(tmp_path)]
    assert main(["dlq", "list", *flags]) == 2
    assert f"no fleet runs in {tmp_path}; start one with" in capsys.readouterr().err
    server = start_embedded(tmp_path / "queue" / "tiny-1", durable=False, guarded=guarded)
    try:
        (tmp_path / "queue" / "ended-2").mkdir()
        assert main(["dlq", "list", *flags]) == 0
        assert "no dead letters" in capsys.readouterr().out
    finally:
        server.stop()


def test_a_queue_that_does_not_answer_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dlq", "list", "--redis-url", f"unix://{tmp_path}/none.sock"]) == 1
    assert "cannot reach the queue" in capsys.readouterr().err


@pytest.fixture
def nothing_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave no variable that names a queue or a gateway, also none that a command of the test sets."""
    for name in (*NAMES_OF_QUEUES, "LORAFLEET_URL", "LORAFLEET_PROFILE", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.mark.usefixtures("nothing_named")
@pytest.mark.parametrize("name", examples.some(NAMES_OF_QUEUES, "LORAFLEET_CONFIG"))
def test_the_queue_is_asked_wherever_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Else a gateway would be asked that may be another fleet's."""
    url = f"unix://{tmp_path}/none.sock"
    (tmp_path / "fleet.toml").write_text(f'redis_url = "{url}"\n')
    values = {"LORAFLEET_CONFIG": str(tmp_path / "fleet.toml"), "LORAFLEET_DATA": str(tmp_path)}
    monkeypatch.setenv(name, values.get(name, url))
    told = f"no fleet runs in {tmp_path}; start one with" if name == "LORAFLEET_DATA" else "cannot reach the queue"
    assert main(["dlq", "list"]) == (2 if name == "LORAFLEET_DATA" else 1)
    assert told in capsys.readouterr().err
    monkeypatch.setenv("LORAFLEET_URL", NOBODY)  # it stands before what names the queue
    assert main(["dlq", "list"]) == 1
    assert f"cannot reach the gateway at {NOBODY}" in capsys.readouterr().err
    assert main(["dlq", "list", "--redis-url", url]) == 1  # as a flag does before a variable
    assert "cannot reach the queue" in capsys.readouterr().err
    monkeypatch.delenv("LORAFLEET_URL")
    assert main(["dlq", "list", "--url", NOBODY]) == 1
    assert f"cannot reach the gateway at {NOBODY}" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_named")
def test_the_file_that_names_the_queue_may_be_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fleet.toml").write_text(f'redis_url = "unix://{tmp_path}/none.sock"\n')
    assert main(["dlq", "list", "--config", str(tmp_path / "fleet.toml")]) == 1
    assert "cannot reach the queue" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_named")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("list --redis-password-file none", "--redis-password-file is for the queue, which nothing names"),
        ("list --config fleet.toml", "--config is for the queue, which nothing names"),
        ("retry 1-0 --request-timeout-s 5", "--request-timeout-s is for the queue, which nothing names"),
        (f"retry 1-0 --request-timeout-s 5 --url {NOBODY}", "--url and --request-timeout-s cannot be used together"),
        (f"list --redis-url unix:///none --url {NOBODY}", "--url and --redis-url cannot be used together"),
        ("show 1-0 --data none --key sk", "--key and --data cannot be used together"),
        ("list --data none --profile prod", "--profile and --data cannot be used together"),
        ("list --data none --api-key-file none", "--api-key-file and --data cannot be used together"),
    ],
)
def test_a_flag_of_the_other_way_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fleet.toml").write_text("port = 1\n")
    assert main(["dlq", *words.split()]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["dlq list", "audit", "adapters list"])
@pytest.mark.parametrize("limit", ["-1", "0", "9" * 30, "many"])
def test_a_limit_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], command: str, limit: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*command.split(), "--limit", limit])
    assert limit in capsys.readouterr().err

"""`lorafleet dlq` as a user runs it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from lorafleet.__main__ import main
from lorafleet.launcher.embedded import EmbeddedServer, start_embedded
from protocol.queue.bus import Bus
from tests.protocol.queue.test_dead_letters import give_up


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
    assert "none" in capsys.readouterr().err
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

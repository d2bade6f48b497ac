"""`lorafleet dlq` as a user runs it."""

from __future__ import annotations

import asyncio
import json

import pytest
from helpers.scripted_fleet import RunningGateway, ScriptedFleet

from lorafleet.__main__ import main
from protocol.queue.bus import Bus
from tests.protocol.queue.test_dead_letters import give_up


async def test_a_letter_is_listed_shown_and_retried(
    bus: Bus, gateway: RunningGateway, fleet: ScriptedFleet, capsys: pytest.CaptureFixture[str]
) -> None:
    async def told(*words: str, code: int = 0) -> str:
        assert await asyncio.to_thread(main, ["dlq", *words, "--url", gateway.url]) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    fleet.assigning.clear()
    letter_id = await give_up(bus, "a-0")
    listed = await told("list")
    assert letter_id in listed
    assert "a-0" in listed
    shown = await told("show", letter_id)
    assert "worker-0 (w) in decode, 2 tokens" in shown
    assert "3 in the prompt, 2 of at most 8 generated" in shown
    letter = json.loads(await told("show", letter_id, "--json"))
    assert (letter["id"], letter["request"]["id"], letter["deaths"][0]["phase"]) == (letter_id, "a-0", "decode")
    assert "a-0 was requeued" in await told("retry", letter_id)
    assert [(entry.action, entry.target) for _, entry in await bus.audit.newest(9)] == [
        ("dead_letter.retry", letter_id)
    ]
    assert "no dead letters" in await told("list")
    assert "was retried" in await told("retry", letter_id, code=2)


@pytest.mark.parametrize("command", ["dlq list", "audit", "adapters list"])
@pytest.mark.parametrize("limit", ["-1", "0", "9" * 30, "many"])
def test_a_limit_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], command: str, limit: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*command.split(), "--limit", limit])
    assert limit in capsys.readouterr().err

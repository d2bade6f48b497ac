"""Commands for operators list each base of a fleet with several; the output for a single base is unchanged."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from helpers.several_bases import gateway_of_bases

from lorafleet.__main__ import main
from protocol.queue.bus import Bus


@pytest.mark.parametrize("several", [False, True])
async def test_commands_show_each_base_of_several(
    bus: Bus, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    async with gateway_of_bases(bus, tmp_path, several=several) as gateway:
        monkeypatch.setenv("LORAFLEET_URL", gateway.url)
        monkeypatch.setenv("COLUMNS", "200")

        async def told(*words: str) -> list[list[str]]:
            capsys.readouterr()
            assert await asyncio.to_thread(main, words) == 0
            return [line.split() for line in capsys.readouterr().out.splitlines()]

        listed, top, status_lines = await told("workers", "list"), await told("top", "--once"), await told("status")
    workers = [row for row in (*listed, *top) if row[:1] in (["worker-w1"], ["worker-w2"])]
    if not several:
        assert "base" not in [cell.lower() for row in (*listed, *top) for cell in row]
        assert all("chat" not in row for row in workers)
        assert any(row[2] == "chat" for row in status_lines if len(row) > 2)
        return
    assert [row[2] for row in workers] == ["chat", "embed"] * 2
    shown = {row[0]: row[1:] for row in top if row[:1] in (["chat"], ["embed"], ["bad"]) and len(row) > 4}
    assert shown["chat"] == ["ready", "1", "3", "2", "0"]
    assert shown["embed"] == ["no", "worker", "0", "7", "0", "0"]
    assert shown["bad"] == ["failed", "0", "0", "0", "0"]
    assert any("chat, embed, bad" in " ".join(row) for row in status_lines)

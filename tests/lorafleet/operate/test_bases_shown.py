"""What commands for operators show of a fleet with several bases, and that one base looks as it ever did."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from helpers.reported import report
from helpers.scripted_fleet import make_model_folder, running_gateway

from lorafleet.__main__ import main
from protocol.queue.bus import Bus
from protocol.wire import messages as m


def base(name: str) -> m.ServedModel:
    return m.ServedModel(
        model=name, name=name, fingerprint="f", model_type="t", vocab_size=300, max_model_len=256, sites=[]
    )


async def add_worker(bus: Bus, wid: str, of: str) -> None:
    beat = m.WorkerBeat(wid=wid, name=f"worker-{wid}", base=of, capacity=4)
    await bus.members.beat(bus.keys.worker_beat(wid), bus.keys.workers, wid, m.encode(beat), 60_000)


@pytest.mark.parametrize("several", [False, True])
async def test_commands_show_each_base_of_several(
    bus: Bus, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    folders = {name: make_model_folder(tmp_path / name) for name in ("chat", "embed", "bad")}
    await report(bus, base("chat"))
    await add_worker(bus, "w1", "chat")
    if several:
        await bus._redis.hset(bus.keys.bases, "embed", m.encode(base("embed")))
        await add_worker(bus, "w2", "embed")
        await bus.members.note_failure("bad", "no memory")
        loads = {"chat": m.BaseLoad(1, 3, 2), "embed": m.BaseLoad(0, 7, 0)}
        status = m.SchedulerStatus(queued=10, running=2, workers=1, drain_rate=0.0, bases=loads)
        await bus.set(bus.keys.status, status, 60_000)
    further = ",".join(str(folders[name]) for name in ("embed", "bad")) if several else ""
    async with running_gateway(bus, folders["chat"], more_models=further) as gateway:
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

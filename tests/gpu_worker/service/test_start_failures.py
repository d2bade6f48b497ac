"""However a worker of one of several bases fails to start, the queue knows why: its calls and adapters depend on it."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import msgspec
import pytest

from benchmarks.common.fake_worker import FakeEngine, fake_served
from gpu_worker.service import service
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest

BEAT = m.WorkerBeat(wid="w", name="w", capacity=1)


async def failures(bus: Bus, more_models: str = "another") -> dict[str, str]:
    settings = Settings(redis_url=bus.url, model="fake", served_name="fake", more_models=more_models)
    with pytest.raises(Exception):  # noqa: B017, PT011  of any kind
        await service.serve(settings, asyncio.Event())
    return (await bus.members.bases())[1]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BadRequest("no such folder"), "no such folder"),
        (MemoryError(), "MemoryError:"),
        (RuntimeError("CUDA out of memory\nat line 1\n"), "RuntimeError: CUDA out of memory"),
    ],
)
async def test_a_model_that_cannot_be_loaded(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def load(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(service, "_load", load)
    assert await failures(bus, "") == {}  # a fleet of one base waits for another worker
    assert await failures(bus) == {"fake": reason}


@pytest.mark.parametrize("weights", ["own", "others"])
async def test_a_base_that_may_not_join(bus: Bus, monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    """Its name is taken, or its weights are there under another one."""
    served = fake_served("fake")
    other = fake_served("fake" if weights == "others" else "copy")
    served, other = (msgspec.structs.replace(one, weights=w) for one, w in ((served, "own"), (other, weights)))
    await bus.members.join(BEAT, other, 60_000, several=True)
    monkeypatch.setattr(service, "SWITCH_S", sys.getswitchinterval())
    monkeypatch.setattr(service, "_load", lambda *_: (FakeEngine(vocab_size=9), served))
    [(name, reason)] = (await failures(bus)).items()
    assert name == "fake"
    assert ("serves another base as fake" if weights == "others" else "name a base once") in reason

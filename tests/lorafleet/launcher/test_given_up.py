"""A launcher of several bases keeps running without a base whose workers do not start, and records the reason."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lorafleet.launcher.child import Child, Spec
from lorafleet.launcher.fleet import FleetLauncher
from lorafleet.launcher.screen import Screen
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings


@pytest.mark.parametrize("noted", ["", "no such folder"])
async def test_why_a_worker_was_killed_is_noted_by_its_launcher(bus: Bus, tmp_path: Path, noted: str) -> None:
    """A worker killed by the system for lack of memory cannot record the reason itself: its launcher does.

    A reason that the worker has recorded takes precedence, except one of an earlier run.
    """

    async def on_ready() -> bool:
        return True

    screen = Screen()
    children: list[Child] = []
    for number, base in enumerate("ab"):
        command = (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
        environment = {**os.environ, "LORAFLEET_BASE": base}
        spec = Spec("worker", f"worker-{number}", command, environment, tmp_path / f"{number}.log")
        children.append(Child(spec, 0, screen.say, first_pause_s=0.01))
    settings = Settings(redis_url=bus.url, model="a", more_models="b")
    launcher = FleetLauncher(settings, children, None, screen, on_ready)
    await bus.members.note_failure("b", "of an earlier run")
    await launcher._forget_failures()
    assert (await bus.members.bases())[1] == {}
    if noted:
        await bus.members.note_failure("b", noted)
    await launcher._keep(children[1])
    assert launcher._failure is None
    reasons = (await bus.members.bases())[1]
    assert set(reasons) == {"b"}
    assert reasons["b"] == noted or ("worker-1 did not start" in reasons["b"] and "\n" not in reasons["b"])
    await launcher._keep(children[0])
    assert launcher._failure is not None  # no worker is left

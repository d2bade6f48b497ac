"""The worker that is started ahead becomes what it is told to be, or ends; it never outlives the launcher."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.waiting import wait_until

from lorafleet.launcher.ahead import WorkerAhead
from protocol.runtime.environment import SERVICES, child_environment


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerAhead]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LORAFLEET_SECRET", "the fleet's own, and not for the process list")
    ahead = WorkerAhead()
    yield ahead
    ahead.close()


def environment(**more: str) -> dict[str, str]:
    own = child_environment(*SERVICES["worker"])
    return own | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | more


def test_it_serves_what_it_is_told_and_says_so_in_the_log(ahead: WorkerAhead, tmp_path: Path) -> None:
    log = tmp_path / "worker-0.log"
    log.touch()
    process = ahead.take(environment(LORAFLEET_MODEL=str(tmp_path / "none"), LORAFLEET_KERNELS="no such"), log)
    assert process is not None
    assert ahead.take(environment(), log) is None, "one process is one worker"
    assert b"LORAFLEET_SECRET" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    assert process.stdin is not None
    assert process.wait(120) == 2
    process.stdin.close()
    assert "LORAFLEET_KERNELS" in log.read_text()


def test_one_that_imports_with_other_variables_is_ended(ahead: WorkerAhead, tmp_path: Path) -> None:
    assert ahead.take(environment(OMP_NUM_THREADS="2"), tmp_path / "log") is None
    assert ahead.take(environment(), tmp_path / "log") is None


@pytest.mark.parametrize("is_taken", [False, True])
async def test_it_ends_when_the_launcher_does(ahead: WorkerAhead, tmp_path: Path, *, is_taken: bool) -> None:
    process = ahead._process
    assert process is not None
    assert process.stdin is not None
    if is_taken:
        log = tmp_path / "log"
        log.touch()
        assert ahead.take(environment(LORAFLEET_MODEL="org/name", LORAFLEET_REDIS_URL="redis://127.0.0.1:1"), log)
    process.stdin.close()  # as the system does at the launcher's end
    await wait_until(lambda: process.poll() is not None, "it has ended")
